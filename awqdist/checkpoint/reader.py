"""Reads tensors by byte range into fresh memory, dequantizing one weight after the other.

Nothing is mapped, and the page cache is dropped behind, so that neither the process's resident memory nor the machine's cache grows with
the model.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.checkpoint.index import DTYPES, TensorEntry
from awqdist.checkpoint.sources import FORMATS
from awqdist.errors import CheckpointError

_BLOCK_BYTES = 1 << 26
_MAX_SAMPLED_TENSORS = 64
_SAMPLE_BYTES = 256


@dataclass(frozen=True, slots=True)
class Reading:
    """Tensors that were read, and what identifies the bytes they were read from."""

    tensors: dict[str, Tensor]
    crc32: int  # of all bytes read, in order; it says which weights a layer was made from
    num_bytes: int  # as counted while they were read
    samples: dict[str, bytes]  # a few bytes of each tensor, as `sample_checksum` reads them

    def sample_checksum(self) -> int:
        """Returns what the function `sample_checksum` returns for these tensors by name, without reading again."""
        names = sorted(self.samples)
        return zlib.crc32(b"".join(self.samples[name] for name in names[_sampling(len(names))]))


def read_tensor(entry: TensorEntry) -> Tensor:
    """Returns the tensor of `entry` on the CPU, in the entry's dtype.

    Raises:
        CheckpointError: the file ends early, or cannot be read.
    """
    return read_tensors([entry]).tensors[entry.name]


def read_tensors(entries: Iterable[TensorEntry]) -> Reading:
    """Reads the tensors of `entries` to the CPU, in the entries' dtypes.

    Views of one tensor that follow one another are made from a single reading of it.

    Raises:
        CheckpointError: a file ends early, or cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    samples: dict[str, bytes] = {}
    checksum = num_bytes = 0
    whole: Tensor | None = None
    sample = b""
    last: TensorEntry | None = None  # the entry that `whole` was read from
    for entry in entries:
        source = entry.whole or entry
        if whole is None or source != last:
            stored = [_read_range(part, part.start, part.stop) for part in _stored_parts(source)]
            for data in stored:
                checksum = zlib.crc32(data.numpy().data, checksum)
                num_bytes += data.numel()
            sample = b"".join(bytes(data[_middle(data.numel())].numpy().data) for data in stored)
            whole, last = _decode(stored, source), source
        samples[entry.name] = sample
        tensor = whole
        if entry.whole is not None:
            assert entry.strides is not None
            view = whole.as_strided(entry.shape, entry.strides, entry.offset)
            tensor = view.clone(memory_format=torch.contiguous_format)
        tensors[entry.name] = tensor
    return Reading(tensors, checksum, num_bytes, samples)


def sample_checksum(entries: Sequence[TensorEntry]) -> int:
    """Returns the CRC-32 of a few bytes from the middle of every tensor, or of some where there are many.

    That distinguishes two trained models of one shape, and reads almost nothing.
    """
    parts = (part for entry in entries[_sampling(len(entries))] for part in _stored_parts(entry.whole or entry))
    return zlib.crc32(b"".join(_read_middle(part) for part in parts))


def check_finite(tensors: dict[str, Tensor], where: str) -> None:
    """Raises CheckpointError naming the first tensor that holds NaN or infinity. where: the message's beginning."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
            finite = torch.isfinite(tensor.float())
            count = int(tensor.numel() - finite.sum())
            if count:
                raise CheckpointError(
                    f"{where}: tensor {name} holds {count} values that are NaN or infinite; repair the source"
                )


def _sampling(num_tensors: int) -> slice:
    return slice(None, None, num_tensors // _MAX_SAMPLED_TENSORS + 1)


def _read_middle(entry: TensorEntry) -> bytes:
    middle = _middle(entry.stop - entry.start)
    return bytes(_read_range(entry, entry.start + middle.start, entry.start + middle.stop).numpy().data)


def _middle(num_bytes: int) -> slice:
    start = max(num_bytes - _SAMPLE_BYTES, 0) // 2
    return slice(start, min(start + _SAMPLE_BYTES, num_bytes))


def _stored_parts(entry: TensorEntry) -> tuple[TensorEntry, ...]:
    """Returns where the bytes of a tensor lie: its values, then its scales if it has any."""
    return (entry, *entry.packing.parts) if entry.packing else (entry,)


def _read_range(entry: TensorEntry, start: int, stop: int) -> Tensor:
    """Returns bytes of the file of `entry`: (stop - start,) uint8."""
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


def _decode(stored: list[Tensor], entry: TensorEntry) -> Tensor:
    """Returns the tensor of `entry`. stored: the bytes of its values and of its scales, each (n,) uint8."""
    packing, values = entry.packing, stored[0]
    if packing is None:
        return _as_tensor(values, entry, entry.dtype)
    if packing.dtype in DTYPES:
        values = _as_tensor(values, entry, packing.dtype)
    parts = [_as_tensor(data, part, part.dtype) for data, part in zip(stored[1:], packing.parts, strict=True)]
    return FORMATS[packing.format].dequantize(entry, values, parts)


def _as_tensor(data: Tensor, entry: TensorEntry, dtype: str) -> Tensor:
    values = data.view(DTYPES[dtype])
    if entry.strides is None:
        return values.reshape(entry.shape)
    return values.as_strided(entry.shape, entry.strides).contiguous()
