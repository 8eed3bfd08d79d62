"""Loads a checkpoint in the pack-quantized format as a float model, with our own reader of the format.

transformers 5.17 takes no zero points of experts (`DecompressExperts`: "Asymmetric quant requires zero-point values"), so that it cannot
load what vLLM and SGLang can; and where a family's float checkpoints hold all experts in one tensor, it looks for that tensor only. What
is evaluated here is the weights that the checkpoint means; the model is transformers' own.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from awqdist.errors import CheckpointError


def has_packed_experts(folder: Path, config: Any) -> bool:
    """Whether `folder` holds experts in the pack-quantized format that transformers does not load."""
    from awqdist.checkpoint.experts import fused_experts
    from awqdist.checkpoint.index import read_index

    packed = (getattr(config, "quantization_config", None) or {}).get("format") == "pack-quantized"
    if not packed or not folder.is_dir():
        return False
    kind = "weight_packed" if fused_experts(config.model_type) else "weight_zero_point"
    return any(".experts." in name and name.endswith(f".{kind}") for name in read_index(folder).entries)


def load_dequantized(folder: Path, config: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The float32 model of `folder`, and transformers' account of the loading, which is given `options`.

    Raises CheckpointError where linears are quantized in more than one way, or a tensor of an expert is missing.
    """
    import torch
    import transformers

    from awqdist.checkpoint.experts import fused_experts, join_experts
    from awqdist.eval.float_weights import FloatWeights

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
