"""The recipe as the rest of the package reads it: frozen, complete, and free of torch and pydantic.

A `Recipe` holds decisions: presets are expanded, shorthands resolved and contradictions refused by `build_recipe`.
Patterns stay patterns, because a recipe does not know the model.

They are matched as compressed-tensors matches them. `re:PATTERN` matches where `re.match(PATTERN, name)` does: anchored at the start,
open at the end unless the pattern ends in `$`. Any other pattern matches the module of exactly that name, and all modules whose class
has that name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from typing import Any, Literal

from awqdist.errors import RecipeError

_REGEX = "re:"


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """How the weights of a linear are stored."""

    num_bits: int
    symmetric: bool
    group_size: int  # input channels that share a scale; -1: one scale for each row


@dataclass(frozen=True, slots=True)
class SchemeGroup:
    """One entry of `config_groups`: the modules that share a scheme."""

    name: str
    targets: tuple[str, ...]
    weights: WeightScheme
    definition: str  # canonical JSON of compressed-tensors' QuantizationScheme, for config.json


@dataclass(frozen=True, slots=True)
class MappingPattern:
    """Patterns of a smooth layer and of the balance layers that read its output."""

    smooth_layer: str
    balance_layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Smoothing:
    """The settings of the scale search. The formulas are in awqdist/quant/README.md."""

    mappings: tuple[MappingPattern, ...] | None  # None: those of the architecture
    duo_scaling: bool | Literal["both"]
    n_grid: int  # candidates per mapping


@dataclass(frozen=True, slots=True)
class Rounding:
    """How smoothed weights become codes. Rounding to nearest uses none of the fields after `method`."""

    method: Literal["nearest", "gptq"]
    dampening_frac: float = 0.01  # of the Gram's mean diagonal
    actorder: bool = True  # columns in order of activation, group scales fixed beforehand, stored in plain order
    block_size: int = 128


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything the user decides about the quantized weights."""

    smoothing: Smoothing | None  # None: weights keep their scale
    clip: bool
    rounding: Rounding
    groups: tuple[SchemeGroup, ...]
    ignore: tuple[str, ...]

    @property
    def needs_gram(self) -> bool:
        """True where clipping or rounding uses the Gram matrix of a linear's inputs."""
        return self.clip or self.rounding.method == "gptq"

    def scheme_for(self, name: str, kind: str = "Linear") -> SchemeGroup | None:
        """Returns the group of a module, or None where it is ignored or not targeted.

        The order of precedence is that of compressed-tensors: `ignore`, the exact name, regular expressions in
        alphabetical order, the class.

        Args:
            name: The module's name.
            kind: The name of the module's class.
        """
        if any(matches(pattern, name, kind) for pattern in self.ignore):
            return None
        found = [
            (0 if target == name else 1 if _is_regex(target) else 2, target, index)
            for index, group in enumerate(self.groups)
            for target in group.targets
            if matches(target, name, kind)
        ]
        return self.groups[min(found)[2]] if found else None

    def to_yaml(self) -> str:
        """Returns YAML in llm-compressor's layout, which `load_recipe` reads back to an equal recipe.

        Equal recipes give the same text. The key `clip`, which llm-compressor does not know, appears only where it is
        true.
        """
        import yaml

        awq: dict[str, Any] = {}
        if self.smoothing is None:
            awq["mappings"] = []
        else:
            if self.smoothing.mappings is not None:
                awq["mappings"] = [
                    {"smooth_layer": m.smooth_layer, "balance_layers": list(m.balance_layers)}
                    for m in self.smoothing.mappings
                ]
            awq |= {"duo_scaling": self.smoothing.duo_scaling, "n_grid": self.smoothing.n_grid}
        if self.clip:
            awq["clip"] = True
        groups = {group.name: json.loads(group.definition) for group in self.groups}
        quantizer: dict[str, Any] = {"config_groups": groups, "ignore": list(self.ignore)}
        if self.rounding.method == "gptq":
            quantizer |= {"block_size": self.rounding.block_size, "dampening_frac": self.rounding.dampening_frac}
            quantizer |= {"actorder": "static" if self.rounding.actorder else None}
        name = "GPTQModifier" if self.rounding.method == "gptq" else "QuantizationModifier"
        modifiers = {"AWQModifier": awq} if self.smoothing is not None or self.clip else {}
        tree = {"default_stage": {"default_modifiers": modifiers | {name: quantizer}}}
        return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def _is_regex(pattern: str) -> bool:
    return pattern.startswith(_REGEX)


def matches(pattern: str, name: str, kind: str | None = None) -> bool:
    """Returns whether `pattern` matches the module `name`, or equals the name of its class, `kind`."""
    if _is_regex(pattern):
        return re.match(pattern.removeprefix(_REGEX), name) is not None
    return pattern in (name, kind)


def check_patterns(patterns: Iterable[str], where: str) -> None:
    """Raises RecipeError for the first pattern that is empty or is not a valid regular expression."""
    for pattern in patterns:
        if not pattern.removeprefix(_REGEX):
            raise RecipeError(
                f"{where}: the pattern {pattern!r} is empty; give a module name, a class name or 're:' and a regex"
            )
        try:
            re.compile(pattern.removeprefix(_REGEX) if _is_regex(pattern) else "")
        except re.error as error:
            raise RecipeError(
                f"{where}: {pattern!r} is not a valid regular expression ({error}); correct it"
            ) from error


def check_patterns_match(patterns: Iterable[str], names: Iterable[str], where: str) -> None:
    """Raises RecipeError for the first pattern that matches none of `names`, with the name nearest to it.

    Args:
        patterns: The patterns to check.
        names: All module names that a pattern may match here, and class names where those are allowed.
        where: The place of the patterns in the recipe, for the message.
    """
    known = list(names)
    for pattern in patterns:
        check_patterns([pattern], where)
        if any(matches(pattern, name) for name in known):
            continue
        advice = f"the nearest is {_nearest_name(pattern, known)!r}" if known else "there are no names here at all"
        if not _is_regex(pattern) and re.search(r"[*^$\\\[(|+?]", pattern):
            advice += f", and a regular expression is written {_REGEX + pattern!r}"
        raise RecipeError(f"{where}: {pattern!r} matches no module; {advice}")


def suggestion(name: str, valid: Iterable[str]) -> str:
    """Returns the end of an error message: the valid name nearest to `name`, or all valid names if none is alike."""
    known = sorted(valid)
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid are {', '.join(known)}"


def _nearest_name(pattern: str, names: list[str]) -> str:
    """Compares as many trailing parts of each name as the pattern has. Names that differ in numbers count once."""
    plain = re.sub(r"\.\*|[\^$\\?()]", "", pattern.removeprefix(_REGEX)).strip(".")
    num_parts = plain.count(".") + 1
    distinct: dict[str, str] = {}
    for name in names:
        distinct.setdefault(re.sub(r"\d+", "0", name), name)

    def likeness(name: str) -> float:
        return SequenceMatcher(None, plain, ".".join(name.split(".")[-num_parts:])).ratio()

    return max(distinct.values(), key=likeness)
