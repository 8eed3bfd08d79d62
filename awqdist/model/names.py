"""Translates between names on disk and names in transformers' modules: its renamings, its fusing of experts, its dtypes.

On disk each expert's linears are tensors of their own (`mlp.experts.3.gate_proj.weight`), or are read as if they were. Transformers'
conversions tell which 3-D parameter of the model they belong to; `checkpoint.experts` does for families that store that parameter itself.
`disk_layout` goes the other way: it tells what a checkpoint of a model holds, without any weights.

transformers' private loading API is used in this file only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from awqdist.checkpoint.experts import ROWS, ExpertLayout, fused_experts, place_of
from awqdist.errors import CheckpointError, ModelError, first_line
from awqdist.model.experts import FusedParameter


@dataclass(frozen=True, slots=True)
class _Fusing:
    """How linears of experts become the 3-D parameter `name`."""

    name: str
    linears: tuple[str, ...]  # of one expert, in their order
    layout: ExpertLayout = ROWS
    bias: str | None = None  # the parameter of their biases

    def path(self, expert: int, linear: str) -> str:
        """Returns the unfused name of a linear."""
        return f"{self.name.rpartition('.')[0]}.{expert}.{linear}"


_Part = tuple[_Fusing, int, str, str]  # a tensor of an expert: which expert, which linear, "weight" or "bias"
_STACKING = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])  # `ROWS` does the same


class _Renamings:
    """Translates on-disk names by transformers' conversions of one model, and by the families of `checkpoint.experts`."""

    def __init__(self, model: PreTrainedModel) -> None:
        conversions = get_model_conversion_mapping(model)
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self._by_pattern = {pattern: c for c in self._converters for pattern in c.source_patterns}
        self._stored_fused = fused_experts(model.config.model_type)
        self._prefix = model.base_model_prefix
        self._model = type(model).__name__
        self._renamed: dict[str, tuple[str, str | None]] = {}
        self.state = model.state_dict()

    def rename(self, disk: str) -> tuple[str, str | None]:
        """Returns the name in the model, and the pattern of the converter that takes the tensor up, if there is one."""
        if disk not in self._renamed:
            name, pattern = rename_source_key(disk, self._renamings, self._converters, self._prefix, self.state)
            as_it_is = name not in self.state and disk in self.state
            self._renamed[disk] = (disk, None) if as_it_is else (name, pattern)
        return self._renamed[disk]

    def part(self, disk: str) -> _Part | None:
        """Returns what tensor `disk` is of an expert, or None if it is of none."""
        place = place_of(disk, self._stored_fused)
        if place is None:
            return self._converted(disk)
        fused = place.fused
        name = self.rename(place.prefix + fused.stored)[0]
        bias = self.rename(place.prefix + fused.bias)[0] if fused.bias else None
        fusing = _Fusing(name, fused.linears, fused.computed or fused.layout, bias)
        return (fusing, place.expert, fused.linears[place.linear], place.leaf) if name in self.state else None

    def _converted(self, disk: str) -> _Part | None:
        name, pattern = self.rename(disk)
        if pattern is None or name not in self.state:
            return None
        converter = self._by_pattern[pattern]
        operations = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
        ends = [p.rpartition("*.")[2] for p in converter.source_patterns]
        end = pattern.rpartition("*.")[2]
        number = re.search(rf"\.(\d+)\.{re.escape(end)}$", disk)
        if not number or not end.endswith(".weight") or operations not in _STACKING:
            raise self.other_layout(name, disk)
        linears = tuple(linear.removesuffix(".weight") for linear in ends)
        return _Fusing(name, linears), int(number[1]), end.removesuffix(".weight"), "weight"

    def other_layout(self, name: str, disk: str) -> ModelError:
        return ModelError(
            f"{self._model}: tensor {disk} is stored in another layout than transformers computes with ({name}), and not as"
            " one tensor per expert; such checkpoints are not supported yet"
        )


