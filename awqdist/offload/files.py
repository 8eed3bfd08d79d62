"""Files as a store: one per tensor, checksummed, written and read ahead in the background. How bytes get to the disk and back is the
business of a medium: plain system calls (`disk`) or DeepNVMe (`nvme`)."""

from __future__ import annotations

import itertools
import threading
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from awqdist.errors import OffloadError
from awqdist.offload.folder import OwnFolder
from awqdist.offload.store import bytes_of, size_of

_MAX_WAITING_WRITES = 2  # so that a slow disk slows the worker down instead of filling its memory


class Medium(Protocol):
    """Moves the bytes of one whole file."""

    def write(self, file: Path, data: Tensor) -> None:
        """Writes data (num_bytes,) uint8 into a new file. Raises OSError."""

    def read(self, file: Path, num_bytes: int) -> Tensor:
        """The first `num_bytes` of a file: (num_bytes,) uint8. Raises OSError if it has fewer, or is gone."""

    def close(self) -> None:
        """Gives back what it holds, after the last transfer."""


@dataclass(slots=True)
class _Kept:
    """A tensor in a file. waiting: the tensor itself, until it is written; ahead: the reading of it, once that has begun."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int
    waiting: Tensor | None
    written: Future[None]
    crc32: int = 0
    ahead: Future[Tensor] | None = None


class FileStore:
    """A tensor per file in `folder`, which is removed with the store."""

    def __init__(self, folder: OwnFolder, medium: Medium) -> None:
        self._folder, self._medium = folder, medium
        self._kept: dict[str, _Kept] = {}
        self._numbers = itertools.count()
        self._writes: deque[Future[None]] = deque()
        self._lock = threading.Lock()
        self._closed = False
        self._writer = ThreadPoolExecutor(1, "awqdist-offload-write")
        self._reader = ThreadPoolExecutor(1, "awqdist-offload-read")

    def put(self, key: str, tensor: Tensor) -> None:
        self.drop(key)
        file = self._folder.path / f"{key}.{next(self._numbers)}"  # a new name: the old file may still be being written
        kept = _Kept(file, tensor.dtype, tuple(tensor.shape), size_of(tensor), tensor, Future())
        with self._lock:
            if self._closed:
                return
            self._kept[key] = kept
            self._writes.append(kept.written)
            self._writer.submit(self._write, kept)
            due = [self._writes.popleft() for _ in range(len(self._writes) - _MAX_WAITING_WRITES)]
        for write in due:
            write.result()

    def get(self, key: str) -> Tensor:
        with self._lock:
            kept = self._kept.get(key)
            if kept is None:
                raise OffloadError(f"{key} is not kept in {self._folder.path}; this is a bug of awqdist")
            tensor, ahead, kept.ahead = kept.waiting, kept.ahead, None
        if tensor is not None and not kept.written.done():
            return tensor
        kept.written.result()
        data = (ahead or self._reader.submit(self._read, kept)).result()
        return data.view(kept.dtype).reshape(kept.shape)

    def prefetch(self, key: str) -> None:
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None and kept.waiting is None and kept.ahead is None:
                kept.ahead = self._reader.submit(self._read, kept)

    def drop(self, key: str) -> None:
        with self._lock:
            kept = self._kept.pop(key, None)
        if kept is not None:
            kept.written.add_done_callback(lambda _: kept.file.unlink(missing_ok=True))

    @property
    def num_bytes(self) -> int:
        with self._lock:
            return sum(kept.num_bytes for kept in self._kept.values())

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for key in list(self._kept):
            self.drop(key)
        self._writer.shutdown(wait=True)
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._medium.close()
        self._folder.remove()

    def _write(self, kept: _Kept) -> None:
        tensor = kept.waiting
        assert tensor is not None
        try:
            with self._lock:
                wanted = any(other is kept for other in self._kept.values())
            if wanted:
                data = bytes_of(tensor)
                kept.crc32 = zlib.crc32(data.numpy().data)
                self._medium.write(kept.file, data)
            kept.waiting = None
            kept.written.set_result(None)
        except OSError as error:
            with suppress(OSError):
                kept.file.unlink(missing_ok=True)
            kept.written.set_exception(_write_error(kept, error))
        except BaseException as error:
            kept.written.set_exception(error)

    def _read(self, kept: _Kept) -> Tensor:
        """(num_bytes,) uint8."""
        try:
            data = self._medium.read(kept.file, kept.num_bytes)
        except OSError as error:
            reason = "it is gone" if isinstance(error, FileNotFoundError) else error.strerror or error
            raise OffloadError(f"cannot read {kept.file} back: {reason}; {_REMEDY}") from error
        if zlib.crc32(data.numpy().data) != kept.crc32:
            raise OffloadError(f"{kept.file} holds other bytes than were written: the disk is failing; {_REMEDY}")
        return data


_REMEDY = "the same command resumes, with --offload-dir on another disk if this happens again"


def _write_error(kept: _Kept, error: OSError) -> OffloadError:
    return OffloadError(
        f"cannot keep {kept.num_bytes:,} bytes in {kept.file}: {error.strerror or error}; free space there, or give an --offload-dir"
        " with room, and run the same command again"
    )
