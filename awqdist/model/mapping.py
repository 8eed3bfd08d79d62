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

    clipped: queries, keys and values are clamped (`clip_qkv` of Olmo and DBRX), so that they cannot be scaled.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    clipped: bool = False

    @classmethod
    def of(cls, config: object) -> HeadShape:
        """From a transformers text config."""
        heads = int(getattr(config, "num_attention_heads", 1))
        kv_heads = getattr(config, "num_key_value_heads", None)
        head_dim = getattr(config, "head_dim", None) or int(getattr(config, "hidden_size", heads)) // heads
        return cls(heads, int(kv_heads or heads), int(head_dim), getattr(config, "clip_qkv", None) is not None)


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

    def source_channels(self, num_inputs: int) -> Tensor:
        """(I,) int64: the smooth layer's output channel that each input channel of the balance layers comes from."""
        if self.source is None:
            return torch.arange(num_inputs)
        kv_heads, repeats, head_dim = self.source
        return torch.arange(kv_heads * head_dim).view(kv_heads, 1, head_dim).expand(-1, repeats, -1).reshape(-1)


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
    mappings: list[ResolvedMapping] = []
    skipped: list[tuple[str, str]] = []
    for pattern in patterns:
        smooths = [
            path for path in (*structure.norms, *structure.linears) if matches(pattern.smooth_layer, disk_name(path))
        ]
        balance = [p for p in structure.linears if any(matches(b, disk_name(p)) for b in pattern.balance_layers)]
        label = f"{pattern.smooth_layer} -> {', '.join(pattern.balance_layers)}"
        if not smooths or not balance:
            side = "smooth layer" if not smooths else "balance layer"
            skipped.append((label, f"no {side} of that name in this layer"))
            continue
        if len(smooths) > 1:
            raise RecipeError(
                f"mapping {label}: smooth_layer matches {len(smooths)} modules of one layer ({', '.join(smooths)})"
            )
        outcome = connect(structure, smooths[0], tuple(balance), heads)
        if isinstance(outcome, ResolvedMapping):
            earlier = next((m.smooth for m in mappings if m.balance == outcome.balance), None)
            if earlier is None:
                mappings.append(outcome)
                continue
            outcome = f"an earlier mapping smooths the input of {', '.join(outcome.balance)} by {earlier} already"
        skipped.append((label, outcome))
    return Resolution(tuple(mappings), tuple(skipped))


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
        return ResolvedMapping(smooth, site, True, structure.norms[smooth], None)
    if site[0] in structure.site_norms:
        return f"{balance[0]} reads the output of {structure.site_norms[site[0]]}, not of {smooth}"
    num_outputs, num_inputs = structure.linears[smooth][0], structure.linears[site[0]][1]
    siblings = smooth.rpartition(".")[0] == site[0].rpartition(".")[0]
    attention = siblings and num_inputs == heads.num_heads * heads.head_dim
    value_rows = heads.num_kv_heads * heads.head_dim
    if attention and heads.clipped:
        return f"the model clamps the outputs of {smooth} (clip_qkv)"
    if num_outputs == num_inputs:
        return ResolvedMapping(smooth, site, False, False, None)
    tied = (heads.num_kv_heads, heads.num_heads // heads.num_kv_heads, heads.head_dim)
    if attention and num_outputs in (value_rows, num_inputs + 2 * value_rows):
        return ResolvedMapping(smooth, site, False, False, tied if tied[1] > 1 else None)
    if siblings and num_outputs == 2 * num_inputs:  # fused gate and up: the last half is up
        return ResolvedMapping(smooth, site, False, False, None)
    return f"{smooth} has {num_outputs} outputs, {balance[0]} reads {num_inputs} inputs"
