"""The contract of an output format, and the formats by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Protocol

import torch
from torch import Tensor

from awqdist.errors import RecipeError
from awqdist.quant.grid import QuantizedWeight
from awqdist.recipe import Recipe


class Format(Protocol):
    """How quantized linears are laid out on disk and described in config.json."""

    name: str

    def check(self, recipe: Recipe) -> None:
        """Raises RecipeError if the format cannot hold what the recipe asks for."""

    def check_linears(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raises RecipeError if the format cannot hold one of the quantized linears: on-disk module -> (O, I)."""

    def grid_dtype(self, checkpoint: torch.dtype) -> torch.dtype:
        """The dtype that group scales are stored in; the grid is fixed in it. checkpoint: dtype of the original weight."""

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Tensors of one linear by their last name, such as `weight_packed`."""

    def unpack(self, tensors: dict[str, Tensor], scheme: Any) -> QuantizedWeight:
        """The inverse of `pack`."""

    def config(self, recipe: Recipe, ignored: Sequence[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json. ignored: on-disk modules of linears in full precision."""


def output_format(name: str) -> Format:
    """The format of that name. Raises RecipeError with the nearest valid name."""
    from awqdist.export.autoawq import AutoAWQFormat
    from awqdist.export.compressed_tensors import CompressedTensorsFormat

    formats: dict[str, Format] = {f.name: f for f in (CompressedTensorsFormat(), AutoAWQFormat())}
    if name not in formats:
        nearest = (get_close_matches(name, formats, 1, 0) or [""])[0]
        raise RecipeError(f"unknown output format {name!r}; did you mean {nearest!r}? known: {', '.join(formats)}")
    return formats[name]
