"""Plans for a model of which only config.json is there: the index of the checkpoint that it describes."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from transformers import PretrainedConfig

from awqdist.checkpoint.experts import FusedExperts, fused_experts, split_experts
from awqdist.checkpoint.index import DTYPE_NAMES, CheckpointIndex, Packing, TensorEntry
from awqdist.checkpoint.sources import FORMATS, MXFP4_BLOCK, Quantization, declared_quantization
from awqdist.export.formats import output_format
from awqdist.model.names import DiskTensor, disk_layout
from awqdist.model.skeleton import build_model, build_skeleton, read_config
from awqdist.recipe import Recipe
from awqdist.run.job import Job, check_budget, planned, prepare
from awqdist.settings import RunSettings


def prepare_to_plan(recipe: Recipe, settings: RunSettings, device: torch.device) -> Job:
    """Prepares a job to plan with, not to run.

    Args:
        recipe: What is done to the weights.
        settings: `model` may be a folder or a config.json alone.
        device: What is planned for; it need not be there.

    Raises:
        AwqdistError: Whatever `prepare` raises.
    """
    check_budget(settings, device)
    if settings.model.is_dir():
        prepared = prepare(recipe, replace(settings, device="cpu", gpu_memory=None))
        return replace(prepared, settings=settings, device=device)
    output_format(settings.format).check(recipe)
    config = read_config(settings.model)
    index = index_of_config(settings.model, config)
    return planned(build_skeleton(config, index.entries), index, recipe, settings, device)


def index_of_config(file: Path, config: PretrainedConfig) -> CheckpointIndex:
    """The tensors that a checkpoint of `file`, a config.json, holds; linears in FP8, or experts in MXFP4, with their scales where it
    says so.

    Raises ModelError if transformers cannot tell, and CheckpointError for a quantization that cannot be read.
    """
    quantization = declared_quantization(file)
    if quantization is not None and config.dtype is None:  # as the reader takes it
        config = deepcopy(config)
        config.dtype = torch.bfloat16
    layout = disk_layout(build_model(config))
    families = fused_experts(config.model_type)
    stored = CheckpointIndex(file.parent, {name: _entry(file, name, layout[name], quantization) for name in layout})
    if quantization is not None and quantization.format == "MXFP4":
        stored = FORMATS["MXFP4"].join(_with_mxfp4(stored, families), quantization, families)
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
        shape = (experts, rows, columns // MXFP4_BLOCK)
        scales = TensorEntry(f"{name}_scales", entry.file, "U8", shape, 0, prod(shape))
        blocks = TensorEntry(
            f"{name}_blocks", entry.file, "U8", (*shape, MXFP4_BLOCK // 2), 0, prod(shape) * MXFP4_BLOCK // 2
        )
        entries |= {blocks.name: blocks, scales.name: scales}
    return replace(index, entries=entries)


def _entry(file: Path, name: str, tensor: DiskTensor, quantization: Quantization | None) -> TensorEntry:
    dtype, width = DTYPE_NAMES[tensor.dtype], tensor.dtype.itemsize
    num_values = prod(tensor.shape)
    if (
        quantization is None
        or quantization.format == "MXFP4"
        or not tensor.is_linear
        or not quantization.covers(name.removesuffix(".weight"))
    ):
        return TensorEntry(name, file, dtype, tensor.shape, 0, num_values * width)
    rows, columns = tensor.shape
    block = quantization.block or (1, columns)
    blocks = -(-rows // block[0]), -(-columns // block[1])
    scale = TensorEntry(f"{name}_scale_inv", file, "F32", blocks, 0, 4 * blocks[0] * blocks[1])
    return TensorEntry(name, file, dtype, tensor.shape, 0, num_values, None, Packing("FP8", "F8_E4M3", (scale,), block))
