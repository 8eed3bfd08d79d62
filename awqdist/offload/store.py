"""Keeps the activations that wait for their turn: in host memory up to a budget, then in files on a local disk.

A store lives as long as its process. It holds no resume state: nothing is synced, so a chunk that is dropped before the system writes it
out never costs the disk anything, and what a killed process leaves behind is garbage. Each process has a folder of its own, beside which it
holds a lock; `sweep` removes the folders of processes that have died. Files are checksummed, and written and read ahead by threads.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import threading
import uuid
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from awqdist.errors import OffloadError
from awqdist.offload.nvme import DeepNvme

_MAX_WAITING_WRITES = 2  # a slow disk must slow the worker down instead of filling its memory
_BLOCK_BYTES = 1 << 26
_PREFIX = "awqdist-kept-"
_NUM_TRIES = 5  # another process may sweep between two steps
_REMEDY = "run the same command again to resume, with --offload-dir on another disk if this happens again"


class Store:
    """Keeps tensors by key: in host memory up to a budget, the rest in files, if there is a store for them.

    Keys become file names: letters, digits, dots and dashes. All methods may be called from several threads.

    Chunks are needed in the order in which they were put. When memory is full, the newest is therefore needed last, and the newest
    goes to disk: of C chunks, k of which fit, each layer moves C - k. Evicting the oldest, as caches do, would move all of them.
    """

    def __init__(
        self, budget_bytes: int | None = None, below: FileStore | None = None, *, pinned: bool = False
    ) -> None:
        """
        Args:
            budget_bytes: of host memory; None for no limit.
            below: takes what does not fit; closed with this store.
            pinned: use page-locked memory, from which a GPU copies directly.
        """
        self._budget_bytes, self._below, self._pinned = budget_bytes, below, pinned
        self._tensors: dict[str, Tensor] = {}
        self._num_bytes = 0
        self._lock = threading.Lock()

    def put(self, key: str, tensor: Tensor) -> None:
        """Stores a tensor in place of what the key held before.

        Args:
            tensor: on the CPU, of any dtype and shape; not modified by anyone from now on.

        Raises:
            OffloadError: it does not fit. A store that writes in the background may raise for an earlier tensor.
        """
        self.drop(key)
        with self._lock:
            fits = self._budget_bytes is None or self._num_bytes + tensor.nbytes <= self._budget_bytes
            if fits:
                self._num_bytes += tensor.nbytes
                self._tensors[key] = tensor.pin_memory() if self._pinned else tensor
        if fits:
            return
        if self._below is None:
            raise OffloadError(
                f"{key} of {tensor.nbytes:,} bytes does not fit into memory: {self._num_bytes:,} of {self._budget_bytes:,} bytes"
                " are in use; raise --cpu-memory, or use --offload disk"
            )
        self._below.put(key, tensor)

    def get(self, key: str) -> Tensor:
        """Returns the tensor, bit for bit. It stays in the store and must not be modified. Raises OffloadError if damaged or missing."""
        tensor = self._tensors.get(key)
        if tensor is not None:
            return tensor
        if self._below is None:
            raise OffloadError(f"{key} is not stored in memory; this is a bug in awqdist")
        return self._below.get(key)

    def prefetch(self, key: str) -> None:
        """Starts reading a tensor that `get` will ask for soon. Does not wait; ignores unknown keys."""
        if self._below is not None and key not in self._tensors:
            self._below.prefetch(key)

    def drop(self, key: str) -> None:
        """Removes a tensor; ignores unknown keys."""
        with self._lock:
            tensor = self._tensors.pop(key, None)
            if tensor is not None:
                self._num_bytes -= tensor.nbytes
        if self._below is not None:
            self._below.drop(key)

    @property
    def num_bytes(self) -> int:
        """Returns the total size of the stored tensors, in bytes."""
        return self._num_bytes + (self._below.num_bytes if self._below is not None else 0)

    def close(self) -> None:
        """Removes everything. Tensors that are put afterwards are discarded."""
        with self._lock:
            self._tensors, self._num_bytes = {}, 0
        if self._below is not None:
            self._below.close()


def open_store(
    level: str, base: Path, budget_bytes: int | None, warn: Callable[[str], None], *, pinned: bool = False
) -> Store:
    """Returns an empty store, to be closed by the caller.

    Args:
        level: "cpu" for memory only, "disk" for memory and then plain files, "nvme" for memory and then files through DeepNVMe.
        base: folder in which a new folder for the files is made.
        budget_bytes: of host memory; None for no limit.
        warn: called once if plain files are used because DeepNVMe is not available.
        pinned: use page-locked memory, for a worker with a GPU.

    Raises:
        OffloadError: the folder cannot be made.
    """
    if level == "cpu":
        return Store(budget_bytes, pinned=pinned)
    folder = OwnFolder(base)
    medium: Medium = PlainFiles(pinned=pinned)
    if level == "nvme":
        try:
            medium = DeepNvme(folder.path)
        except OffloadError as error:
            warn(f"DeepNVMe is not available: {error}; using plain files in {base} instead")
        except BaseException:
            folder.remove()
            raise
    return Store(budget_bytes, FileStore(folder, medium), pinned=pinned)


class PlainFiles:
    """A medium that uses ordinary system calls and leaves as little as possible in the page cache."""

    def __init__(self, *, pinned: bool = False) -> None:
        """pinned: read into page-locked memory."""
        self._pinned = pinned

    def write(self, file: Path, data: Tensor) -> None:
        """Writes data (num_bytes,) uint8 into a new file. Raises OSError."""
        view, done = data.numpy().data, 0
        with open(file, "xb", buffering=0, opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
            while done < len(view):
                count = stream.write(view[done:][:_BLOCK_BYTES])
                if not count:
                    raise OSError(errno.EIO, "the disk accepts no more bytes")
                done += count
            _drop_cache(stream.fileno())

    def read(self, file: Path, num_bytes: int) -> Tensor:
        """Returns the first `num_bytes` of a file, (num_bytes,) uint8. Raises OSError if the file is shorter or missing."""
        data = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        view, done = data.numpy().data, 0
        with open(file, "rb", buffering=0) as stream:
            while done < num_bytes:
                count = stream.readinto(view[done:][:_BLOCK_BYTES])
                if not count:
                    raise OSError(errno.EIO, f"it ends after {done:,} of {num_bytes:,} bytes")
                done += count
            _drop_cache(stream.fileno())
        return data

    def close(self) -> None:
        """Does nothing: no buffer is kept."""


def _drop_cache(descriptor: int) -> None:
    """Removes an open file from the page cache, except for pages that are not yet written out."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


