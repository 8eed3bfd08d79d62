"""Resolves or infers mappings (which output is smoothed, which linears read it), applies them, proves that the function is kept.

A pattern names on-disk modules, as in llm-compressor (`re:` patterns or exact names). Resolving ties it to one layer's structure: the
whole input site is compensated whatever the pattern lists, since every consumer of a smoothed tensor must be.

`infer_mappings` proposes the mappings of an architecture that is not in the table, and keeps those that preserve its function.

`SmoothedParameters` holds a layer's parameters under the scales of its mappings. The proof runs the layer before and after and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from awqdist.errors import ModelError, RecipeError
from awqdist.model.experts import FusedParameter, fuse_experts, made_experts
from awqdist.model.forward import LayerCall, forward_layer, with_buffers
from awqdist.model.skeleton import Skeleton
from awqdist.model.structure import LayerStructure, trial_calls
from awqdist.quant.precision import read_value
from awqdist.quant.smooth import balance_linear, per_source, smooth_linear, smooth_norm
from awqdist.recipe import MappingPattern, matches

TOLERANCE = 1e-4  # of the proof: relative, float32


@dataclass(frozen=True, slots=True)
class HeadShape:
    """How attention reads its projections."""

    num_heads: int  # of queries
    num_kv_heads: int
    head_dim: int  # values per head
    clipped: bool = False  # queries, keys and values are clamped (`clip_qkv` of Olmo, DBRX): they cannot be scaled
    latent: tuple[int, int] | None = None  # rows of keys and values per head in latent attention's up-projection
    squared: bool = False  # MLPs without a gate square what ReLU lets pass

    @classmethod
    def of(cls, config: object) -> HeadShape:
        """Returns the shape that a transformers text config describes."""
        heads = int(getattr(config, "num_attention_heads", 1))
        kv_heads = getattr(config, "num_key_value_heads", None)
        head_dim = getattr(config, "head_dim", None) or int(getattr(config, "hidden_size", heads)) // heads
        latent = tuple(int(getattr(config, name, None) or 0) for name in ("qk_nope_head_dim", "v_head_dim"))
        clipped = getattr(config, "clip_qkv", None) is not None
        squared = "relu2" in (getattr(config, "mlp_hidden_act", None), getattr(config, "hidden_act", None))
        per_head = (latent[0], latent[1]) if latent[1] else None
        return cls(heads, int(kv_heads or heads), int(head_dim), clipped, per_head, squared)


@dataclass(frozen=True, slots=True)
class ResolvedMapping:
    """A mapping within one layer. Paths are within the layer."""

    smooth: str
    balance: tuple[str, ...]  # a whole input site
    norm: bool  # the smooth layer is a norm; otherwise it is a linear, whose last rows are divided
    unit_offset: bool  # the norm multiplies by (1 + weight)
    source: tuple[int, int, int] | None  # (kv heads, query heads per kv head, head_dim); None: i comes from row i
    rows_before: int = 0  # of each head in the smooth linear, in front of the rows that the channels come from
    rows_after: int = 0  # of the whole smooth linear, behind those rows
    power: int = 1  # that the smooth linear's outputs are raised to on their way to the balance layers

    def source_channels(self, num_inputs: int) -> Tensor:
        """Returns the smooth layer's output channel, (I,) int64, that each input channel of the balance layers comes from."""
        if self.source is None:
            return torch.arange(num_inputs)
        kv_heads, repeats, head_dim = self.source
        return torch.arange(kv_heads * head_dim).view(kv_heads, 1, head_dim).expand(-1, repeats, -1).reshape(-1)

    def num_channels(self, num_inputs: int) -> int:
        """Returns how many output channels of the smooth layer the balance layers' inputs come from."""
        return num_inputs if self.source is None else self.source[0] * self.source[2]

    def over_rows(self, scales: Tensor) -> Tensor:
        """Returns the divisors of the smooth layer's last rows from the scales (S,) of its channels; 1 for rows without one."""
        scales = scales ** (1 / self.power)
        if self.rows_before:
            assert self.source is not None
            heads = scales.view(-1, self.source[2])  # (heads, head_dim)
            scales = torch.cat([heads.new_ones(heads.shape[0], self.rows_before), heads], 1).flatten()
        return torch.cat([scales, scales.new_ones(self.rows_after)])


