"""Infers the mappings of an unknown architecture: proposes them from its structure, keeps those that preserve its function.

Every norm that feeds linears is a candidate, and so is every pair of linears whose widths fit. A candidate stays if scaling by random
factors, with random weights, leaves the layer's output unchanged: that is what a mapping means. One layer of each structure is tried, in
float32, on eight tokens.

Experts are slices of one parameter that the same code runs, so that one stands for all: in the trial each has its weights times a factor
of its own, which needs the memory of one, and shows where a token went to another expert. Tokens that routers or gates of shared experts
send elsewhere than before change the output, so that these are proved to be compensated too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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


def infer_mappings(skeleton: Skeleton, structure: LayerStructure, layer: int) -> tuple[ResolvedMapping, ...]:
    """Returns the mappings of decoder layer `layer`.

    Raises:
        ModelError: none preserves the layer's function.
    """
    config = skeleton.model.config.get_text_config(decoder=True)
    module, heads = skeleton.layers[layer], HeadShape.of(config)
    fused = skeleton.layer_experts(layer)
    experts = tuple(
        _OneForAll(f.name, f.parts[:1], f.part_shape, f.layout, f.bias, num_experts=len(f.parts)) for f in fused
    )
    parameters = with_buffers(module, _random_parameters(module, experts), torch.device("cpu"))
    call = trial_calls(skeleton)[layer]
    hidden = torch.randn(1, 8, config.hidden_size, generator=torch.Generator().manual_seed(1))
    found: list[ResolvedMapping] = []
    for group in _candidates(structure, heads, fused):
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


def _candidates(
    structure: LayerStructure, heads: HeadShape, experts: tuple[FusedParameter, ...]
) -> Iterator[tuple[ResolvedMapping, ...]]:
    """Yields what is tried for every site: the norm in front of it, or the linears before it, the nearest first.

    What is computed within an expert may come from that expert only; a mapping of expert 0 comes with the same of all others.
    """
    place = {path: (f, e, i) for f in experts for e, part in enumerate(f.parts) for i, path in enumerate(part)}

    def counterpart(path: str, expert: int) -> str:
        fused, _, number = place[path]
        return fused.parts[expert][number]

    order = list(structure.linears)
    for site in structure.sites:
        if site[0] in structure.site_norms:
            smooths = [structure.site_norms[site[0]]]
        else:
            before = order[: order.index(site[0])][::-1]
            if site[0] in place:
                smooths = [path for path in before if path in place and place[path][1] == place[site[0]][1] == 0]
            else:
                smooths = [path for path in before if path not in site and path not in place]
        for mapping in (connect(structure, smooth, site, heads) for smooth in smooths):
            if isinstance(mapping, ResolvedMapping):
                smooth, balance = mapping.smooth, mapping.balance
                every = range(len(place[smooth][0].parts)) if smooth in place else ()
                yield tuple(
                    replace(mapping, smooth=counterpart(smooth, e), balance=tuple(counterpart(p, e) for p in balance))
                    for e in every
                ) or (mapping,)


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