Medium = PlainFiles | DeepNvme  # writes and reads whole files; one thread writes and one reads


class OwnFolder:
    """A new folder in `base` that belongs to this process. Raises OffloadError if it cannot be made."""

    def __init__(self, base: Path) -> None:
        self.path = base / f"{_PREFIX}{uuid.uuid4().hex[:12]}"
        self._lock_file = self.path.with_suffix(".lock")
        try:
            self._lock = self._acquire_lock()
            self.path.mkdir()
        except OSError as error:
            raise OffloadError(
                f"cannot make the offload folder {self.path}: {error.strerror}; give another --offload-dir"
            ) from error

    def remove(self) -> None:
        """Removes the folder, but not `base`."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock_file.unlink(missing_ok=True)
        os.close(self._lock)

    def _acquire_lock(self) -> int:
        """Returns the descriptor of the locked file. The lock ends with the process, however that dies."""
        for _ in range(_NUM_TRIES):
            with suppress(FileNotFoundError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                lock = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o600)
                with suppress(OSError):  # a file system without locks: its folders are never swept
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if self._lock_file.exists():
                    return lock
                os.close(lock)
        raise FileNotFoundError(errno.ENOENT, "other processes keep removing it")


def sweep(base: Path) -> None:
    """Removes the folders in `base` whose processes have died.

    A lock that cannot be acquired means that its process is alive, here or, on file systems with distributed locks, on another machine.
    """
    for file in base.glob(f"{_PREFIX}*.lock"):
        with suppress(OSError):
            lock = os.open(file, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(file.with_suffix(""), ignore_errors=True)
                file.unlink()
            finally:
                os.close(lock)


@dataclass(slots=True)
class _Entry:
    """A stored tensor."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int
    unwritten: Tensor | None  # the tensor itself, until it is written
    written: Future[None]
    crc32: int = 0
    ahead: Future[Tensor] | None = None  # the read that `prefetch` has started


