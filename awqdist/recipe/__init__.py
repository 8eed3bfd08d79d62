"""What to do to a model: recipes in YAML and Python, and the weight schemes they ask for.

Users write modifiers under llm-compressor's names; `load_recipe` turns them into the frozen `Recipe` that the rest of
the package reads. Nothing here reads a model. Names that need pydantic or YAML are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from awqdist.recipe.recipe import (
    MappingPattern,
    Recipe,
    Rounding,
    SchemeGroup,
    Smoothing,
    WeightScheme,
    check_patterns_match,
    matches,
)

if TYPE_CHECKING:
    from awqdist.recipe.load import RecipeSource, build_recipe, load_recipe, preset_names
    from awqdist.recipe.modifiers import AWQMapping, AWQModifier, GPTQModifier, Modifier, QuantizationModifier

__all__ = [
    "AWQMapping",
    "AWQModifier",
    "GPTQModifier",
    "MappingPattern",
    "Modifier",
    "QuantizationModifier",
    "Recipe",
    "RecipeSource",
    "Rounding",
    "SchemeGroup",
    "Smoothing",
    "WeightScheme",
    "build_recipe",
    "check_patterns_match",
    "load_recipe",
    "matches",
    "preset_names",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    file = "load" if name in ("RecipeSource", "build_recipe", "load_recipe", "preset_names") else "modifiers"
    return getattr(import_module(f"{__name__}.{file}"), name)
