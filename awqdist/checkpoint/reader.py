"""Reads tensors by byte range into fresh memory. Nothing is mapped, and the page cache is dropped behind, so that neither the
resident memory of the process nor the machine's cache grows with the model."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

from awqdist.checkpoint.index import TensorEntry
from awqdist.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_BLOCK_BYTES = 1 << 26


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


def check_finite(tensors: dict[str, Tensor], where: str) -> None:
    """Raises CheckpointError naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
            finite = torch.isfinite(tensor.float())
            count = int(tensor.numel() - finite.sum())
            if count:
                raise CheckpointError(f"{where}: tensor {name} holds {count} values that are NaN or infinite; repair the source")


def _read_bytes(entry: TensorEntry) -> Tensor:
    """(num_bytes,) uint8."""
    data = torch.empty(entry.num_bytes, dtype=torch.uint8)
    view = data.numpy().data
    descriptor = os.open(entry.file, os.O_RDONLY)
    try:
        done = 0
        while done < entry.num_bytes:
            count = os.preadv(descriptor, [view[done : done + _BLOCK_BYTES]], entry.start + done)
            if count == 0:
                raise CheckpointError(f"{entry.file}: ends within tensor {entry.name}; download it again")
            done += count
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, entry.start, entry.num_bytes, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return data


def _view(data: Tensor, entry: TensorEntry) -> Tensor:
    if entry.dtype not in DTYPES:
        raise CheckpointError(f"{entry.file}: tensor {entry.name} has dtype {entry.dtype}, which cannot be read")
    return data.view(DTYPES[entry.dtype]).reshape(entry.shape)
