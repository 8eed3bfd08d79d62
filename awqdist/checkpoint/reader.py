"""Reads tensors by byte range into fresh memory. Nothing is mapped, and the page cache is dropped behind, so that neither the
resident memory of the process nor the machine's cache grows with the model. Quantized weights are dequantized one by one."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from awqdist.checkpoint.dequantize import dequantize
from awqdist.checkpoint.index import DTYPES, MXFP4, TensorEntry
from awqdist.checkpoint.mxfp4 import dequantize_mxfp4
from awqdist.errors import CheckpointError

T = TypeVar("T")
_BLOCK_BYTES = 1 << 26
_MAX_SAMPLED_TENSORS = 64
_SAMPLE_BYTES = 256


@dataclass(frozen=True, slots=True)
class Reading:
    """Tensors that were read, by name. crc32: of all bytes read, in order: which weights a layer was made from; samples: a few bytes of
    each tensor, as `sample_checksum` reads them."""

    tensors: dict[str, Tensor]
    crc32: int
    num_bytes: int  # as counted while they were read
    samples: dict[str, bytes]

    def sample_checksum(self) -> int:
        """That of the tensors by name, without reading again."""
        return _checksum(self.samples[name] for name in _sampled(sorted(self.samples)))


def read_tensor(entry: TensorEntry) -> Tensor:
    """The tensor of `entry` on the CPU, in the entry's dtype. Raises CheckpointError if the file ends early."""
    return read_tensors([entry]).tensors[entry.name]


def read_tensors(entries: Iterable[TensorEntry]) -> Reading:
    """The tensors of `entries` on the CPU, in the entries' dtypes. Raises CheckpointError if a file ends early."""
    tensors: dict[str, Tensor] = {}
    samples: dict[str, bytes] = {}
    checksum = num_bytes = 0
    whole: Tensor | None = None
    sample = b""
    last: TensorEntry | None = None  # what `whole` was read from: the views of a tensor come one after the other
    for entry in entries:
        source = entry.whole or entry
        if whole is None or source != last:
            stored = [_read_range(part, part.start, part.stop) for part in _parts(source)]
            for data in stored:
                checksum = zlib.crc32(data.numpy().data, checksum)
                num_bytes += data.numel()
            sample = b"".join(bytes(data[_middle(data.numel())].numpy().data) for data in stored)
            whole, last = _assembled(stored, source), source
        samples[entry.name] = sample
        tensors[entry.name] = _part(whole, entry)
    return Reading(tensors, checksum, num_bytes, samples)


def sample_checksum(entries: Sequence[TensorEntry]) -> int:
    """CRC-32 of a few bytes from the middle of every tensor (of some, where there are many): enough to tell two trained models of one
    shape apart, and as good as no reading."""
    return _checksum(
        b"".join(_read_middle(part) for part in _parts(entry.whole or entry)) for entry in _sampled(entries)
    )


def _sampled(items: Sequence[T]) -> Sequence[T]:
    return items[:: len(items) // _MAX_SAMPLED_TENSORS + 1]


def _checksum(samples: Iterable[bytes]) -> int:
    checksum = 0
    for sample in samples:
        checksum = zlib.crc32(sample, checksum)
    return checksum


def _read_middle(entry: TensorEntry) -> bytes:
    middle = _middle(entry.stop - entry.start)
    return bytes(_read_range(entry, entry.start + middle.start, entry.start + middle.stop).numpy().data)


def _middle(num_bytes: int) -> slice:
    start = max(num_bytes - _SAMPLE_BYTES, 0) // 2
    return slice(start, min(start + _SAMPLE_BYTES, num_bytes))


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


def _parts(entry: TensorEntry) -> tuple[TensorEntry, ...]:
    """Where the bytes of a tensor lie: its values, then its scales if it has any."""
    return (entry, entry.packing.scale) if entry.packing else (entry,)


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
                os.posix_fadvise(descriptor, entry.start, entry.stop - entry.start, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"cannot read tensor {entry.name} of {entry.file}: {error.strerror or error}") from error
    return data


def _assembled(stored: list[Tensor], entry: TensorEntry) -> Tensor:
    """The tensor of `entry` from the bytes of its parts, each (n,) uint8."""
    if entry.packing is None:
        return _view(stored[0], entry, entry.dtype)
    values, scale = stored
    if entry.packing.dtype == MXFP4:
        return dequantize_mxfp4(values, scale, DTYPES[entry.dtype]).reshape(entry.shape)
    weight = _view(values, entry, entry.packing.dtype)
    scales = _view(scale, entry.packing.scale, entry.packing.scale.dtype)
    return dequantize(weight, scales, entry.packing.block, DTYPES[entry.dtype])


def _part(whole: Tensor, entry: TensorEntry) -> Tensor:
    """The tensor of `entry` from that which it is a view of, in memory of its own; `whole` itself if it is none."""
    if entry.whole is None:
        return whole
    assert entry.strides is not None
    return whole.as_strided(entry.shape, entry.strides, entry.offset).clone(memory_format=torch.contiguous_format)


def _view(data: Tensor, entry: TensorEntry, dtype: str) -> Tensor:
    values = data.view(DTYPES[dtype])
    if entry.strides is None:
        return values.reshape(entry.shape)
    return values.as_strided(entry.shape, entry.strides).contiguous()
