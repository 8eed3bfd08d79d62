"""The recipe that everything below reads: frozen, complete, free of torch.

A `Recipe` holds decisions, not wishes: presets are expanded, shorthands resolved, contradictions already refused by
`build_recipe`. Patterns stay patterns, because a recipe does not know the model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from awqdist.recipe.matching import is_regex, matches


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """How the weights of a linear are stored.

    group_size: input channels that share a scale; -1: all of a row ("channel").
    """

    num_bits: int
    symmetric: bool
    group_size: int


@dataclass(frozen=True, slots=True)
class SchemeGroup:
    """One entry of `config_groups`.

    definition: canonical JSON of compressed-tensors' QuantizationScheme, for config.json.
    """

    name: str
    targets: tuple[str, ...]
    weights: WeightScheme
    definition: str


@dataclass(frozen=True, slots=True)
class MappingPattern:
    """Patterns of a smooth layer and of the balance layers that read its output."""

    smooth_layer: str
    balance_layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Smoothing:
    """The scale search (DESIGN.md section 4).

    mappings: None for the architecture's own; n_grid: candidates per mapping.
    """

    mappings: tuple[MappingPattern, ...] | None
    duo_scaling: bool | Literal["both"]
    n_grid: int


@dataclass(frozen=True, slots=True)
class Rounding:
    """How smoothed weights become codes.

    The last three are GPTQ's; under "nearest" they keep these defaults, unused.
    """

    method: Literal["nearest", "gptq"]
    dampening_frac: float = 0.01  # of the Gram's mean diagonal
    actorder: bool = True  # columns in order of activation, group scales fixed beforehand, stored in plain order
    block_size: int = 128


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that the user decides about the quantized weights. smoothing None: the weights keep their scale."""

    smoothing: Smoothing | None
    clip: bool
    rounding: Rounding
    groups: tuple[SchemeGroup, ...]
    ignore: tuple[str, ...]

    @property
    def needs_gram(self) -> bool:
        """True where rounding or clipping uses the Gram matrix XᵀX of a linear's inputs (clip, GPTQ)."""
        return self.clip or self.rounding.method == "gptq"

    def scheme_for(self, name: str, kind: str = "Linear") -> SchemeGroup | None:
        """The group of module `name` of class `kind`, or None when it is ignored or not targeted.

        As compressed-tensors decides: `ignore` wins; then the exact name, then regexes in alphabetical order, then the
        class.
        """
        if any(matches(pattern, name, kind) for pattern in self.ignore):
            return None
        found = [
            (0 if target == name else 1 if is_regex(target) else 2, target, index)
            for index, group in enumerate(self.groups)
            for target in group.targets
            if matches(target, name, kind)
        ]
        return self.groups[min(found)[2]] if found else None

    def to_yaml(self) -> str:
        """YAML in llm-compressor's layout that `load_recipe` reads back to an equal recipe; the same text every time.

        Our own key `clip` appears only where it is true, so that llm-compressor reads all other recipes too.
        """
        import yaml

        modifiers: dict[str, Any] = {}
        if self.smoothing is not None or self.clip:
            modifiers["AWQModifier"] = _awq_fields(self.smoothing, self.clip)
        groups = {group.name: json.loads(group.definition) for group in self.groups}
        fields: dict[str, Any] = {"config_groups": groups, "ignore": list(self.ignore)}
        if self.rounding.method == "gptq":
            fields |= {"block_size": self.rounding.block_size, "dampening_frac": self.rounding.dampening_frac}
            fields |= {"actorder": "static" if self.rounding.actorder else None}
            modifiers["GPTQModifier"] = fields
        else:
            modifiers["QuantizationModifier"] = fields
        tree = {"default_stage": {"default_modifiers": modifiers}}
        return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def _awq_fields(smoothing: Smoothing | None, clip: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if smoothing is None:
        fields["mappings"] = []  # nothing to smooth: the clip alone
    else:
        if smoothing.mappings is not None:
            fields["mappings"] = [
                {"smooth_layer": m.smooth_layer, "balance_layers": list(m.balance_layers)} for m in smoothing.mappings
            ]
        fields |= {"duo_scaling": smoothing.duo_scaling, "n_grid": smoothing.n_grid}
    return fields | ({"clip": True} if clip else {})
