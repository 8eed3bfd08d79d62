"""The index of a checkpoint that is not there: from its config.json alone, for `awqdist plan`. Nothing can be read through it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from transformers import PretrainedConfig

from awqdist.checkpoint.experts import join_mxfp4, split_experts
from awqdist.checkpoint.index import DTYPES, CheckpointIndex, Packing, TensorEntry
from awqdist.checkpoint.mxfp4 import BLOCK
from awqdist.checkpoint.source import Quantization, declared_quantization
from awqdist.layouts import FusedExperts, fused_experts
from awqdist.model.disk_layout import DiskTensor, disk_layout

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def index_of_config(file: Path, config: PretrainedConfig) -> CheckpointIndex:
    """The tensors that a checkpoint of `file`, a config.json, holds; linears in FP8, or experts in MXFP4, with their scales where it
    says so.

    Raises ModelError if transformers cannot tell, and CheckpointError for a quantization that cannot be read.
    """
    quantization = declared_quantization(file)
    if quantization is not None and config.dtype is None:  # as the reader takes it
        config = deepcopy(config)
        config.dtype = torch.bfloat16
    layout = disk_layout(config)
    families = fused_experts(config.model_type)
    stored = CheckpointIndex(file.parent, {name: _entry(file, name, layout[name], quantization) for name in layout})
    if quantization is not None and quantization.is_mxfp4:
        dtype = next(entry.dtype for name, entry in stored.entries.items() if any(f.leaf(name) for f in families))
        return split_experts(join_mxfp4(_with_mxfp4(stored, families), families, dtype), families)
    return split_experts(stored, families)


def _with_mxfp4(index: CheckpointIndex, families: Sequence[FusedExperts]) -> CheckpointIndex:
    """The index with blocks and scales in place of the weights of experts."""
    entries: dict[str, TensorEntry] = {}
    for name, entry in index.entries.items():
        fused = next((f for f in families if f.leaf(name) == "weight"), None)
        if fused is None:
            entries[name] = entry
            continue
        experts, *sizes = entry.shape
        rows, columns = reversed(sizes) if fused.layout.transposed else sizes
        shape = (experts, rows, columns // BLOCK)
        scales = TensorEntry(f"{name}_scales", entry.file, "U8", shape, 0, prod(shape))
        blocks = TensorEntry(f"{name}_blocks", entry.file, "U8", (*shape, BLOCK // 2), 0, prod(shape) * BLOCK // 2)
        entries |= {blocks.name: blocks, scales.name: scales}
    return replace(index, entries=entries)


def _entry(file: Path, name: str, tensor: DiskTensor, quantization: Quantization | None) -> TensorEntry:
    dtype, width = _NAMES[tensor.dtype], tensor.dtype.itemsize
    num_values = prod(tensor.shape)
    if (
        quantization is None
        or quantization.is_mxfp4
        or not tensor.is_linear
        or not quantization.covers(name.removesuffix(".weight"))
    ):
        return TensorEntry(name, file, dtype, tensor.shape, 0, num_values * width)
    rows, columns = tensor.shape
    block = quantization.block or (1, columns)
    blocks = -(-rows // block[0]), -(-columns // block[1])
    scale = TensorEntry(f"{name}_scale_inv", file, "F32", blocks, 0, 4 * blocks[0] * blocks[1])
    return TensorEntry(name, file, dtype, tensor.shape, 0, num_values, None, Packing("F8_E4M3", scale, block))
