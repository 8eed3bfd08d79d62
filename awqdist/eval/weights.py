"""Reads a checkpoint as the float32 weights that it means: plain, in FP8, or in the pack-quantized format.

Packed weights are unpacked by our own reader of the format, so that what is evaluated is what vLLM and SGLang load. transformers 5.17
loads no zero points of experts ("Asymmetric quant requires zero-point values"), and where a family's float checkpoints hold all experts
in one tensor it looks for that tensor only.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from awqdist.checkpoint.experts import fused_experts, join_experts
from awqdist.checkpoint.index import read_index
from awqdist.checkpoint.reader import read_tensor
from awqdist.checkpoint.sources import read_source
from awqdist.errors import CheckpointError
from awqdist.export.formats import CompressedTensorsFormat
from awqdist.recipe import WeightScheme

_KINDS = ("packed", "scale", "zero_point", "shape")


class FloatWeights:
    """Reads the tensors of a checkpoint one at a time, as float32. `names` are theirs, as if none was packed.

    Args:
        folder: The checkpoint.
        quantization: `quantization_config` of its config.json, if there is one.

    Raises:
        CheckpointError: The checkpoint cannot be read, or its linears are packed in more than one way.
    """

    def __init__(self, folder: Path, quantization: dict[str, Any] | None) -> None:
        packed = (quantization or {}).get("format") == "pack-quantized"
        self._scheme = _scheme(folder, quantization) if quantization and packed else None
        self._entries = (read_index(folder) if packed else read_source(folder)).entries
        ends = tuple(f".weight_{kind}" for kind in _KINDS[1:]) if packed else ()
        kept = (name for name in self._entries if not name.endswith(ends or ("\0",)))
        self.names = [name.replace(".weight_packed", ".weight") if packed else name for name in kept]

    def read(self, name: str) -> Tensor:
        """Returns the tensor in the shape that the model has it in: float32 if it is floating."""
        if name in self._entries:
            tensor = read_tensor(self._entries[name])
            return tensor.float() if tensor.is_floating_point() else tensor
        assert self._scheme is not None
        kinds = [f"weight_{kind}" for kind in _KINDS if f"{name}_{kind}" in self._entries]
        module = name.removesuffix("weight")
        parts = {kind: read_tensor(self._entries[module + kind]) for kind in kinds}
        return CompressedTensorsFormat().unpack(parts, self._scheme).dequantize().to(torch.float32)


def _scheme(folder: Path, quantization: dict[str, Any]) -> WeightScheme:
    schemes = {
        WeightScheme(w["num_bits"], w["symmetric"], w.get("group_size") or -1)
        for w in (group["weights"] for group in quantization["config_groups"].values())
    }
    if len(schemes) != 1:
        raise CheckpointError(f"model {folder}: packed linears of {len(schemes)} kinds cannot be evaluated")
    return schemes.pop()


def has_packed_experts(folder: Path, config: Any) -> bool:
    """Returns whether `folder` holds experts in the pack-quantized format, which transformers does not load."""
    packed = (getattr(config, "quantization_config", None) or {}).get("format") == "pack-quantized"
    if not packed or not folder.is_dir():
        return False
    kind = "weight_packed" if fused_experts(config.model_type) else "weight_zero_point"
    return any(".experts." in name and name.endswith(f".{kind}") for name in read_index(folder).entries)


def load_dequantized(folder: Path, config: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the float32 model of `folder`, and transformers' account of the loading.

    Args:
        folder: A checkpoint in the pack-quantized format.
        config: Its configuration.
        **options: Passed on to transformers' `from_pretrained`.

    Raises:
        CheckpointError: Linears are packed in more than one way, or a tensor of an expert is missing.
    """
    weights = FloatWeights(folder, config.quantization_config)
    state = {name: weights.read(name) for name in weights.names}
    try:
        state = join_experts(state, fused_experts(config.model_type))
    except KeyError as error:
        raise CheckpointError(f"model {folder}: tensor {error.args[0]} is missing; run awqdist verify") from None
    plain = deepcopy(config)
    del plain.quantization_config
    kind = getattr(transformers, config.architectures[0])  # the Auto classes load folders only
    found: tuple[Any, dict[str, Any]] = kind.from_pretrained(
        None, config=plain, state_dict=state, dtype=torch.float32, output_loading_info=True, **options
    )
    return found
