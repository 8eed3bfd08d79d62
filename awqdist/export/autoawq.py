"""The AutoAWQ `gemm` format (https://github.com/casper-hansen/AutoAWQ), as vLLM and SGLang read it. 4 bit only.

Per linear (O, I): qweight int32 (I, O/8), eight codes of consecutive outputs in one word in the order 0 2 4 6 1 3 5 7; qzeros int32
(G, O/8) in the same order; scales float16 (G, O). Symmetric weights are written with zero points of 8, since readers treat
`zero_point: false` differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from awqdist.errors import RecipeError
from awqdist.quant.grid import QuantizedWeight
from awqdist.recipe import Recipe, WeightScheme

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class AutoAWQFormat:
    """See the module."""

    name = "autoawq"

    def check(self, recipe: Recipe) -> None:
        schemes = {group.weights for group in recipe.groups}
        if len(schemes) != 1 or next(iter(schemes)).num_bits != 4:
            raise RecipeError(
                "the autoawq format holds one 4 bit scheme for the whole model; the recipe asks for "
                + ", ".join(sorted(f"{s.num_bits} bit in groups of {s.group_size}" for s in schemes))
            )

    def check_linears(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        for name, (rows, _) in shapes.items():
            if rows % 8:
                raise RecipeError(
                    f"the autoawq format packs outputs by eights, and linear {name} has {rows}; add it to ignore, or use"
                    " --format compressed-tensors"
                )

    def grid_dtype(self, checkpoint: torch.dtype) -> torch.dtype:
        return torch.float16

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        if weight.codes.shape[0] % 8:
            raise RecipeError(
                f"the autoawq format needs outputs in multiples of 8; a linear has {weight.codes.shape[0]}"
            )
        return {
            "qweight": _pack(weight.codes.T),
            "qzeros": _pack(weight.zero_point.T),
            "scales": weight.weight_scale.T.to(torch.float16).contiguous(),  # float16 already: see grid_dtype
        }

    def unpack(self, tensors: dict[str, Tensor], scheme: WeightScheme) -> QuantizedWeight:
        codes, zero_point = _unpack(tensors["qweight"]).T, _unpack(tensors["qzeros"]).T
        return QuantizedWeight(codes.contiguous(), tensors["scales"].T.contiguous(), zero_point.contiguous(), scheme)

    def config(self, recipe: Recipe, ignored: Sequence[str]) -> dict[str, Any]:
        scheme = recipe.groups[0].weights
        return {
            "quant_method": "awq",
            "bits": scheme.num_bits,
            "group_size": scheme.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(ignored),
        }


def _pack(values: Tensor) -> Tensor:
    """(R, C) uint8 below 16 -> (R, C/8) int32."""
    words = values.to(torch.int32).unflatten(1, (-1, 8))  # (R, C/8, 8)
    packed = torch.zeros(words.shape[:2], dtype=torch.int32, device=values.device)
    for position, column in enumerate(_ORDER):
        packed |= words[:, :, column] << (4 * position)
    return packed


def _unpack(packed: Tensor) -> Tensor:
    """(R, C/8) int32 -> (R, C) uint8."""
    values = torch.empty((*packed.shape, 8), dtype=torch.uint8, device=packed.device)
    for position, column in enumerate(_ORDER):
        values[:, :, column] = ((packed >> (4 * position)) & 15).to(torch.uint8)
    return values.flatten(1)
