"""Tensors of pytorch_model.bin and its shards: where their bytes lie, without running what a pickle may ask for and without reading them.

Format: torch.save's since PyTorch 1.6, a zip archive of one pickle and an uncompressed record for every storage
(https://docs.pytorch.org/docs/stable/notes/serialization.html). torch's own unpickler for weights (`weights_only`) reads the pickle; under
FakeTensorMode it makes tensors without data, and notes where in the file each storage begins. From there on, pickled tensors are read by
byte range like all others: no file is mapped, and memory does not grow with the model.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from awqdist.checkpoint.index import DTYPES, CheckpointIndex, TensorEntry, gather
from awqdist.errors import CheckpointError

PICKLED_INDEX_FILE = "pytorch_model.bin.index.json"
PICKLED_SINGLE_FILE = "pytorch_model.bin"
_FORMAT_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_REMEDY = "download it again, or convert it to safetensors with save_pretrained"


def holds_pickles(folder: Path) -> bool:
    """Whether the folder is a checkpoint in torch's own format."""
    return (folder / PICKLED_INDEX_FILE).is_file() or (folder / PICKLED_SINGLE_FILE).is_file()


def read_pickled_index(folder: Path) -> CheckpointIndex:
    """Index of a folder with `pytorch_model.bin`, or with shards and their index. Raises CheckpointError."""
    return gather(folder, PICKLED_INDEX_FILE, PICKLED_SINGLE_FILE, read_pickle)


def read_pickle(file: Path) -> list[TensorEntry]:
    """Entries of one pickled file. Raises CheckpointError for one that is truncated, or holds anything but tensors by their names."""
    try:
        _check_archive(file)
        with FakeTensorMode():
            found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"shard not found: {file}; download the checkpoint again") from None
    except CheckpointError:
        raise
    except (
        Exception
    ) as error:  # torch raises many kinds for damaged archives, and for pickles that hold more than tensors
        raise CheckpointError(
            f"{file}: torch.load with weights_only=True does not read it ({_reason(error)}); {_REMEDY}"
        ) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: holds a {type(found).__name__} instead of tensors by their names; {_REMEDY}")
    size = file.stat().st_size
    return [_entry(file, name, tensor, size) for name, tensor in found.items()]


def _check_archive(file: Path) -> None:
    """Raises CheckpointError unless the records can be read by byte range: zipfile finds truncated archives by itself."""
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


def _entry(file: Path, name: Any, tensor: Any, size: int) -> TensorEntry:
    if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise CheckpointError(f"{file}: {name!r} is a {type(tensor).__name__}, not a tensor; {_REMEDY}")
    if tensor.dtype not in _FORMAT_NAMES:
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
    return TensorEntry(name, file, _FORMAT_NAMES[tensor.dtype], shape, start + first, start + end, strides)


def _reason(error: Exception) -> str:
    """What torch found, without its advice to trust the file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "GLOBAL" in line or "Unpickler" in line]
    plain = [line for line in lines if "Weights only load failed" not in line]
    return (telling or plain or [type(error).__name__])[0]
