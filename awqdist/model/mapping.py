"""Mappings: which layer's output is smoothed, and which linears read it.

A pattern names on-disk modules, as in llm-compressor (`re:` patterns or exact names). Resolving ties it to one layer's structure: the
whole input site is compensated whatever the pattern lists, since every consumer of a smoothed tensor must be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.errors import RecipeError
from awqdist.model.structure import LayerStructure
from awqdist.recipe import MappingPattern, matches


@dataclass(frozen=True, slots=True)
class HeadShape:
    """How attention reads its projections: numbers of query heads and of key/value heads, and the values per head.

    clipped: queries, keys and values are clamped (`clip_qkv` of Olmo and DBRX), so that they cannot be scaled; latent: rows of keys
    and of values per head in the up-projection of multi-head latent attention; squared: MLPs without a gate square what ReLU lets pass.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    clipped: bool = False
    latent: tuple[int, int] | None = None
    squared: bool = False

    @classmethod
    def of(cls, config: object) -> HeadShape:
        """From a transformers text config."""
        heads = int(getattr(config, "num_attention_heads", 1))
        kv_heads = getattr(config, "num_key_value_heads", None)
        head_dim = getattr(config, "head_dim", None) or int(getattr(config, "hidden_size", heads)) // heads
        latent = tuple(int(getattr(config, name, None) or 0) for name in ("qk_nope_head_dim", "v_head_dim"))
        clipped = getattr(config, "clip_qkv", None) is not None
        squared = "relu2" in (getattr(config, "mlp_hidden_act", None), getattr(config, "hidden_act", None))
        per_head = (latent[0], latent[1]) if latent[1] else None
        return cls(heads, int(kv_heads or heads), int(head_dim), clipped, per_head, squared)

    def is_latent(self, num_outputs: int, num_inputs: int) -> bool:
        """Whether a linear (num_outputs, ·) holds each head's keys and values, and one (·, num_inputs) reads the values."""
        rows = self.latent or (0, 0)
        return num_inputs == self.num_heads * rows[1] and num_outputs == self.num_heads * sum(rows)


@dataclass(frozen=True, slots=True)
class ResolvedMapping:
    """A mapping within one layer. Paths are within the layer; `balance` is a whole input site."""

    smooth: str
    balance: tuple[str, ...]
    norm: bool  # the smooth layer is a norm; else a linear, whose last rows are divided
    unit_offset: bool  # (1 + w) norm
    source: (
        tuple[int, int, int] | None
    )  # (kv heads, query heads per kv head, head_dim); None: channel i comes from row i
    rows_before: int = 0  # of each head in the smooth linear, in front of the rows that the channels come from
    rows_after: int = 0  # of the whole smooth linear, behind those rows
    power: int = 1  # that the smooth linear's outputs are raised to on their way to the balance layers

    def source_channels(self, num_inputs: int) -> Tensor:
        """(I,) int64: the smooth layer's output channel that each input channel of the balance layers comes from."""
        if self.source is None:
            return torch.arange(num_inputs)
        kv_heads, repeats, head_dim = self.source
        return torch.arange(kv_heads * head_dim).view(kv_heads, 1, head_dim).expand(-1, repeats, -1).reshape(-1)

    def num_channels(self, num_inputs: int) -> int:
        """Returns how many output channels of the smooth layer the balance layers' inputs come from."""
        return num_inputs if self.source is None else self.source[0] * self.source[2]

    def over_rows(self, scales: Tensor) -> Tensor:
        """What the smooth layer's last rows are divided by, from the scales of its output channels (S,): 1 for rows that nobody scales."""
        scales = scales ** (1 / self.power)
        if self.rows_before:
            assert self.source is not None
            heads = scales.view(-1, self.source[2])  # (heads, head_dim)
            scales = torch.cat([heads.new_ones(heads.shape[0], self.rows_before), heads], 1).flatten()
        return torch.cat([scales, scales.new_ones(self.rows_after)])


@dataclass(frozen=True, slots=True)
class Resolution:
    """Mappings that apply in a layer, and (mapping, reason) for those that do not."""

    mappings: tuple[ResolvedMapping, ...]
    skipped: tuple[tuple[str, str], ...]


def resolve(
    patterns: Sequence[MappingPattern],
    structure: LayerStructure,
    disk_name: Callable[[str], str],
    heads: HeadShape,
) -> Resolution:
    """Ties `patterns` to one layer. disk_name: module path in the layer -> on-disk module name.

    A site is smoothed once, by the first mapping that names one of its linears. Raises RecipeError where the smooth layer is ambiguous.
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
    """Smooth layers with the balance layers that are meant. Where a pattern matches several, as those of experts do, layers of one
    parent module belong together. Raises RecipeError where that leaves one without a partner."""
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
    """The mapping from `smooth` to the site that the balance layers read, or the reason why there can be none."""
    sites = {structure.site_of(path) for path in balance}
    if len(sites) > 1:
        return f"{', '.join(balance)} do not read one tensor"
    site = sites.pop()
    if smooth in structure.norms:
        if structure.site_norms.get(site[0]) != smooth:
            return f"{balance[0]} does not read the output of {smooth}"
        return _from_norm(structure, smooth, site)
    if site[0] in structure.site_norms:
        return f"{balance[0]} reads the output of {structure.site_norms[site[0]]}, not of {smooth}"
    num_outputs, num_inputs = structure.linears[smooth][0], structure.linears[site[0]][1]
    siblings = smooth.rpartition(".")[0] == site[0].rpartition(".")[0]
    attention = siblings and num_inputs == heads.num_heads * heads.head_dim
    value_rows = heads.num_kv_heads * heads.head_dim
    if attention and heads.clipped:
        return f"the model clamps the outputs of {smooth} (clip_qkv)"
    if siblings and heads.latent and heads.is_latent(num_outputs, num_inputs):
        return ResolvedMapping(smooth, site, False, False, (heads.num_heads, 1, heads.latent[1]), heads.latent[0])
    if num_outputs == num_inputs:
        power = 2 if heads.squared and siblings and _reads_alone(structure, smooth) else 1
        return ResolvedMapping(smooth, site, False, False, None, power=power)
    tied = (heads.num_kv_heads, heads.num_heads // heads.num_kv_heads, heads.head_dim)
    if attention and num_outputs in (value_rows, num_inputs + 2 * value_rows):
        return ResolvedMapping(smooth, site, False, False, tied if tied[1] > 1 else None)
    if siblings and num_outputs == 2 * num_inputs:  # fused gate and up: the last half is up
        return ResolvedMapping(smooth, site, False, False, None)
    if (
        siblings and num_outputs == 3 * num_inputs
    ):  # a short convolution: the second third multiplies what was convolved
        return ResolvedMapping(smooth, site, False, False, None, rows_after=num_inputs)
    return f"{smooth} has {num_outputs} outputs, {balance[0]} reads {num_inputs} inputs"


def _from_norm(structure: LayerStructure, norm: str, site: tuple[str, ...]) -> ResolvedMapping:
    """A norm over each head by itself has one weight for all heads."""
    width, num_inputs = structure.norm_widths[norm], structure.linears[site[0]][1]
    source = (1, num_inputs // width, width) if width < num_inputs else None
    return ResolvedMapping(norm, site, True, structure.norms[norm], source)


def _reads_alone(structure: LayerStructure, linear: str) -> bool:
    """Whether no other linear of its module reads what a linear does, as in an MLP without a gate."""
    parent = linear.rpartition(".")[0]
    return [path for path in structure.site_of(linear) if path.rpartition(".")[0] == parent] == [linear]
