"""How names and layouts on disk become those of transformers' modules: its renamings, its fusing of experts, its dtypes.

In memory transformers keeps all experts of a layer in 3-D parameters (`mlp.experts.gate_up_proj`); on disk each expert's linears are
tensors of their own (`mlp.experts.3.gate_proj.weight`). The weight side works on the latter, by their *unfused names*: the module that
holds the 3-D parameter, the expert's number, the linear's name on disk. The forward side gets the 3-D parameter, made by transformers'
own operations. Checkpoints whose experts are 3-D on disk already are refused.

transformers' private loading API is used in this file only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from awqdist.errors import CheckpointError, ModelError


@dataclass(frozen=True, slots=True)
class FusedParameter:
    """A 3-D parameter (E, R, I) of E experts.

    parts: for every expert, the linears whose weights (R / len(parts), I) lie below one another in its slice, by unfused names.
    """

    name: str
    parts: tuple[tuple[str, ...], ...]
    part_shape: tuple[int, int]
    converter: WeightConverter

    @property
    def module(self) -> str:
        """Path of the module that holds the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def is_inner(self) -> bool:
        """Whether it reads what is computed within the expert, not the expert's input."""
        return "down" in self.name.rpartition(".")[2]

    def within(self, prefix: str) -> FusedParameter:
        """The same by names without `prefix`."""
        parts = tuple(tuple(path.removeprefix(prefix) for path in expert) for expert in self.parts)
        return replace(self, name=self.name.removeprefix(prefix), parts=parts)

    def fuse(self, parameters: dict[str, Tensor]) -> Tensor:
        """Takes the weights of the parts (O, I) out of `parameters` and makes the parameter (E, R, I) of them, in their dtype."""
        converter = deepcopy(self.converter)
        for expert in self.parts:
            for path, pattern in zip(expert, converter.source_patterns, strict=True):
                weight: Any = parameters.pop(f"{path}.weight")  # transformers has a future here, but takes tensors too
                converter.add_tensor(self.name, path, pattern, weight)
        (parameter,) = converter.convert(self.name).values()
        assert isinstance(parameter, Tensor)
        return parameter


@dataclass(frozen=True, slots=True)
class Names:
    """on_disk: parameter or buffer by its unfused name in the model -> name on disk; unknown: on-disk names that the model lacks."""

    on_disk: dict[str, str]
    fused: tuple[FusedParameter, ...]
    unknown: tuple[str, ...]


def fuse_experts(fused: Sequence[FusedParameter], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a module with fused experts is run with, from parameters by unfused names."""
    result = dict(parameters)
    for parameter in fused:
        result[parameter.name] = parameter.fuse(result)
    return result


def match_names(model: PreTrainedModel, disk_names: Iterable[str]) -> Names:
    """Ties on-disk names to the parameters of `model` through transformers' own renamings.

    Raises ModelError for layouts other than one tensor per parameter or per expert, and CheckpointError for a missing expert.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    state = model.state_dict()
    on_disk: dict[str, str] = {}
    parts: dict[str, dict[tuple[int, str], str]] = {}  # fused parameter -> (expert, source pattern) -> unfused module
    unknown = []
    for disk in disk_names:
        name, pattern = rename_source_key(disk, renamings, converters, model.base_model_prefix, state)
        if name not in state and disk in state:
            name, pattern = disk, None
        if name not in state:
            unknown.append(disk)
        elif pattern is None:
            on_disk[name] = disk
        else:
            expert, path = _unfused(model, name, pattern, disk)
            parts.setdefault(name, {})[expert, pattern] = path
            on_disk[f"{path}.weight"] = disk
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    fused = tuple(
        _fused(model, name, tuple(state[name].shape), found, by_pattern[next(iter(found))[1]])
        for name, found in parts.items()
    )
    return Names(on_disk, fused, tuple(unknown))


def float32_names(model: PreTrainedModel) -> frozenset[str]:
    """Parameters and buffers that transformers keeps in float32 whatever the model's dtype (routers, their biases)."""
    patterns = [re.compile(p.replace("*", ".*")) for p in model._get_dtype_plan(model.dtype)]
    return frozenset(
        name
        for name, tensor in model.state_dict().items()
        if tensor.dtype == torch.float32 != model.dtype or any(pattern.search(name) for pattern in patterns)
    )


def _unfused(model: PreTrainedModel, name: str, pattern: str, disk: str) -> tuple[int, str]:
    """The expert and the unfused module of on-disk tensor `disk`, which goes into the 3-D parameter `name`."""
    leaf = pattern.rpartition("*.")[2]
    found = re.search(rf"\.(\d+)\.{re.escape(leaf)}$", disk)
    if not found or not leaf.endswith(".weight"):
        raise _other_layout(model, name, disk)
    return int(found[1]), f"{name.rpartition('.')[0]}.{found[1]}.{leaf.removesuffix('.weight')}"


def _fused(
    model: PreTrainedModel,
    name: str,
    shape: tuple[int, ...],
    found: Mapping[tuple[int, str], str],
    converter: WeightConverter,
) -> FusedParameter:
    patterns = converter.source_patterns
    operations = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
    if operations not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]) or len(shape) != 3:
        raise _other_layout(model, name, next(iter(found.values())))
    missing = [(e, pattern) for e in range(shape[0]) for pattern in patterns if (e, pattern) not in found]
    if missing or len(found) != shape[0] * len(patterns):
        expert, pattern = missing[0] if missing else max(found)
        raise CheckpointError(
            f"{name.rpartition('.')[0]}: config.json asks for {shape[0]} experts, and the checkpoint"
            f" {'lacks' if missing else 'has'} {pattern.rpartition('*.')[2]} of expert {expert}"
        )
    parts = tuple(tuple(found[e, pattern] for pattern in patterns) for e in range(shape[0]))
    return FusedParameter(name, parts, (shape[1] // len(patterns), shape[2]), converter)


def _other_layout(model: PreTrainedModel, name: str, disk: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__}: tensor {disk} is stored in another layout than transformers computes with ({name}), and not as"
        " one tensor per expert; such checkpoints are not supported yet"
    )