@dataclass(frozen=True, slots=True)
class Resolution:
    """The mappings that apply in a layer, and (mapping, reason) for those that do not."""

    mappings: tuple[ResolvedMapping, ...]
    skipped: tuple[tuple[str, str], ...]


def resolve(
    patterns: Sequence[MappingPattern],
    structure: LayerStructure,
    disk_name: Callable[[str], str],
    heads: HeadShape,
) -> Resolution:
    """Ties `patterns` to one layer. A site is smoothed once, by the first mapping that names one of its linears.

    Args:
        patterns: in the order in which they are tried.
        structure: of the layer.
        disk_name: from a module's path in the layer to its on-disk name.
        heads: how attention reads its projections.

    Raises:
        RecipeError: a pattern's smooth layer is ambiguous.
    """
    mappings: dict[str, ResolvedMapping] = {}  # by the first linear of the site
    skipped: list[tuple[str, str]] = []
    names = {path: disk_name(path) for path in (*structure.norms, *structure.linears)}
    for pattern in patterns:
        smooths = [path for path, name in names.items() if matches(pattern.smooth_layer, name)]
        balance = [p for p in structure.linears if any(matches(b, names[p]) for b in pattern.balance_layers)]
        label = f"{pattern.smooth_layer} -> {', '.join(pattern.balance_layers)}"
        if not smooths or not balance:
            side = "smooth layer" if not smooths else "balance layer"
            skipped.append((label, f"no {side} of that name in this layer"))
            continue
        for smooth, paths in _pairs(label, smooths, balance):
            outcome = connect(structure, smooth, paths, heads)
            if isinstance(outcome, ResolvedMapping):
                earlier = mappings.setdefault(outcome.balance[0], outcome)
                if earlier is outcome:
                    continue
                outcome = (
                    f"an earlier mapping smooths the input of {', '.join(outcome.balance)} by {earlier.smooth} already"
                )
            skipped.append((label, outcome))
    return Resolution(tuple(mappings.values()), tuple(dict.fromkeys(skipped)))


