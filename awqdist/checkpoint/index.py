"""Where each tensor of a checkpoint lies: name -> file, dtype, shape, byte range. Nothing but headers is read.

Format: https://github.com/huggingface/safetensors#format — 8 bytes little-endian header length, a JSON header, the data.
Every file is checked against its header here, so that a truncated shard stops a run before its first layer.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from awqdist.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MXFP4 = "MXFP4"  # the dtype of a packing: two values of 4 bits in a byte, scales that are exponents
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint, as the reader gives it. dtype: the format's name, such as "BF16".

    `start` and `stop` are byte offsets in the file. A tensor whose source is quantized lies there in another dtype, and its scales
    elsewhere: `packing` says how. One that shares its bytes with others is a view of `whole`, which is what is read of the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    strides: tuple[int, ...] | None = None  # in elements, of tensors that do not lie in the order of their rows
    packing: Packing | None = None
    whole: TensorEntry | None = None
    offset: int = 0  # in `whole`, in elements

    @property
    def num_bytes(self) -> int:
        """Of the tensor in memory."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def quantized(self) -> Packing | None:
        """How its values are stored, where the source is quantized."""
        return (self.whole or self).packing

    @property
    def stored_bytes(self) -> int:
        """What is read of the disk to have the tensor; its share of it where others are had by the same reading."""
        if self.whole is not None:
            return self.whole.stored_bytes * prod(self.shape) // prod(self.whole.shape)
        return self.stop - self.start + (self.packing.scale.stored_bytes if self.packing else 0)


@dataclass(frozen=True, slots=True)
class Packing:
    """How a quantized tensor is stored: tensor[i, j] = stored[i, j] · scale[i // block[0], j // block[1]].

    dtype: one of DTYPES, or MXFP4.
    """

    dtype: str
    scale: TensorEntry
    block: tuple[int, int]

    @property
    def kind(self) -> str:
        return MXFP4 if self.dtype == MXFP4 else "FP8"


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """All tensors of a checkpoint folder, by their on-disk names. left_out: stored tensors that have no meaning outside of the quantized
    source, such as scales of activations."""

    folder: Path
    entries: dict[str, TensorEntry]
    left_out: tuple[str, ...] = ()

    @property
    def stored_bytes(self) -> int:
        return sum(entry.stored_bytes for entry in self.entries.values())

    def under(self, prefix: str) -> list[TensorEntry]:
        """Entries whose name begins with `prefix`, in the order in which they lie on disk."""
        found = [entry for name, entry in self.entries.items() if name.startswith(prefix)]
        return sorted(found, key=lambda entry: (entry.file.name, entry.start))

    def fingerprint(self) -> str:
        """Hash of every name, dtype, shape and position: what a source checkpoint is, without reading its data."""
        digest = hashlib.sha256()
        for name in sorted(self.entries):
            digest.update(f"{_described(self.entries[name])}\n".encode())
        return digest.hexdigest()


def read_index(folder: Path) -> CheckpointIndex:
    """Index of a folder with `model.safetensors`, or with shards and `model.safetensors.index.json`.

    Raises CheckpointError for a missing folder or shard, a truncated file, and a tensor that the index promises and no shard has.
    """
    if not folder.is_dir():
        raise CheckpointError(f"model folder not found: {folder}; give an existing folder or a Hugging Face hub id")
    if not (folder / INDEX_FILE).is_file() and not (folder / SINGLE_FILE).is_file():
        others = _names(folder.glob("*.bin")) or _names(folder.glob("*.safetensors"))
        hint = f"; found {', '.join(others[:3])}, convert it to safetensors with save_pretrained" if others else ""
        raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
    return gather(folder, INDEX_FILE, SINGLE_FILE, read_header)


def gather(
    folder: Path, index_file: str, single_file: str, read_entries: Callable[[Path], list[TensorEntry]]
) -> CheckpointIndex:
    """Index of the shards that `index_file` names, or of the single file where there is none. read_entries: of one file.

    Raises CheckpointError for a broken index file, and for a tensor that it promises and no shard has.
    """
    promised = _weight_map(folder / index_file)
    files = sorted(set(promised.values())) if promised is not None else [single_file]
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for entry in read_entries(folder / file):
            if promised is None or promised.get(entry.name) == file:
                entries[entry.name] = entry
    missing = [name for name in promised or () if name not in entries]
    if missing:
        raise CheckpointError(
            f"{folder / index_file} promises tensor {missing[0]} in {(promised or {})[missing[0]]}, which does not hold it"
            f" ({len(missing)} tensors missing in all); download the checkpoint again"
        )
    return CheckpointIndex(folder, entries)


def read_header(file: Path) -> list[TensorEntry]:
    """Entries of one safetensors file, checked against the file's size. Raises CheckpointError."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{file}: truncated or not safetensors: header of {length} bytes in {size} bytes")
            header = json.loads(stream.read(length))
            if not isinstance(header, dict):
                raise ValueError("its header is not a JSON object")
    except FileNotFoundError:
        raise CheckpointError(f"shard not found: {file}; download the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from None
    except (struct.error, ValueError) as error:
        raise CheckpointError(f"{file}: not a safetensors file ({error}); download it again") from None
    entries = [_entry(file, 8 + length, name, info) for name, info in header.items() if name != "__metadata__"]
    end = max((entry.stop for entry in entries), default=8 + length)
    if end != size:
        raise CheckpointError(f"{file}: truncated shard: {size} bytes, its header needs {end}; download it again")
    return entries


def _entry(file: Path, data_start: int, name: str, info: dict[str, Any]) -> TensorEntry:
    try:
        start, stop = (int(offset) for offset in info["data_offsets"])
        dtype, shape = str(info["dtype"]), tuple(int(n) for n in info["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: the header's entry of {name} is damaged ({error!r}); download it again"
        ) from None
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name} has dtype {dtype}, which cannot be read; known: {', '.join(DTYPES)}"
        )
    num_bytes = prod(shape) * DTYPES[dtype].itemsize
    if start < 0 or stop - start != num_bytes:
        raise CheckpointError(
            f"{file}: tensor {name} takes {num_bytes} bytes, its header gives {stop - start}; download it again"
        )
    return TensorEntry(name, file, dtype, shape, data_start + start, data_start + stop)


def _weight_map(index: Path) -> dict[str, str] | None:
    """The index file's tensor -> file, or None where there is no such file."""
    if not index.is_file():
        return None
    try:
        return {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a checkpoint index ({error!r}); download it again") from None


def _described(entry: TensorEntry) -> str:
    described = f"{entry.name}|{entry.file.name}|{entry.dtype}|{entry.shape}|{entry.start}|{entry.stop}"
    if entry.strides is not None:
        described += f"|{entry.strides}"
    if entry.packing is not None:
        described += f"|{entry.packing.dtype}|{entry.packing.block}|{_described(entry.packing.scale)}"
    if entry.whole is not None:
        described += f"|{entry.offset}|{_described(entry.whole)}"
    return described


def _names(paths: Iterable[Path]) -> list[str]:
    return sorted(path.name for path in paths)
