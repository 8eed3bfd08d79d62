"""Reads tensors by byte range into fresh memory. Nothing is mapped, and the page cache is dropped behind, so that neither the
resident memory of the process nor the machine's cache grows with the model."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from awqdist.checkpoint.index import DTYPES, TensorEntry
from awqdist.errors import CheckpointError

_BLOCK_BYTES = 1 << 26
_MAX_SAMPLED_TENSORS = 64
_SAMPLE_BYTES = 256


def read_tensor(entry: TensorEntry) -> Tensor:
    """The tensor of `entry` on the CPU, in its own dtype. Raises CheckpointError if the file ends early."""
    return _view(_read_bytes(entry), entry)


def read_tensors(entries: Iterable[TensorEntry]) -> tuple[dict[str, Tensor], int]:
    """Tensors by name, and one CRC-32 of all their bytes in the given order: which weights a layer was made from."""
    tensors: dict[str, Tensor] = {}
    checksum = 0
    for entry in entries:
        data = _read_bytes(entry)
        checksum = zlib.crc32(data.numpy().data, checksum)
        tensors[entry.name] = _view(data, entry)
    return tensors, checksum


def sample_checksum(entries: Sequence[TensorEntry]) -> int:
    """CRC-32 of a few bytes from the middle of every tensor (of some, where there are many): enough to tell two trained models of one
    shape apart, and as good as no reading."""
    checksum = 0
    for entry in entries[:: len(entries) // _MAX_SAMPLED_TENSORS + 1]:
        middle = entry.start + max(entry.num_bytes - _SAMPLE_BYTES, 0) // 2
        stop = min(middle + _SAMPLE_BYTES, entry.stop)
        checksum = zlib.crc32(_read_range(entry, middle, stop).numpy().data, checksum)
    return checksum


def check_finite(tensors: dict[str, Tensor], where: str) -> None:
    """Raises CheckpointError naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
            finite = torch.isfinite(tensor.float())
            count = int(tensor.numel() - finite.sum())
            if count:
                raise CheckpointError(
                    f"{where}: tensor {name} holds {count} values that are NaN or infinite; repair the source"
                )


def _read_bytes(entry: TensorEntry) -> Tensor:
    """(num_bytes,) uint8."""
    return _read_range(entry, entry.start, entry.stop)


def _read_range(entry: TensorEntry, start: int, stop: int) -> Tensor:
    """Bytes of the file of `entry`: (stop - start,) uint8."""
    data = torch.empty(stop - start, dtype=torch.uint8)
    view = data.numpy().data
    try:
        descriptor = os.open(entry.file, os.O_RDONLY)
        try:
            while start < stop:
                count = os.preadv(descriptor, [view[-(stop - start) :][:_BLOCK_BYTES]], start)
                if count == 0:
                    raise CheckpointError(f"{entry.file}: ends within tensor {entry.name}; download it again")
                start += count
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, entry.start, entry.num_bytes, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"cannot read tensor {entry.name} of {entry.file}: {error.strerror or error}") from error
    return data


def _view(data: Tensor, entry: TensorEntry) -> Tensor:
    return data.view(DTYPES[entry.dtype]).reshape(entry.shape)
