"""The index of a checkpoint that is not there: from its config.json alone, for `awqdist plan`. Nothing can be read through it."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from awqdist.checkpoint.index import DTYPES, CheckpointIndex, Packing, TensorEntry
from awqdist.checkpoint.source import Quantization, declared_quantization
from awqdist.model.disk_layout import DiskTensor, disk_layout

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def index_of_config(file: Path, config: PretrainedConfig) -> CheckpointIndex:
    """The tensors that a checkpoint of `file`, a config.json, holds; linears in FP8 with their scales where it says so.

    Raises ModelError if transformers cannot tell, and CheckpointError for a quantization that cannot be read.
    """
    quantization = declared_quantization(file)
    layout = disk_layout(config)
    return CheckpointIndex(file.parent, {name: _entry(file, name, layout[name], quantization) for name in layout})


def _entry(file: Path, name: str, tensor: DiskTensor, quantization: Quantization | None) -> TensorEntry:
    dtype, width = _NAMES[tensor.dtype], tensor.dtype.itemsize
    num_values = 1
    for size in tensor.shape:
        num_values *= size
    if quantization is None or not tensor.is_linear or not quantization.covers(name.removesuffix(".weight")):
        return TensorEntry(name, file, dtype, tensor.shape, 0, num_values * width)
    rows, columns = tensor.shape
    block = quantization.block or (1, columns)
    blocks = -(-rows // block[0]), -(-columns // block[1])
    scale = TensorEntry(f"{name}_scale_inv", file, "F32", blocks, 0, 4 * blocks[0] * blocks[1])
    return TensorEntry(name, file, dtype, tensor.shape, 0, num_values, None, Packing("F8_E4M3", scale, block))
