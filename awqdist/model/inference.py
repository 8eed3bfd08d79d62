"""Infers the mappings of an unknown architecture: proposes them from its structure, keeps those that preserve its function.

Every norm that feeds linears is a candidate, and so is every pair of linears whose widths fit. A candidate stays if scaling by random
factors, with random weights, leaves the layer's output unchanged: that is what a mapping means. One layer of each structure is tried, in
float32, on eight tokens.

Experts are slices of one parameter that the same code runs, so that one stands for all: in the trial each has its weights times a factor
of its own, which needs the memory of one, and shows where a token went to another expert. Tokens that routers or gates of shared experts
send elsewhere than before change the output, so that these are proved to be compensated too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from awqdist.errors import ModelError
from awqdist.model.experts import FusedParameter
from awqdist.model.forward import with_buffers
from awqdist.model.mapping import HeadShape, ResolvedMapping, connect, preserves_function
from awqdist.model.skeleton import Skeleton
from awqdist.model.structure import LayerStructure, trial_calls

Group = tuple[ResolvedMapping, ...]  # one mapping, or the same of every expert


def infer_mappings(skeleton: Skeleton, structure: LayerStructure, layer: int) -> tuple[ResolvedMapping, ...]:
    """Returns the mappings of decoder layer `layer`.

    Raises:
        ModelError: none preserves the layer's function.
    """
    config = skeleton.model.config.get_text_config(decoder=True)
    module, heads = skeleton.layers[layer], HeadShape.of(config)
    experts = tuple(
        _OneForAll(f.name, f.parts[:1], f.part_shape, f.layout, f.bias, num_experts=len(f.parts))
        for f in skeleton.layer_experts(layer)
    )
    parameters = with_buffers(module, _random_parameters(module, experts), torch.device("cpu"))
    call = trial_calls(skeleton)[layer]
    hidden = torch.randn(1, 8, config.hidden_size, generator=torch.Generator().manual_seed(1))
    found: list[ResolvedMapping] = []
    for group in _candidates(structure, heads):
        tried = replace(group[0], balance=tuple(p for p in group[0].balance if f"{p}.weight" in parameters))
        taken = any(group[0].balance == mapping.balance for mapping in found)
        if not taken and preserves_function(module, parameters, [tried], hidden, call, experts):
            found += group
    if not found:
        raise ModelError(
            f"{skeleton.architecture}: no mapping known, and none found in its layers that preserves their function; "
            "give AWQModifier mappings in the recipe, or leave AWQModifier out to round without smoothing"
        )
    return tuple(found)


def _candidates(structure: LayerStructure, heads: HeadShape) -> list[Group]:
    """Returns what is tried for every site: the norm in front of it, or the linears before it, the nearest first.

    What is computed within an expert may come from that expert only.
    """
    candidates: list[Group] = []
    order = list(structure.linears)
    routed = {path: part for part in structure.routed for path in part.linears}
    for site in structure.sites:
        inner = routed.get(site[0])
        if site[0] in structure.site_norms:
            smooths = [structure.site_norms[site[0]]]
        elif inner is None:
            before = reversed(order[: order.index(site[0])])
            smooths = [path for path in before if path not in site and path not in routed]
        else:
            before = reversed(order[: order.index(site[0])])
            smooths = [p for p in before if p in routed and routed[p].expert == inner.expert == 0]
        outcomes = [connect(structure, smooth, site, heads) for smooth in smooths]
        mappings = [outcome for outcome in outcomes if isinstance(outcome, ResolvedMapping)]
        candidates += [_of_every_expert(structure, m) if m.smooth in routed else (m,) for m in mappings]
    return candidates


def _of_every_expert(structure: LayerStructure, mapping: ResolvedMapping) -> Group:
    """Returns a mapping within expert 0, and the same within the others."""
    parts = {(part.fused, part.expert): part.linears for part in structure.routed}
    place = {path: (part.fused, i) for part in structure.routed for i, path in enumerate(part.linears)}

    def counterpart(path: str, expert: int) -> str:
        fused, i = place[path]
        return parts[fused, expert][i]

    num_experts = 1 + max(part.expert for part in structure.routed if part.fused == place[mapping.smooth][0])
    return tuple(
        replace(
            mapping, smooth=counterpart(mapping.smooth, e), balance=tuple(counterpart(p, e) for p in mapping.balance)
        )
        for e in range(num_experts)
    )


class _ScaledCopies(torch.Tensor):
    """A tensor (1, …) that stands for (E, …): slice e is its only slice times a factor of its own."""

    num_experts: int

    def of(self, experts: Tensor) -> Tensor:
        """Returns the slices (n, …) of these experts (n,)."""
        factors = torch.randn(self.num_experts, generator=torch.Generator().manual_seed(0))[experts]
        return self.as_subclass(Tensor) * factors.reshape(-1, *(1,) * (self.ndim - 1))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.__getitem__ and isinstance(args[0], cls):
                return args[0].of(torch.as_tensor(args[1]).reshape(1))[0]
            whole = tree_map_only(cls, lambda copies: copies.of(torch.arange(copies.num_experts)), (args, kwargs or {}))
            return func(*whole[0], **whole[1])


@dataclass(frozen=True, slots=True)
class _OneForAll(FusedParameter):
    """A fused parameter that is made from the first expert only."""

    num_experts: int = 0

    @property
    def is_sliced(self) -> bool:
        return False

    def fuse(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        fused = FusedParameter.fuse(self, parameters)
        copies = {name: tensor.as_subclass(_ScaledCopies) for name, tensor in fused.items()}
        for tensor in copies.values():
            tensor.num_experts = self.num_experts
        return {**copies}


def _random_parameters(layer: nn.Module, experts: tuple[FusedParameter, ...]) -> Mapping[str, Tensor]:
    """Returns float32 parameters of plausible size, by unfused names."""
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    for fused in experts:
        shapes = {name: shape for name, shape in shapes.items() if name not in fused.names} | fused.shapes()
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (0.5 if len(shape) == 1 else shape[-1] ** -0.5)
        for name, shape in shapes.items()
    }
