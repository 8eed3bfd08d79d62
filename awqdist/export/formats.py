"""How quantized linears are written to disk: the contract of an output format, and the two formats.

A format turns the codes, scales and zero points of a linear into named tensors, and describes them in config.json.
README.md beside this file shows both layouts. A new format is a class like those below and an entry of `_FORMATS`;
tests/export runs the contract's tests on every entry.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from typing import Any, Protocol

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus
from torch import Tensor

from awqdist.errors import RecipeError
from awqdist.quant.grid import QuantizedWeight
from awqdist.quant.precision import repeatable
from awqdist.recipe import Recipe, WeightScheme

_AUTOAWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbouring outputs each nibble of a word holds


class Format(Protocol):
    """How quantized linears are laid out on disk and described in config.json."""

    name: str

    def check(self, recipe: Recipe) -> None:
        """Raises RecipeError if the format cannot hold the recipe's schemes."""

    def check_linears(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raises RecipeError if the format cannot hold one of the quantized linears.

        Args:
            shapes: The shape (O, I) of each linear by its on-disk module name.
        """

    def grid_dtype(self, checkpoint: torch.dtype) -> torch.dtype:
        """Returns the dtype that group scales are stored in. The grid is computed in this dtype.

        Args:
            checkpoint: The dtype of the original weight.
        """

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Returns the tensors of one linear by their last name, such as `weight_packed`."""

    def unpack(self, tensors: dict[str, Tensor], scheme: WeightScheme) -> QuantizedWeight:
        """Returns the codes, scales and zero points that `pack` was given."""

    def config(self, recipe: Recipe, ignored: Sequence[str]) -> dict[str, Any]:
        """Returns the `quantization_config` of config.json.

        Args:
            recipe: The recipe that the weights were quantized with.
            ignored: On-disk module names of the linears that stay in full precision.
        """


def output_format(name: str) -> Format:
    """Returns the format called `name`.

    Raises:
        RecipeError: If there is no such format. The message names the nearest one and lists all.
    """
    if name not in _FORMATS:
        nearest = get_close_matches(name, _FORMATS, 1, 0)[0]
        raise RecipeError(f"unknown output format {name!r}; did you mean {nearest!r}? known: {', '.join(_FORMATS)}")
    return _FORMATS[name]


class CompressedTensorsFormat:
    """The `pack-quantized` layout of the compressed-tensors package, which vLLM, SGLang and transformers read.

    Per linear (O, I): weight_packed int32 (O, ceil(I·b/32)), weight_scale (O, G), weight_shape int64 (2,), and for
    asymmetric schemes weight_zero_point int32 (ceil(O·b/32), G), packed along the rows.
    """

    name = "compressed-tensors"

    def check(self, recipe: Recipe) -> None:
        """Accepts every recipe."""

    def check_linears(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Accepts every shape."""

    def grid_dtype(self, checkpoint: torch.dtype) -> torch.dtype:
        """Returns the checkpoint's own dtype."""
        return checkpoint

    @repeatable
    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Packs a linear as `Format.pack` says."""
        bits = weight.scheme.num_bits
        tensors = {
            "weight_packed": _pack_codes(weight.codes, bits),
            "weight_scale": weight.weight_scale.contiguous(),
            "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
        }
        if not weight.scheme.symmetric:
            tensors["weight_zero_point"] = pack_to_int32(_signed(weight.zero_point, bits), bits, packed_dim=0)
        return tensors

    def unpack(self, tensors: dict[str, Tensor], scheme: WeightScheme) -> QuantizedWeight:
        """Unpacks a linear as `Format.unpack` says."""
        shape = torch.Size(tensors["weight_shape"].tolist())
        bits, weight_scale = scheme.num_bits, tensors["weight_scale"]
        codes = _unsigned(unpack_from_int32(tensors["weight_packed"], bits, shape), bits)
        if scheme.symmetric:
            zero_point = torch.full_like(weight_scale, 1 << (bits - 1), dtype=torch.uint8)
        else:
            # transposed by a copy: compressed-tensors 0.20 fails to unpack a single row of words along dim 0
            packed = tensors["weight_zero_point"].T.clone(memory_format=torch.contiguous_format)
            grid = torch.Size((weight_scale.shape[1], shape[0]))
            zero_point = _unsigned(unpack_from_int32(packed, bits, grid), bits).T.contiguous()
        return QuantizedWeight(codes, weight_scale, zero_point, scheme)

    def config(self, recipe: Recipe, ignored: Sequence[str]) -> dict[str, Any]:
        """Returns the configuration as llm-compressor writes it, with its defaults where the recipe is silent."""
        groups = {}
        for group in recipe.groups:
            definition = json.loads(group.definition)
            weights = definition["weights"]  # newer versions of compressed-tensors leave these defaults out
            weights["observer"] = weights.get("observer") or "memoryless_minmax"
            if not weights["symmetric"]:
                weights["zp_dtype"] = weights.get("zp_dtype") or "torch.int8"
            groups[group.name] = QuantizationScheme(**{**definition, "format": "pack-quantized"})
        config = QuantizationConfig(
            config_groups=groups,
            format="pack-quantized",
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=list(ignored),
        )
        fields: dict[str, Any] = config.model_dump(mode="json", exclude={"moe_sparsity_config"})
        # llm-compressor writes empty entries and the version beside the package's own fields
        return {**fields, "sparsity_config": {}, "transform_config": {}, "version": version("compressed-tensors")}


class AutoAWQFormat:
    """The `gemm` layout of AutoAWQ (https://github.com/casper-hansen/AutoAWQ), which vLLM and SGLang read. 4 bit only.

    Per linear (O, I): qweight int32 (I, O/8), qzeros int32 (G, O/8), scales float16 (G, O). A word of qweight and
    qzeros holds eight consecutive outputs in the order 0 2 4 6 1 3 5 7. Symmetric weights are written with zero points
    of 8, because readers disagree on `zero_point: false`.
    """

    name = "autoawq"

    def check(self, recipe: Recipe) -> None:
        """Raises RecipeError unless the whole recipe has one scheme of 4 bit."""
        schemes = {group.weights for group in recipe.groups}
        if len(schemes) != 1 or next(iter(schemes)).num_bits != 4:
            raise RecipeError(
                "the autoawq format holds one 4 bit scheme for the whole model; the recipe asks for "
                + ", ".join(sorted(f"{s.num_bits} bit in groups of {s.group_size}" for s in schemes))
            )

    def check_linears(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raises RecipeError for a linear whose number of outputs is not a multiple of 8."""
        for name, (rows, _) in shapes.items():
            if rows % 8:
                raise RecipeError(
                    f"the autoawq format packs outputs in multiples of 8; linear {name} has {rows}; "
                    "add it to ignore, or use --format compressed-tensors"
                )

    def grid_dtype(self, checkpoint: torch.dtype) -> torch.dtype:
        """Returns float16, whatever the checkpoint has."""
        return torch.float16

    @repeatable
    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Packs a linear as `Format.pack` says."""
        if weight.codes.shape[0] % 8:
            raise RecipeError(f"the autoawq format packs outputs in multiples of 8; a linear has {len(weight.codes)}")
        return {
            "qweight": _pack_nibbles(weight.codes.T),
            "qzeros": _pack_nibbles(weight.zero_point.T),
            "scales": weight.weight_scale.T.to(torch.float16).contiguous(),  # float16 already: see grid_dtype
        }

    def unpack(self, tensors: dict[str, Tensor], scheme: WeightScheme) -> QuantizedWeight:
        """Unpacks a linear as `Format.unpack` says."""
        codes, zero_point = _unpack_nibbles(tensors["qweight"]).T, _unpack_nibbles(tensors["qzeros"]).T
        return QuantizedWeight(codes.contiguous(), tensors["scales"].T.contiguous(), zero_point.contiguous(), scheme)

    def config(self, recipe: Recipe, ignored: Sequence[str]) -> dict[str, Any]:
        """Returns the entries that AutoAWQ's readers ask for."""
        scheme = recipe.groups[0].weights
        return {
            "quant_method": "awq",
            "bits": scheme.num_bits,
            "group_size": scheme.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(ignored),
        }


_FORMATS: dict[str, Format] = {each.name: each for each in (CompressedTensorsFormat(), AutoAWQFormat())}


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packs codes (O, I) uint8 into (O, ceil(I·b/32)) int32.

    Codes of 4 bit that fill whole words are paired within their bytes first, which takes a tenth of the time.
    """
    if bits != 4 or codes.shape[1] % 8 or sys.byteorder != "little":
        packed: Tensor = pack_to_int32(_signed(codes, bits), bits)
        return packed
    pairs = codes.contiguous().view(torch.int16)  # (O, I/2): the first code in the low byte
    return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8).view(torch.int32)


def _signed(unsigned: Tensor, bits: int) -> Tensor:
    return (unsigned.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _unsigned(signed: Tensor, bits: int) -> Tensor:
    return (signed.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)


def _pack_nibbles(values: Tensor) -> Tensor:
    """Packs values (R, C) uint8 below 16 into (R, C/8) int32, in AutoAWQ's order."""
    words = values.to(torch.int32).unflatten(1, (-1, 8))  # (R, C/8, 8)
    packed = torch.zeros(words.shape[:2], dtype=torch.int32, device=values.device)
    for position, column in enumerate(_AUTOAWQ_ORDER):
        packed |= words[:, :, column] << (4 * position)
    return packed


def _unpack_nibbles(packed: Tensor) -> Tensor:
    """Unpacks (R, C/8) int32 into (R, C) uint8."""
    values = torch.empty((*packed.shape, 8), dtype=torch.uint8, device=packed.device)
    for position, column in enumerate(_AUTOAWQ_ORDER):
        values[:, :, column] = ((packed >> (4 * position)) & 15).to(torch.uint8)
    return values.flatten(1)
