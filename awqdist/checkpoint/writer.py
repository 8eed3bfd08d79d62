"""Writes files atomically and durably: temporary name, write, fsync, rename, fsync of the folder; the mode follows the umask.

safetensors' own save_file neither syncs nor honours the umask, and needs every tensor in memory at once; this writer streams.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from awqdist.checkpoint.index import DTYPE_NAMES
from awqdist.errors import CheckpointError, OutputError

_TEMPORARY_SUFFIX = ".awqdist-partial"
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A finished file: its name, size and SHA-256."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is loaded only when its turn to be written comes. dtype: its name in safetensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    load: Callable[[], Tensor]


def write_safetensors(file: Path, tensors: dict[str, Tensor]) -> WrittenFile:
    """Writes `tensors` durably, sorted by name, so that equal tensors give equal bytes.

    Raises:
        OutputError: the file cannot be written.
    """
    return stream_safetensors(
        file, [lazy_tensor(n, tensors[n], partial(tensors.__getitem__, n)) for n in sorted(tensors)]
    )


def lazy_tensor(name: str, like: Tensor, load: Callable[[], Tensor]) -> LazyTensor:
    """Returns a tensor with the dtype and shape of `like`, which is not kept; `load` returns its values."""
    num_bytes = like.numel() * like.element_size()
    return LazyTensor(name, DTYPE_NAMES[like.dtype], tuple(like.shape), num_bytes, load)


def stream_safetensors(file: Path, tensors: Sequence[LazyTensor]) -> WrittenFile:
    """Writes tensors durably in the given order, one in memory at a time.

    Raises:
        OutputError: the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.num_bytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    parts = (_bytes_of(tensor.load()) for tensor in tensors)
    return _write(file, [struct.pack("<Q", len(encoded)) + encoded], parts)


def write_bytes(file: Path, data: bytes) -> WrittenFile:
    """Writes a small file durably. Raises OutputError if it cannot."""
    return _write(file, [data], ())


def write_json(file: Path, data: object) -> WrittenFile:
    """Writes indented JSON with a final newline, durably. Raises OutputError if it cannot."""
    return write_bytes(file, (json.dumps(data, indent=2) + "\n").encode())


def copy_file(source: Path, file: Path) -> WrittenFile:
    """Copies a file durably, with the mode of a new one.

    Raises:
        CheckpointError: `source` cannot be read.
        OutputError: `file` cannot be written.
    """
    return _write(file, _read_blocks(source), ())


def remove_temporary_files(folder: Path) -> None:
    """Removes the temporary files of writers that were killed."""
    for file in folder.glob(f"*{_TEMPORARY_SUFFIX}"):
        file.unlink(missing_ok=True)


def output_error(file: Path, error: OSError) -> OutputError:
    """Returns the error for users that explains an operating-system error while writing `file`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"no space left on the disk while writing {file}; free some and run the same command again to resume"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"cannot write {file}: {error.strerror}; choose a folder that you may write to")
    return OutputError(f"cannot write {file}: {error.strerror or error}")


def _write(file: Path, head: Iterable[bytes], parts: Iterable[memoryview]) -> WrittenFile:
    # unique: a worker that was given up but still runs may be writing the same file, with the same bytes
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex[:12]}{_TEMPORARY_SUFFIX}")
    digest, num_bytes = hashlib.sha256(), 0
    try:
        # open() creates files by the umask, where tempfile would leave mode 0600
        with temporary.open("wb") as stream:
            for source in (head, parts):
                for part in source:
                    stream.write(part)
                    digest.update(part)
                    num_bytes += len(part)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(file)
        descriptor = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # makes the renaming durable
        finally:
            os.close(descriptor)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise output_error(file, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return WrittenFile(file.name, num_bytes, digest.hexdigest())


def _read_blocks(source: Path) -> Iterator[bytes]:
    try:
        with source.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                yield block
    except OSError as error:
        raise CheckpointError(f"cannot read {source}: {error.strerror or error}") from error


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
