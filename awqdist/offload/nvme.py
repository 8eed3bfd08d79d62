"""Files on an NVMe disk through DeepSpeed's DeepNVMe: direct I/O, many blocks on their way at once, no page cache.

DeepNVMe tells of no error of a transfer, and writes nothing at all where sizes do not fit its alignment. So sizes are padded, room is
taken before writing, sizes are compared before reading (it would abort the process), and every file is checksummed by its store.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awqdist.errors import OffloadError
from awqdist.offload.deepspeed_io import load_operator

_PARALLELISM = 1  # threads per transfer
_ALIGNMENT_BYTES = 4096 * _PARALLELISM
_BLOCK_BYTES = 1 << 20
_QUEUE_DEPTH = 32
_TRIAL_BYTES = 12345


class DeepNvme:
    """A medium. Raises OffloadError if the operator cannot be had without compiling it, or if `folder` takes no direct I/O."""

    def __init__(self, folder: Path) -> None:
        operator = load_operator()
        self._writing, self._reading = _Lane(operator), _Lane(operator)
        trial, data = folder / "trial", torch.arange(_TRIAL_BYTES).to(torch.uint8)
        try:
            self.write(trial, data)
            if not torch.equal(self.read(trial, _TRIAL_BYTES), data):
                raise OSError(errno.EIO, "what was written was not read back")
        except OSError as error:
            raise OffloadError(f"{folder} does not take DeepNVMe's direct I/O: {error.strerror or error}") from error
        finally:
            trial.unlink(missing_ok=True)
            self.close()

    def write(self, file: Path, data: Tensor) -> None:
        size = _padded(data.numel())
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if size:
                os.posix_fallocate(descriptor, 0, size)  # a full disk is told here or never
        finally:
            os.close(descriptor)
        if size:
            buffer = self._writing.buffer(size)
            buffer[: data.numel()] = data
            if self._writing.handle.sync_pwrite(buffer, str(file), 0) != 1:
                raise OSError(errno.EIO, "DeepNVMe did not write it")
        _check_size(file, size)

    def read(self, file: Path, num_bytes: int) -> Tensor:
        size = _padded(num_bytes)
        _check_size(file, size)
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        buffer = self._reading.buffer(size)
        if self._reading.handle.sync_pread(buffer, str(file), 0) != 1:
            raise OSError(errno.EIO, "DeepNVMe did not read it")
        return buffer[:num_bytes].clone()

    def close(self) -> None:
        self._writing.free()
        self._reading.free()


class _Lane:
    """One direction, used by one thread: a handle, and a page-locked buffer that grows to the largest transfer."""

    def __init__(self, operator: Any) -> None:
        self.handle = operator.aio_handle(_BLOCK_BYTES, _QUEUE_DEPTH, False, True, _PARALLELISM)
        self._buffer: Tensor | None = None

    def buffer(self, size: int) -> Tensor:
        """(size,) uint8; what is in it is left from before."""
        if self._buffer is None or self._buffer.numel() < size:
            self.free()
            self._buffer = self.handle.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.uint8))
            if not self._buffer.data_ptr():
                self._buffer = None
                raise OSError(errno.ENOMEM, f"{size:,} bytes cannot be locked in memory; raise `ulimit -l`")
        return self._buffer[:size]

    def free(self) -> None:
        if self._buffer is not None:
            self.handle.free_cpu_locked_tensor(self._buffer)
        self._buffer = None


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _check_size(file: Path, size: int) -> None:
    found = file.stat().st_size
    if found != size:
        raise OSError(errno.EIO, f"it has {found:,} bytes where {size:,} are expected")
