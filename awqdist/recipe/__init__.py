"""What to do to a model: recipes, their YAML and Python forms, and the weight schemes they ask for.

`Recipe` is the frozen result that the rest of the package reads; the modifiers are what users write, in YAML or in
Python, under llm-compressor's names. Nothing here reads a model, and torch is imported only while a recipe is built.
The names that need pydantic or YAML are imported on first use, so that the weight side pays for dataclasses only.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from awqdist.recipe.matching import check_patterns_match, matches
from awqdist.recipe.recipe import MappingPattern, Recipe, Rounding, SchemeGroup, Smoothing, WeightScheme

if TYPE_CHECKING:
    from awqdist.recipe.build import build_recipe
    from awqdist.recipe.files import RecipeSource, load_recipe, preset_names
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

_LAZY = {
    "AWQMapping": "modifiers",
    "AWQModifier": "modifiers",
    "GPTQModifier": "modifiers",
    "Modifier": "modifiers",
    "QuantizationModifier": "modifiers",
    "RecipeSource": "files",
    "build_recipe": "build",
    "load_recipe": "files",
    "preset_names": "files",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
