"""Modifiers -> one `Recipe`, with every contradiction refused.

A recipe has at most one AWQModifier (smoothing, clip) and at most one quantization modifier (schemes, rounding). Their
order does not matter: smoothing always comes before rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from awqdist.errors import RecipeError
from awqdist.recipe.matching import check_patterns
from awqdist.recipe.modifiers import AWQModifier, GPTQModifier, Modifier, QuantizationModifier
from awqdist.recipe.recipe import MappingPattern, Recipe, Rounding, SchemeGroup, Smoothing, WeightScheme
from awqdist.recipe.schemes import plain_group, scheme_groups, with_actorder

MODIFIERS: dict[str, type[Modifier]] = {
    kind.__name__: kind for kind in (AWQModifier, QuantizationModifier, GPTQModifier)
}


def build_recipe(modifiers: Sequence[Modifier]) -> Recipe:
    """Combines modifiers into a recipe.

    Raises RecipeError for contradictions and for values that cannot be honoured.
    """
    awq, quantizer = _split(modifiers)
    rounding = _rounding(awq, quantizer)
    groups, ignore = _groups(awq, quantizer)
    if rounding.method == "gptq":
        explicit = isinstance(quantizer, GPTQModifier) and "actorder" in quantizer.model_fields_set
        order = quantizer.actorder if isinstance(quantizer, GPTQModifier) else "static"
        groups = tuple(with_actorder(group, order, explicit) for group in groups)
    _check_shorthands(awq, groups)
    _check_targets_once(groups)
    check_patterns(ignore, "ignore")
    return Recipe(
        smoothing=_smoothing(awq),
        clip=awq is not None and awq.clip,
        rounding=rounding,
        groups=groups,
        ignore=tuple(ignore),
    )


def _split(modifiers: Sequence[Any]) -> tuple[AWQModifier | None, QuantizationModifier | None]:
    """The AWQModifier and the quantization modifier. Raises RecipeError for anything more, less or else."""
    for modifier in modifiers:
        if not isinstance(modifier, (AWQModifier, QuantizationModifier)):
            kind = f"{type(modifier).__module__}.{type(modifier).__qualname__}"
            raise RecipeError(f"a recipe holds {', '.join(MODIFIERS)} from awqdist; found an object of {kind}")
    awqs = [m for m in modifiers if isinstance(m, AWQModifier)]
    quantizers = [m for m in modifiers if isinstance(m, QuantizationModifier)]
    if not modifiers:
        raise RecipeError(
            f"the recipe has no modifiers, so nothing to quantize; give one or more of {', '.join(MODIFIERS)}"
        )
    if len(awqs) > 1:
        raise RecipeError(f"the recipe has {len(awqs)} AWQModifiers, expected at most one; put all mappings into one")
    if len(quantizers) > 1:
        names = " and ".join(type(m).__name__ for m in quantizers)
        raise RecipeError(
            f"the recipe has {names}, which would quantize the same weights twice; keep one, with all its groups"
        )
    return (awqs[0] if awqs else None), (quantizers[0] if quantizers else None)


def _rounding(awq: AWQModifier | None, quantizer: QuantizationModifier | None) -> Rounding:
    wish = None if awq is None else awq.rounding
    if isinstance(quantizer, GPTQModifier):
        if wish == "nearest":
            raise RecipeError(
                "AWQModifier: rounding 'nearest' contradicts GPTQModifier; remove rounding or use QuantizationModifier"
            )
        dampening = 0.01 if quantizer.dampening_frac is None else quantizer.dampening_frac
        return Rounding("gptq", dampening, quantizer.actorder is not None, quantizer.block_size)
    return Rounding("gptq" if wish == "gptq" else "nearest")


def _groups(
    awq: AWQModifier | None, quantizer: QuantizationModifier | None
) -> tuple[tuple[SchemeGroup, ...], Sequence[str]]:
    """The scheme groups and the ignore patterns, from whichever modifier defines them."""
    if awq is not None and quantizer is not None and awq.says_what_to_quantize():
        raise RecipeError(
            f"AWQModifier and {type(quantizer).__name__} both say what to quantize (targets, ignore, "
            f"scheme, config_groups, observers); leave that to {type(quantizer).__name__}"
        )
    owner = quantizer or awq
    assert owner is not None, "a recipe has at least one modifier"
    if owner.has_scheme():
        return scheme_groups(owner), owner.ignore
    if awq is None or (quantizer is not None and not _shorthands(awq)):
        raise RecipeError(
            f"{type(owner).__name__} leaves nothing to quantize: it has neither scheme nor config_groups; "
            "add for example 'scheme: W4A16_ASYM'"
        )
    given = {"bits": 4, "symmetric": False, "group_size": 128} | _shorthands(awq)
    weights = WeightScheme(given["bits"], bool(given["symmetric"]), given["group_size"])
    ignore = ["lm_head"] if quantizer is None and "ignore" not in awq.model_fields_set else owner.ignore
    return (plain_group(owner, weights),), ignore


def _shorthands(awq: AWQModifier) -> dict[str, int]:
    """What AWQModifier says itself about the weights, by key."""
    given = {"bits": awq.bits, "symmetric": awq.symmetric, "group_size": awq.group_size}
    return {key: value for key, value in given.items() if value is not None}


def _check_shorthands(awq: AWQModifier | None, groups: tuple[SchemeGroup, ...]) -> None:
    given = {} if awq is None else _shorthands(awq)
    for group in groups:
        stored = {
            "bits": group.weights.num_bits,
            "symmetric": group.weights.symmetric,
            "group_size": group.weights.group_size,
        }
        for key, value in given.items():
            if value != stored[key]:
                raise RecipeError(
                    f"AWQModifier: {key} {value} contradicts {stored[key]} in the scheme of {group.name}; "
                    "change one of the two"
                )


def _check_targets_once(groups: tuple[SchemeGroup, ...]) -> None:
    seen: dict[str, str] = {}
    for group in groups:
        for target in group.targets:
            if seen.setdefault(target, group.name) != group.name:
                raise RecipeError(
                    f"the target {target!r} is in {seen[target]} and in {group.name}; keep it in one of them"
                )


def _smoothing(awq: AWQModifier | None) -> Smoothing | None:
    """None without AWQModifier, and where its list of mappings is empty."""
    if awq is None or awq.mappings == []:
        return None
    if awq.mappings is None:
        return Smoothing(None, awq.duo_scaling, awq.n_grid)
    for mapping in awq.mappings:
        check_patterns([mapping.smooth_layer, *mapping.balance_layers], "AWQModifier: mappings")
    patterns = tuple(MappingPattern(m.smooth_layer, tuple(m.balance_layers)) for m in awq.mappings)
    return Smoothing(patterns, awq.duo_scaling, awq.n_grid)
