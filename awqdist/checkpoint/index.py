"""Where each tensor of a checkpoint lies: name -> file, dtype, shape, byte range. Nothing but headers is read.

Format: https://github.com/huggingface/safetensors#format — 8 bytes little-endian header length, a JSON header, the data.
Every file is checked against its header here, so that a truncated shard stops a run before its first layer.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
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
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor on disk. `start` and `stop` are byte offsets in the file; dtype is the format's name, such as "BF16"."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """All tensors of a checkpoint folder, by their on-disk names."""

    folder: Path
    entries: dict[str, TensorEntry]

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries.values())

    def under(self, prefix: str) -> list[TensorEntry]:
        """Entries whose name begins with `prefix`, in the order in which they lie on disk."""
        found = [entry for name, entry in self.entries.items() if name.startswith(prefix)]
        return sorted(found, key=lambda entry: (entry.file.name, entry.start))

    def fingerprint(self) -> str:
        """Hash of every name, dtype, shape and position: what a source checkpoint is, without reading its data."""
        digest = hashlib.sha256()
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(f"{name}|{entry.file.name}|{entry.dtype}|{entry.shape}|{entry.start}|{entry.stop}\n".encode())
        return digest.hexdigest()


def read_index(folder: Path) -> CheckpointIndex:
    """Index of a folder with `model.safetensors`, or with shards and `model.safetensors.index.json`.

    Raises CheckpointError for a missing folder or shard, a truncated file, and a tensor that the index promises and no shard has.
    """
    if not folder.is_dir():
        raise CheckpointError(f"model folder not found: {folder}; give an existing folder or a Hugging Face hub id")
    promised = _weight_map(folder)
    files = sorted(set(promised.values())) if promised is not None else [SINGLE_FILE]
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for entry in read_header(folder / file):
            if promised is None or promised.get(entry.name) == file:
                entries[entry.name] = entry
    missing = [name for name in promised or () if name not in entries]
    if missing:
        raise CheckpointError(
            f"{folder / INDEX_FILE} promises tensor {missing[0]} in {(promised or {})[missing[0]]}, which does not hold it"
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


def _weight_map(folder: Path) -> dict[str, str] | None:
    """The index file's tensor -> file, or None for a checkpoint in a single file."""
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            return {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a checkpoint index ({error!r}); download it again") from None
    if (folder / SINGLE_FILE).is_file():
        return None
    others = _names(folder.glob("*.bin")) or _names(folder.glob("*.safetensors"))
    hint = f"; found {', '.join(others[:3])}, convert it to safetensors with save_pretrained" if others else ""
    raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")


def _names(paths: Iterable[Path]) -> list[str]:
    return sorted(path.name for path in paths)
