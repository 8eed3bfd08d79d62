"""The integer grid: group ranges, scales, zero points, codes and back.

    scale = (hi - lo) / (2^b - 1)      zero = round(clamp(-lo/scale, 0, 2^b - 1))      code = round(clamp(w/scale + zero, 0, 2^b - 1))

with lo = min(w_min, 0) and hi = max(w_max, 0) of a group of `group_size` inputs in one row. Codes and zero points are unsigned
here; only exporters shift them. What is stored is, bit for bit, what compressed-tensors' own functions (`calculate_qparams`, `quantize`)
give in the checkpoint's dtype, so that any reader of that format computes the same numbers; the search evaluates thousands of candidate
grids and uses the float32 twin `rounding_difference`. The tests hold both against the library.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from awqdist.recipe import WeightScheme

_CACHED_ELEMENTS = 1 << 17  # of each core


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """One linear on its grid.

    codes: (O, I) uint8; weight_scale: (O, G) in the checkpoint's dtype; zero_point: (O, G) uint8, on the unsigned grid.
    """

    codes: Tensor
    weight_scale: Tensor
    zero_point: Tensor
    scheme: WeightScheme

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same on another device, as far as it is not there."""
        return QuantizedWeight(
            self.codes.to(device), self.weight_scale.to(device), self.zero_point.to(device), self.scheme
        )

    def dequantize(self) -> Tensor:
        """(O, I) float32: what a reader of the checkpoint computes, before it rounds to its own dtype."""
        num_groups = self.weight_scale.shape[1]
        values: Tensor = self.codes.float().unflatten(1, (num_groups, -1))  # (O, G, g)
        values.sub_(self.zero_point.float().unsqueeze(-1)).mul_(self.weight_scale.float().unsqueeze(-1))
        return values.flatten(1)


def scheme_args(scheme: WeightScheme) -> QuantizationArgs:
    """The compressed-tensors arguments of a weight scheme."""
    grouped = scheme.group_size > 0
    return QuantizationArgs(
        num_bits=scheme.num_bits,
        symmetric=scheme.symmetric,
        strategy=QuantizationStrategy.GROUP if grouped else QuantizationStrategy.CHANNEL,
        group_size=scheme.group_size if grouped else None,
    )


def grouped(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """View of `weight` (..., I) as (..., G, g)."""
    groups: Tensor = weight.unflatten(-1, (-1, scheme.group_size if scheme.group_size > 0 else weight.shape[-1]))
    return groups


def cached_elements() -> int:
    """How many float32 values the cores of a CPU keep at hand while several operations go over them."""
    return _CACHED_ELEMENTS * torch.get_num_threads()


def group_range(weight: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of every group, each (O, G), dtype of `weight`."""
    groups = grouped(weight.float(), scheme)  # torch is slow at extremes of bfloat16, and at both in one call
    return groups.amin(-1).to(weight.dtype), groups.amax(-1).to(weight.dtype)


def grid_parameters(low: Tensor, high: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """Scale and unsigned zero point, each (O, G), of the ranges `low`, `high` (O, G); the scale keeps their dtype."""
    weight_scale, zero_point = calculate_qparams(low, high, scheme_args(scheme))
    return weight_scale, (zero_point.to(torch.int16) + (1 << (scheme.num_bits - 1))).to(torch.uint8)


def round_to_nearest(
    weight: Tensor, weight_scale: Tensor, zero_point: Tensor, scheme: WeightScheme, dtype: torch.dtype | None = None
) -> QuantizedWeight:
    """Codes of `weight` (O, I), any float dtype, on a grid (O, G) that was fixed before.

    They are in every bit what compressed-tensors' `quantize` makes of the weight in `dtype`, or in its own if that is None: its steps in
    its order, on the signed grid. On a CPU the rows are worked through in blocks that stay in the cache.
    """
    offset = 1 << (scheme.num_bits - 1)
    dtype = dtype or weight.dtype
    scale, zero = weight_scale.unsqueeze(-1), (zero_point.unsqueeze(-1).to(torch.int16) - offset).to(dtype)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    rows = weight.shape[0] if weight.is_cuda else max(1, cached_elements() // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        block = slice(start, start + rows)
        signed = grouped(weight[block].to(dtype), scheme) / scale[block]  # (rows, G, g)
        signed.add_(zero[block]).clamp_(-offset, offset - 1).round_()
        codes[block] = signed.to(torch.int8).view(torch.uint8).add_(offset).flatten(1)  # modulo 256
    return QuantizedWeight(codes, weight_scale, zero_point, scheme)


def rounding_difference(weight: Tensor, scales: Tensor, scheme: WeightScheme, dtype: torch.dtype) -> Tensor:
    """D = Q(W·diag(s))·diag(1/s) - W, the change of the effective weight when W is smoothed by `scales` and rounded to nearest.

    weight: (O, I), or (B, O, I) of B problems, any float dtype; scales: (I,) or (B, I) float32, `smooth_scales`; dtype: what the group
    scales are stored in. Returns float32, in the shape of `weight`. On a CPU the rows are worked through in blocks that stay in the cache.
    """
    if weight.ndim == 2:
        return rounding_difference(weight.unsqueeze(0), scales.unsqueeze(0), scheme, dtype).squeeze(0)
    difference = torch.empty_like(weight, dtype=torch.float32)
    num_problems, num_rows, width = weight.shape
    rows = num_rows if weight.is_cuda else min(num_rows, max(1, cached_elements() // width))
    problems = num_problems if weight.is_cuda else max(1, cached_elements() // (num_rows * width))
    for first in range(0, num_problems, problems):
        own = scales[first : first + problems].unsqueeze(1)  # (b, 1, I)
        for start in range(0, num_rows, rows):
            block = slice(first, first + problems), slice(start, start + rows)
            _difference_of_block(weight[block].float(), own, scheme, dtype, difference[block])
    return difference


def _difference_of_block(weight: Tensor, scales: Tensor, scheme: WeightScheme, dtype: torch.dtype, out: Tensor) -> None:
    """`rounding_difference` of (b, rows, I), written to `out`. scales: (b, 1, I); all float32."""
    limit = float((1 << scheme.num_bits) - 1)
    smoothed = grouped(weight * scales, scheme)  # (b, rows, G, g)
    low, high = smoothed.amin(-1, keepdim=True), smoothed.amax(-1, keepdim=True)
    if scheme.symmetric:
        step = torch.maximum(high, low.neg()).div_(limit / 2).to(dtype).float()
        zero = torch.full_like(step, float(1 << (scheme.num_bits - 1)))
    else:
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        step = ((high - low).div_(limit)).to(dtype).float()
        zero = (low / step).neg_().nan_to_num_(0.0).clamp_(0, limit).round_()
    step.masked_fill_(step == 0, torch.finfo(dtype).eps)
    rounded = torch.div(smoothed, step).add_(zero).round_().clamp_(0, limit)
    torch.sub(rounded.sub_(zero).mul_(step), smoothed, out=smoothed)
    torch.div(smoothed.flatten(-2), scales, out=out)