def _pairs(label: str, smooths: list[str], balance: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Returns smooth layers with the balance layers that are meant.

    Where a pattern matches several, as those of experts do, layers of one parent module belong together. Raises RecipeError where
    that leaves one without a partner.
    """
    if len(smooths) == 1:
        return [(smooths[0], tuple(balance))]
    by_parent: dict[str, list[str]] = {}
    for path in balance:
        by_parent.setdefault(path.rpartition(".")[0], []).append(path)
    parents = [smooth.rpartition(".")[0] for smooth in smooths]
    if len(set(parents)) < len(parents) or set(parents) != by_parent.keys():
        raise RecipeError(
            f"mapping {label}: smooth_layer matches {len(smooths)} modules of one layer ({', '.join(smooths[:4])})"
        )
    return [(smooth, tuple(by_parent[parent])) for smooth, parent in zip(smooths, parents, strict=True)]


def connect(
    structure: LayerStructure, smooth: str, balance: tuple[str, ...], heads: HeadShape
) -> ResolvedMapping | str:
    """Returns the mapping from `smooth` to the site that the balance layers read, or the reason why there can be none."""
    sites = {structure.site_of(path) for path in balance}
    if len(sites) > 1:
        return f"{', '.join(balance)} do not read one tensor"
    site = sites.pop()
    num_inputs = structure.linears[site[0]][1]
    if smooth in structure.norms:
        if structure.site_norms.get(site[0]) != smooth:
            return f"{balance[0]} does not read the output of {smooth}"
        width = structure.norm_widths[smooth]  # a norm over each head by itself has the same weights for all heads
        source = (1, num_inputs // width, width) if width < num_inputs else None
        return ResolvedMapping(smooth, site, True, structure.norms[smooth], source)
    if site[0] in structure.site_norms:
        return f"{balance[0]} reads the output of {structure.site_norms[site[0]]}, not of {smooth}"
    num_outputs, module = structure.linears[smooth][0], smooth.rpartition(".")[0]
    siblings = module == site[0].rpartition(".")[0]
    attention = siblings and num_inputs == heads.num_heads * heads.head_dim
    value_rows = heads.num_kv_heads * heads.head_dim
    if attention and heads.clipped:
        return f"the model clamps the outputs of {smooth} (clip_qkv)"
    if siblings and heads.latent:
        keys, values = heads.latent
        if num_inputs == heads.num_heads * values and num_outputs == heads.num_heads * (keys + values):
            return ResolvedMapping(smooth, site, False, False, (heads.num_heads, 1, values), rows_before=keys)
    if num_outputs == num_inputs:
        beside = [path for path in structure.site_of(smooth) if path.rpartition(".")[0] == module]
        power = 2 if heads.squared and siblings and beside == [smooth] else 1  # an MLP without a gate
        return ResolvedMapping(smooth, site, False, False, None, power=power)
    tied = (heads.num_kv_heads, heads.num_heads // heads.num_kv_heads, heads.head_dim)
    if attention and num_outputs in (value_rows, num_inputs + 2 * value_rows):
        return ResolvedMapping(smooth, site, False, False, tied if tied[1] > 1 else None)
    if siblings and num_outputs == 2 * num_inputs:  # fused gate and up: the last half is up
        return ResolvedMapping(smooth, site, False, False, None)
    if siblings and num_outputs == 3 * num_inputs:  # a short convolution: its second third is a factor
        return ResolvedMapping(smooth, site, False, False, None, rows_after=num_inputs)
    return f"{smooth} has {num_outputs} outputs, {balance[0]} reads {num_inputs} inputs"


class SmoothedParameters(Mapping[str, Tensor]):
    """A layer's parameters after the mappings that were applied, each made when it is asked for.

    Norm weights keep their dtype; linears and biases that were changed come in float32, made anew each time. Kept, they would take
    two to four times the layer's own memory; with hundreds of experts only a few of them are needed at a time.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._changes: dict[str, list[Callable[[Tensor], Tensor]]] = {}

    def apply(self, mapping: ResolvedMapping, scales: Tensor) -> Tensor:
        """Smooths by scales (I,) over the inputs of the balance layers.

        Returns:
            The scales as applied, which a norm in 16 bits adapts to what it can store.
        """
        weight, bias = f"{mapping.smooth}.weight", f"{mapping.smooth}.bias"
        source = mapping.source_channels(scales.shape[0]).to(scales.device)
        outputs = per_source(scales, source, mapping.num_channels(scales.shape[0]))
        if mapping.norm:
            stored, applied = smooth_norm(self[weight], outputs, mapping.unit_offset)
            self._changes[weight] = [lambda _: stored]
            self._change(bias, lambda tensor: tensor.float() / applied)
            scales = applied[source]
        else:
            outputs = mapping.over_rows(outputs)
            self._change(weight, partial(smooth_linear, scales=outputs))
            self._change(bias, partial(smooth_linear, scales=outputs))
        for path in mapping.balance:
            self._change(f"{path}.weight", partial(balance_linear, scales=scales))
        return scales

    def _change(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        if name in self._parameters:
            self._changes.setdefault(name, []).append(change)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._parameters[name]
        for change in self._changes.get(name, ()):
            tensor = change(tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def change_of_output(
    layer: nn.Module,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    hidden: Tensor,
    call: LayerCall,
    experts: Sequence[FusedParameter] = (),
) -> float:
    """Returns ‖f_after(x) - f_before(x)‖ / ‖f_before(x) - x‖ in float32: the change of what the layer adds to its input.

    Experts are made one at a time where their parameter is sliced.

    Args:
        layer: the decoder layer.
        before, after: its parameters in any dtype, by unfused names.
        hidden: x, (B, L, H).
        call: the layer's further arguments.
        experts: its fused parameters.
    """
    call = call.cast(hidden.device, torch.float32, hidden.shape[0])
    hidden = hidden.float()
    first, second = (_output(layer, side, hidden, call, experts) for side in (before, after))
    contribution = (first - hidden).norm()
    return read_value((second - first).norm() / contribution.clamp(min=1e-20), 0.0)


def _output(
    layer: nn.Module, side: Mapping[str, Tensor], hidden: Tensor, call: LayerCall, experts: Sequence[FusedParameter]
) -> Tensor:
    """Returns the layer's output (B, L, H) in float32; its float32 parameters are freed on return."""
    made = [fused for fused in experts if fused.is_sliced]
    of_experts = {name for fused in made for name in fused.shapes()}
    parameters = ((name, side[name]) for name in side if name not in of_experts)
    working = {name: p.float() if p.is_floating_point() else p for name, p in parameters}
    working = fuse_experts([fused for fused in experts if fused not in made], working)
    with made_experts(made, partial(_expert_weight, side), hidden.device) as stand_ins:
        return forward_layer(layer, with_buffers(layer, {**working, **stand_ins}, hidden.device), hidden, call)


def preserves_function(
    layer: nn.Module,
    parameters: Mapping[str, Tensor],
    mappings: Sequence[ResolvedMapping],
    hidden: Tensor,
    call: LayerCall,
    experts: Sequence[FusedParameter] = (),
) -> bool:
    """Returns whether scaling by random factors between 1/64 and 64 leaves the layer's output unchanged.

    The factors are powers of two, which float32 carries without rounding, and so far apart that a clamp on the way shows.

    Args:
        layer: the decoder layer.
        parameters: by unfused names.
        mappings: those that are tried, all at once.
        hidden: (B, L, H).
        call: the layer's further arguments.
        experts: its fused parameters.
    """
    smoothed = SmoothedParameters(parameters)
    generator = torch.Generator().manual_seed(0)
    for mapping in mappings:
        num_inputs = parameters[f"{mapping.balance[0]}.weight"].shape[1]
        source = mapping.source_channels(num_inputs)
        factors = torch.exp2(torch.randint(-6, 7, (int(source.max()) + 1,), generator=generator).float())[source]
        smoothed.apply(mapping, factors.to(hidden.device))
    return change_of_output(layer, parameters, smoothed, hidden, call, experts) < TOLERANCE


def _expert_weight(parameters: Mapping[str, Tensor], fused: FusedParameter, expert: int) -> Tensor:
    """Returns an expert's slice (R, I) of a fused parameter, float32."""
    parts = [parameters[f"{path}.weight"].float() for path in fused.parts[expert]]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def infer_mappings(skeleton: Skeleton, structure: LayerStructure, layer: int) -> tuple[ResolvedMapping, ...]:
    """Returns the mappings of decoder layer `layer` of an unknown architecture.

    Every norm that feeds linears is a candidate, and so is every pair of linears whose widths fit. A candidate stays if scaling by random
    factors, with random weights, leaves the layer's output unchanged: that is what a mapping means. The layer is run in float32, on eight
    tokens.

    Experts are slices of one parameter that the same code runs, so that one stands for all: in the trial each has its weights times a
    factor of its own, which needs the memory of one, and shows where a token went to another expert. Tokens that routers or gates of
    shared experts send elsewhere than before change the output, so that these are proved to be compensated too.

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
