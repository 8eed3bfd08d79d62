"""Maps every tensor of a checkpoint folder to its file, dtype, shape and byte range; reads headers, never data.

Two containers are read. safetensors (https://github.com/huggingface/safetensors#format): 8 bytes of little-endian header length, a JSON
header, the data. torch's pickles, a zip archive with an uncompressed record per storage
(https://docs.pytorch.org/docs/stable/notes/serialization.html): torch's own unpickler for weights (`weights_only`) runs under
FakeTensorMode, which makes tensors without data and notes where in the file each storage begins.

Every file is checked against its header here, so that a truncated shard stops a run before its first layer.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from awqdist.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_PICKLED_INDEX_FILE = "pytorch_model.bin.index.json"
_PICKLED_SINGLE_FILE = "pytorch_model.bin"
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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000
_REMEDY = "download it again, or convert it to safetensors with save_pretrained"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint, as the reader returns it."""

    name: str
    file: Path
    dtype: str  # of the tensor in memory, by its name in safetensors, such as "BF16"
    shape: tuple[int, ...]
    start: int  # byte offset in `file`
    stop: int
    strides: tuple[int, ...] | None = None  # in elements, where the values do not lie in the order of their rows
    packing: Packing | None = None  # how the values are stored, where the source is quantized
    whole: TensorEntry | None = None  # the tensor that is read from the file, where this entry is a view of one
    offset: int = 0  # where the view begins in `whole`, in elements

    @property
    def torch_dtype(self) -> torch.dtype:
        """Returns the dtype of the tensor in memory."""
        return DTYPES[self.dtype]

    @property
    def num_bytes(self) -> int:
        """Returns the size of the tensor in memory."""
        return prod(self.shape) * self.torch_dtype.itemsize

    @property
    def quantized(self) -> Packing | None:
        """Returns how the values are stored, where the source is quantized; a view is stored as its `whole` is."""
        return (self.whole or self).packing

    @property
    def stored_bytes(self) -> int:
        """Returns how many bytes are read from disk for this tensor; for a view, its share of the common reading."""
        if self.whole is not None:
            return self.whole.stored_bytes * prod(self.shape) // prod(self.whole.shape)
        return self.stop - self.start + (sum(part.stored_bytes for part in self.packing.parts) if self.packing else 0)


@dataclass(frozen=True, slots=True)
class Packing:
    """How a quantized tensor is stored: in which format, and with which other tensors (scales) beside its values."""

    format: str  # a key of `sources.FORMATS`, which knows how values and parts become a weight
    dtype: str  # of the stored values: a key of DTYPES, or the format's name where several values share a byte
    parts: tuple[TensorEntry, ...]  # the tensors that belong to the values, such as scales; read right after them
    block: tuple[int, int]  # rows and columns of the weight that share a scale


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """All tensors of a checkpoint folder, by their names on disk."""

    folder: Path
    entries: dict[str, TensorEntry]
    left_out: tuple[
        str, ...
    ] = ()  # stored tensors that mean nothing outside of a quantized source: activations' scales

    @property
    def stored_bytes(self) -> int:
        """Returns how many bytes a reading of all tensors takes from disk."""
        return sum(entry.stored_bytes for entry in self.entries.values())

    def fingerprint(self) -> str:
        """Returns a hash of every name, dtype, shape and position, which identifies a source without reading its data."""
        digest = hashlib.sha256()
        for name in sorted(self.entries):
            digest.update(f"{_description(self.entries[name])}\n".encode())
        return digest.hexdigest()


def holds_weights(folder: Path) -> bool:
    """Returns whether `folder` contains any weight files, complete or not."""
    return (folder / INDEX_FILE).is_file() or any(folder.glob("*.safetensors")) or _holds_pickles(folder)


def read_index(folder: Path) -> CheckpointIndex:
    """Returns the index of a folder with safetensors, or else with pickles; in one file or in shards with an index file.

    Raises:
        CheckpointError: the folder or a shard is missing, a file is damaged, or a tensor of the index file is in no shard.
    """
    if not folder.is_dir():
        raise CheckpointError(f"model folder not found: {folder}; give an existing folder or a Hugging Face hub id")
    if (folder / INDEX_FILE).is_file() or (folder / SINGLE_FILE).is_file():
        return _read_shards(folder, INDEX_FILE, SINGLE_FILE, read_header)
    if _holds_pickles(folder):
        return _read_shards(folder, _PICKLED_INDEX_FILE, _PICKLED_SINGLE_FILE, _read_pickle)
    others = sorted(path.name for path in folder.glob("*.bin")) or sorted(f.name for f in folder.glob("*.safetensors"))
    hint = f"; found {', '.join(others[:3])}, convert it to safetensors with save_pretrained" if others else ""
    raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")


