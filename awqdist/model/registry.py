"""Mappings by architecture: those of the known families, and what users register."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from awqdist.model.families import FAMILIES
from awqdist.model.patterns import FC1_TO_FC2, OPT
from awqdist.recipe import MappingPattern

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_REGISTRY = {architecture: family.mappings for family in FAMILIES for architecture in family.architectures}
_KEPT = {architecture: family.kept for family in FAMILIES for architecture in family.architectures}


def register_mappings(architecture: str, mappings: Sequence[MappingPattern]) -> None:
    """Adds or replaces the mappings of an architecture (a class name, as in config.json's `architectures`)."""
    _REGISTRY[architecture] = tuple(mappings)


def registered_mappings(architecture: str, config: PretrainedConfig) -> tuple[MappingPattern, ...] | None:
    """The mappings of an architecture under its text configuration, or None if it is not known."""
    mappings = _REGISTRY.get(architecture)
    if (
        mappings is OPT and config.activation_function != "relu"
    ):  # Galactica has GELU, which is no multiple of its input
        return tuple(mapping for mapping in mappings if mapping != FC1_TO_FC2)
    return mappings


def kept_linears(architecture: str) -> tuple[str, ...]:
    """Patterns of an architecture's linears that stay in full precision unless a recipe's targets name them."""
    return _KEPT.get(architecture, ())


def registered_architectures() -> tuple[str, ...]:
    return tuple(_REGISTRY)
