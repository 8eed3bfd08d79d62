"""The tensors that a checkpoint of a configuration holds: what `save_pretrained` of its model would write, told without any weights.

Renamings and the fusing of experts are taken back by transformers' own reverse of what it does on loading, on the meta device. Layers for
multi-token prediction, which transformers' models lack, are published by DeepSeek-V3, Kimi-K2 and GLM-4.5 as a decoder layer like the last
one with embeddings, a head and a projection of its own (https://huggingface.co/deepseek-ai/DeepSeek-V3, README_WEIGHTS.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from awqdist.errors import ModelError
from awqdist.model.skeleton import build_model, first_line


@dataclass(frozen=True, slots=True)
class DiskTensor:
    """is_linear: whether it is the weight of a linear within the decoder layers, which is what FP8 checkpoints quantize."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_linear: bool


def disk_layout(config: PretrainedConfig) -> dict[str, DiskTensor]:
    """On-disk name -> tensor of a checkpoint of `config`. Raises ModelError if transformers cannot build the model or name its tensors."""
    model = build_model(config)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    try:
        stored = revert_weight_conversion(model, state)
    except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"transformers cannot tell how {type(model).__name__} is stored ({first_line(error)}); give a folder with weights"
        ) from None
    plain = {id(state[name]) for name in _not_linear(model) if name in state}  # names may change, the tensors do not
    layout = {
        name: DiskTensor(
            tuple(tensor.shape), tensor.dtype, tensor.ndim == 2 and name.endswith(".weight") and id(tensor) not in plain
        )
        for name, tensor in stored.items()
    }
    return {**layout, **dict(_prediction_layers(config, layout))}


def _not_linear(model: PreTrainedModel) -> set[str]:
    """Names of matrices that are no linears of decoder layers: embeddings, routers, the output head."""
    head = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if "weight" in module._parameters and (module is head or not isinstance(module, nn.Linear))
    }


def _prediction_layers(config: PretrainedConfig, layout: dict[str, DiskTensor]) -> Iterator[tuple[str, DiskTensor]]:
    text = config.get_text_config(decoder=True)
    num_layers, hidden = int(text.num_hidden_layers), int(text.hidden_size)
    last, head = f"model.layers.{num_layers - 1}.", layout.get("lm_head.weight")
    for number in range(num_layers, num_layers + int(getattr(text, "num_nextn_predict_layers", None) or 0)):
        layer = f"model.layers.{number}."
        yield from ((layer + name[len(last) :], tensor) for name, tensor in layout.items() if name.startswith(last))
        if head is None:
            continue
        yield from ((f"{layer}{name}", head) for name in ("embed_tokens.weight", "shared_head.head.weight"))
        yield f"{layer}eh_proj.weight", DiskTensor((hidden, 2 * hidden), head.dtype, is_linear=False)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield f"{layer}{norm}.weight", DiskTensor((hidden,), head.dtype, is_linear=False)