def read_header(file: Path) -> list[TensorEntry]:
    """Returns the entries of one safetensors file, after checking them against the file's size.

    Raises:
        CheckpointError: the file is missing, truncated, or not safetensors.
    """
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
    entries = [_header_entry(file, 8 + length, name, info) for name, info in header.items() if name != "__metadata__"]
    end = max((entry.stop for entry in entries), default=8 + length)
    if end != size:
        raise CheckpointError(f"{file}: truncated shard: {size} bytes, its header needs {end}; download it again")
    return entries


def _header_entry(file: Path, data_start: int, name: str, info: dict[str, Any]) -> TensorEntry:
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


def _read_shards(
    folder: Path, index_file: str, single_file: str, read_entries: Callable[[Path], list[TensorEntry]]
) -> CheckpointIndex:
    """Returns the index of the shards that `index_file` names, or of the single file where there is no index file."""
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


def _weight_map(index: Path) -> dict[str, str] | None:
    """Returns the index file's map of tensor -> file, or None where there is no such file."""
    if not index.is_file():
        return None
    try:
        return {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a checkpoint index ({error!r}); download it again") from None


def _description(entry: TensorEntry) -> str:
    described = f"{entry.name}|{entry.file.name}|{entry.dtype}|{entry.shape}|{entry.start}|{entry.stop}"
    if entry.strides is not None:
        described += f"|{entry.strides}"
    if entry.packing is not None:
        parts = "|".join(map(_description, entry.packing.parts))
        described += f"|{entry.packing.dtype}|{entry.packing.block}|{parts}"
    if entry.whole is not None:
        described += f"|{entry.offset}|{_description(entry.whole)}"
    return described


def _holds_pickles(folder: Path) -> bool:
    return (folder / _PICKLED_INDEX_FILE).is_file() or (folder / _PICKLED_SINGLE_FILE).is_file()


def _read_pickle(file: Path) -> list[TensorEntry]:
    """Returns the entries of one pickled file. Nothing that a pickle may ask for is run, and no data is read."""
    try:
        _check_archive(file)
        with FakeTensorMode():
            found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"shard not found: {file}; download the checkpoint again") from None
    except CheckpointError:
        raise
    except Exception as error:  # torch raises many kinds for damaged archives and for pickles of more than tensors
        raise CheckpointError(
            f"{file}: torch.load with weights_only=True does not read it ({_unpickling_error(error)}); {_REMEDY}"
        ) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: holds a {type(found).__name__} instead of tensors by their names; {_REMEDY}")
    size = file.stat().st_size
    return [_pickled_entry(file, name, tensor, size) for name, tensor in found.items()]


def _check_archive(file: Path) -> None:
    """Raises CheckpointError unless records can be read by byte range; zipfile itself finds truncated archives."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise CheckpointError(f"{file}: its records are compressed; {_REMEDY}")
            for record in records:
                if record.filename.endswith("/byteorder") and archive.read(record) != sys.byteorder.encode():
                    raise CheckpointError(
                        f"{file}: its numbers are of another byte order than this machine's; {_REMEDY}"
                    )
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{file}: not torch's zip format, or truncated ({error}); {_REMEDY}") from None


def _pickled_entry(file: Path, name: Any, tensor: Any, size: int) -> TensorEntry:
    if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise CheckpointError(f"{file}: {name!r} is a {type(tensor).__name__}, not a tensor; {_REMEDY}")
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"{file}: tensor {name} has dtype {tensor.dtype}, which cannot be read; known: {', '.join(DTYPES)}"
        )
    storage: Any = tensor.untyped_storage()
    width, shape = tensor.element_size(), tuple(tensor.shape)
    first = tensor.storage_offset() * width
    last = sum((n - 1) * stride for n, stride in zip(shape, tensor.stride(), strict=True)) if tensor.numel() else -1
    end = first + (last + 1) * width
    start = storage._checkpoint_offset
    if start + storage.nbytes() > size or max(end, tensor.numel() * width) > storage.nbytes():
        raise CheckpointError(f"{file}: tensor {name} reaches beyond its storage or the file; {_REMEDY}")
    strides = None if tensor.is_contiguous() else tuple(tensor.stride())
    return TensorEntry(name, file, DTYPE_NAMES[tensor.dtype], shape, start + first, start + end, strides)


def _unpickling_error(error: Exception) -> str:
    """Returns what torch found, without its advice to trust the file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "GLOBAL" in line or "Unpickler" in line]
    plain = [line for line in lines if "Weights only load failed" not in line]
    return (telling or plain or [type(error).__name__])[0]