def match_names(
    model: PreTrainedModel, disk_names: Iterable[str]
) -> tuple[dict[str, str], tuple[FusedParameter, ...], tuple[str, ...]]:
    """Ties on-disk names to the parameters of `model` through transformers' own renamings.

    Returns:
        The on-disk names of parameters and buffers by their unfused names in the model, the model's 3-D parameters of experts, and the
        on-disk names that the model lacks.

    Raises:
        ModelError: a tensor is stored in a layout other than one per parameter or per expert.
        CheckpointError: an expert is missing, or there is one too many.
    """
    renamings = _Renamings(model)
    on_disk: dict[str, str] = {}
    found: dict[_Fusing, set[tuple[int, str]]] = {}  # by the 3-D parameter, the linears of experts that are there
    unknown = []
    for disk in disk_names:
        part = renamings.part(disk)
        if part is not None:
            fusing, expert, linear, leaf = part
            on_disk[f"{fusing.path(expert, linear)}.{leaf}"] = disk
            found.setdefault(fusing, set()).add((expert, linear))
            continue
        name, _ = renamings.rename(disk)
        if name not in renamings.state:
            unknown.append(disk)
        elif ".experts." in name and renamings.state[name].ndim == 3:
            raise renamings.other_layout(name, disk)
        else:
            on_disk[name] = disk
    fused = tuple(_fused(f, tuple(renamings.state[f.name].shape), linears) for f, linears in found.items())
    for parameter in fused:
        lacking = [name for name in parameter.shapes() if name not in on_disk]
        if lacking:
            raise CheckpointError(f"the checkpoint lacks the tensor for {lacking[0]} ({len(lacking)} missing in all)")
    return on_disk, fused, tuple(unknown)


def float32_names(model: PreTrainedModel) -> frozenset[str]:
    """Returns the parameters and buffers that transformers keeps in float32 whatever the model's dtype (routers, their biases)."""
    patterns = [re.compile(p.replace("*", ".*")) for p in model._get_dtype_plan(model.dtype)]
    return frozenset(
        name
        for name, tensor in model.state_dict().items()
        if tensor.dtype == torch.float32 != model.dtype or any(pattern.search(name) for pattern in patterns)
    )


def _fused(fusing: _Fusing, shape: tuple[int, ...], found: set[tuple[int, str]]) -> FusedParameter:
    """Returns the parameter of that shape. Raises CheckpointError unless the linears found are those of all its experts."""
    every = [(expert, linear) for expert in range(shape[0]) for linear in fusing.linears]
    missing = [pair for pair in every if pair not in found]
    if missing or len(found) != len(every):
        expert, linear = missing[0] if missing else max(found)
        raise CheckpointError(
            f"{fusing.name.rpartition('.')[0]}: config.json asks for {shape[0]} experts, and the checkpoint"
            f" {'lacks' if missing else 'has'} {linear}.weight of expert {expert}"
        )
    parts = tuple(tuple(fusing.path(e, linear) for linear in fusing.linears) for e in range(shape[0]))
    rows, columns = fusing.layout.parts(shape[1:], len(fusing.linears))[0].shape
    return FusedParameter(fusing.name, parts, (rows, columns), fusing.layout, fusing.bias)


@dataclass(frozen=True, slots=True)
class DiskTensor:
    """A tensor as a checkpoint holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_linear: bool  # the weight of a linear within the decoder layers, which is what FP8 checkpoints quantize


def disk_layout(model: PreTrainedModel) -> dict[str, DiskTensor]:
    """Returns the tensors that `save_pretrained` of `model` would write, by their names on disk.

    transformers' own reverse of its conversions takes back renamings and the fusing of experts, on the meta device. Layers for
    multi-token prediction, which its models lack, are added as DeepSeek-V3, Kimi-K2 and GLM-4.5 publish them: a decoder layer like the last
    one with embeddings, a head and a projection of its own (https://huggingface.co/deepseek-ai/DeepSeek-V3, README_WEIGHTS.md).

    Args:
        model: on the meta device, as `build_model` returns it.

    Raises:
        ModelError: transformers cannot tell how the model is stored.
    """
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
    return {**layout, **dict(_prediction_layers(model.config.get_text_config(decoder=True), layout))}


def _not_linear(model: PreTrainedModel) -> set[str]:
    """Returns the names of matrices that are no linears of decoder layers: embeddings, routers, the output head."""
    head = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if "weight" in module._parameters and (module is head or not isinstance(module, nn.Linear))
    }


def _prediction_layers(text: PretrainedConfig, layout: dict[str, DiskTensor]) -> Iterator[tuple[str, DiskTensor]]:
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
