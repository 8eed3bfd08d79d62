"""The compressed-tensors `pack-quantized` format, by the compressed-tensors package itself. vLLM, SGLang and transformers read it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus
from torch import Tensor

from awqdist.quant.grid import QuantizedWeight
from awqdist.recipe import Recipe, WeightScheme

_FORMAT = "pack-quantized"


class CompressedTensorsFormat:
    """Per linear (O, I): weight_packed int32 (O, ceil(I·b/32)), weight_scale (O, G), weight_shape int64 (2,), and for asymmetric
    schemes weight_zero_point int32 (ceil(O·b/32), G), packed along the rows."""

    name = "compressed-tensors"

    def check(self, recipe: Recipe) -> None:
        """Every scheme that a recipe can hold fits."""

    def check_linears(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Every shape fits."""

    def grid_dtype(self, checkpoint: torch.dtype) -> torch.dtype:
        return checkpoint

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        bits = weight.scheme.num_bits
        tensors = {
            "weight_packed": _packed(weight.codes, bits),
            "weight_scale": weight.weight_scale.contiguous(),
            "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
        }
        if not weight.scheme.symmetric:
            tensors["weight_zero_point"] = pack_to_int32(_signed(weight.zero_point, bits), bits, packed_dim=0)
        return tensors

    def unpack(self, tensors: dict[str, Tensor], scheme: WeightScheme) -> QuantizedWeight:
        shape = torch.Size(tensors["weight_shape"].tolist())
        bits, weight_scale = scheme.num_bits, tensors["weight_scale"]
        codes = _unsigned(unpack_from_int32(tensors["weight_packed"], bits, shape), bits)
        if scheme.symmetric:
            zero_point = torch.full_like(weight_scale, 1 << (bits - 1), dtype=torch.uint8)
        else:
            # turned here, by a copy: unpacking along dim 0 itself fails in compressed-tensors 0.20 for one row of words
            packed = tensors["weight_zero_point"].T.clone(memory_format=torch.contiguous_format)
            grid = torch.Size((weight_scale.shape[1], shape[0]))
            zero_point = _unsigned(unpack_from_int32(packed, bits, grid), bits).T.contiguous()
        return QuantizedWeight(codes, weight_scale, zero_point, scheme)

    def config(self, recipe: Recipe, ignored: Sequence[str]) -> dict[str, Any]:
        groups = {group.name: _described(json.loads(group.definition)) for group in recipe.groups}
        config = QuantizationConfig(
            config_groups=groups,
            format=_FORMAT,
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=list(ignored),
        )
        described: dict[str, Any] = config.model_dump(mode="json", exclude={"moe_sparsity_config"})
        # empty entries and the version are what llm-compressor writes beside the package's own fields
        return {**described, "sparsity_config": {}, "transform_config": {}, "version": version("compressed-tensors")}


def _described(definition: dict[str, Any]) -> QuantizationScheme:
    """The scheme with what llm-compressor fills in where a recipe is silent; newer compressed-tensors leave defaults out."""
    weights = dict(definition["weights"])
    weights["observer"] = weights.get("observer") or "memoryless_minmax"
    if not weights["symmetric"]:
        weights["zp_dtype"] = weights.get("zp_dtype") or "torch.int8"
    return QuantizationScheme(**{**definition, "weights": weights, "format": _FORMAT})


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes (O, I) uint8 -> (O, ceil(I·b/32)) int32. Codes of 4 bit that fill whole words are put together as neighbours in a byte, a tenth
    of the work."""
    if bits != 4 or codes.shape[1] % 8 or sys.byteorder != "little":
        whole: Tensor = pack_to_int32(_signed(codes, bits), bits)
        return whole
    pairs = codes.contiguous().view(torch.int16)  # (O, I/2): the first code in the low byte
    return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8).view(torch.int32)


def _signed(unsigned: Tensor, bits: int) -> Tensor:
    return (unsigned.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _unsigned(signed: Tensor, bits: int) -> Tensor:
    return (signed.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