class FileStore:
    """Keeps one file per tensor in `folder`, which is removed when the store is closed. See `Store` for the methods."""

    def __init__(self, folder: OwnFolder, medium: Medium) -> None:
        self._folder, self._medium = folder, medium
        self._entries: dict[str, _Entry] = {}
        self._numbers = itertools.count()
        self._writes: deque[Future[None]] = deque()
        self._lock = threading.Lock()
        self._closed = False
        self._writer = ThreadPoolExecutor(1, "awqdist-offload-write")
        self._reader = ThreadPoolExecutor(1, "awqdist-offload-read")

    def put(self, key: str, tensor: Tensor) -> None:
        self.drop(key)
        file = self._folder.path / f"{key}.{next(self._numbers)}"  # a new name: the old file may still be being written
        entry = _Entry(file, tensor.dtype, tuple(tensor.shape), tensor.nbytes, tensor, Future())
        with self._lock:
            if self._closed:
                return
            self._entries[key] = entry
            self._writes.append(entry.written)
            self._writer.submit(self._write, entry)
            due = [self._writes.popleft() for _ in range(len(self._writes) - _MAX_WAITING_WRITES)]
        for write in due:
            write.result()

    def get(self, key: str) -> Tensor:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                raise OffloadError(f"{key} is not stored in {self._folder.path}; this is a bug in awqdist")
            tensor, ahead, entry.ahead = entry.unwritten, entry.ahead, None
        if tensor is not None and not entry.written.done():
            return tensor
        entry.written.result()
        data = (ahead or self._reader.submit(self._read, entry)).result()
        return data.view(entry.dtype).reshape(entry.shape)

    def prefetch(self, key: str) -> None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.unwritten is None and entry.ahead is None:
                entry.ahead = self._reader.submit(self._read, entry)

    def drop(self, key: str) -> None:
        with self._lock:
            entry = self._entries.pop(key, None)
        if entry is not None:
            entry.written.add_done_callback(lambda _: entry.file.unlink(missing_ok=True))

    @property
    def num_bytes(self) -> int:
        with self._lock:
            return sum(entry.num_bytes for entry in self._entries.values())

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for key in list(self._entries):
            self.drop(key)
        self._writer.shutdown(wait=True)
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._medium.close()
        self._folder.remove()

    def _write(self, entry: _Entry) -> None:
        tensor = entry.unwritten
        assert tensor is not None
        try:
            with self._lock:
                is_dropped = all(other is not entry for other in self._entries.values())
            if not is_dropped:
                data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                entry.crc32 = zlib.crc32(data.numpy().data)
                self._medium.write(entry.file, data)
            entry.unwritten = None
            entry.written.set_result(None)
        except OSError as error:
            with suppress(OSError):
                entry.file.unlink(missing_ok=True)
            reason = error.strerror or error
            entry.written.set_exception(
                OffloadError(
                    f"cannot write {entry.num_bytes:,} bytes to {entry.file}: {reason}; free space there, or give an --offload-dir"
                    " with enough space, and run the same command again"
                )
            )
        except BaseException as error:
            entry.written.set_exception(error)

    def _read(self, entry: _Entry) -> Tensor:
        """Returns the bytes of a tensor, (num_bytes,) uint8."""
        try:
            data = self._medium.read(entry.file, entry.num_bytes)
        except OSError as error:
            reason = "it is missing" if isinstance(error, FileNotFoundError) else error.strerror or error
            raise OffloadError(f"cannot read {entry.file}: {reason}; {_REMEDY}") from error
        if zlib.crc32(data.numpy().data) != entry.crc32:
            raise OffloadError(
                f"{entry.file} does not hold the bytes that were written: the disk is failing; {_REMEDY}"
            )
        return data
