"""The integer grid of a weight: group ranges (clipped where that loses less), scales, zero points, codes and back.

    scale = (hi - lo) / (2^b - 1)      zero = round(clamp(-lo/scale, 0, 2^b - 1))      code = round(clamp(w/scale +
    zero, 0, 2^b - 1))

with lo = min(w_min, 0) and hi = max(w_max, 0) of a group of `group_size` inputs in one row. Codes and zero points are
unsigned here; only exporters shift them. What is stored is, bit for bit, what compressed-tensors' own functions
(`calculate_qparams`, `quantize`) give in the checkpoint's dtype, so that any reader of that format computes the same
numbers. The search evaluates thousands of candidate grids and uses the float32 twin `rounding_difference`; the tests
hold both against the library.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from awqdist.quant.precision import has_data, read_value, repeatable
from awqdist.recipe import WeightScheme

_CACHED_ELEMENTS = 1 << 17  # per CPU core
_SHRINKS = tuple(1.0 - 0.04 * k for k in range(11))  # 1.00, 0.96 … 0.60 of the full range
_CLIPPED_AT_ONCE = 1 << 24  # elements, to bound the memory


@dataclass(frozen=True, slots=True)
class Grid:
    """The grid that a weight (O, I) is rounded on.

    weight_scale: (O, G) in the checkpoint's dtype; zero_point: (O, G) uint8, unsigned.
    """

    weight_scale: Tensor
    zero_point: Tensor
    scheme: WeightScheme

    def with_codes(self, codes: Tensor) -> QuantizedWeight:
        """Returns the weight with codes (O, I) uint8 on this grid."""
        return QuantizedWeight(codes, self.weight_scale, self.zero_point, self.scheme)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """One linear on its grid.

    codes: (O, I) uint8; weight_scale: (O, G) in the checkpoint's dtype; zero_point: (O, G) uint8, unsigned.
    """

    codes: Tensor
    weight_scale: Tensor
    zero_point: Tensor
    scheme: WeightScheme

    def to(self, device: torch.device) -> QuantizedWeight:
        """Returns the weight with all tensors on `device`; tensors already there are not copied."""
        return QuantizedWeight(
            self.codes.to(device), self.weight_scale.to(device), self.zero_point.to(device), self.scheme
        )

    def rows(self, rows: slice | Tensor) -> QuantizedWeight:
        """Returns the weight of some outputs only."""
        return QuantizedWeight(self.codes[rows], self.weight_scale[rows], self.zero_point[rows], self.scheme)

    def dequantize(self) -> Tensor:
        """Returns the weight (O, I) float32 that a reader of the checkpoint computes, before it rounds to its own dtype."""
        num_groups = self.weight_scale.shape[1]
        values: Tensor = self.codes.float().unflatten(1, (num_groups, -1))  # (O, G, g)
        values.sub_(self.zero_point.float().unsqueeze(-1)).mul_(self.weight_scale.float().unsqueeze(-1))
        return values.flatten(1)


def scheme_args(scheme: WeightScheme) -> QuantizationArgs:
    """Returns the compressed-tensors arguments of a weight scheme."""
    is_grouped = scheme.group_size > 0
    return QuantizationArgs(
        num_bits=scheme.num_bits,
        symmetric=scheme.symmetric,
        strategy=QuantizationStrategy.GROUP if is_grouped else QuantizationStrategy.CHANNEL,
        group_size=scheme.group_size if is_grouped else None,
    )


def grouped(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """Returns `weight` (..., I) as a view (..., G, g)."""
    groups: Tensor = weight.unflatten(-1, (-1, scheme.group_size if scheme.group_size > 0 else weight.shape[-1]))
    return groups


def cached_elements(weight: Tensor) -> int:
    """Returns how many values of `weight` are worked through at a time, so that they stay in the caches of the CPU cores.

    When a layer is measured they are a sixteenth of it at least, since counting every block of a wide linear takes minutes.
    """
    fitting = _CACHED_ELEMENTS * torch.get_num_threads()
    return fitting if has_data(weight) else max(fitting, weight.numel() // 16)


def group_range(weight: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """Returns the smallest and the largest weight of every group, each (O, G) in the dtype of `weight`."""
    groups = grouped(weight.float(), scheme)  # torch is slow at extremes of bfloat16, and at both in one call
    return groups.amin(-1).to(weight.dtype), groups.amax(-1).to(weight.dtype)


@repeatable
def make_grid(low: Tensor, high: Tensor, scheme: WeightScheme) -> Grid:
    """Returns the grid over the ranges `low`, `high` (O, G). Its scale keeps their dtype."""
    weight_scale, zero_point = calculate_qparams(low, high, scheme_args(scheme))
    unsigned = (zero_point.to(torch.int16) + (1 << (scheme.num_bits - 1))).to(torch.uint8)
    return Grid(weight_scale, unsigned, scheme)


def round_to_nearest(weight: Tensor, grid: Grid, dtype: torch.dtype | None = None) -> QuantizedWeight:
    """Rounds `weight` (O, I), any float dtype, to the nearest codes on a grid that was fixed before.

    The codes are in every bit those of compressed-tensors' `quantize` of the weight in `dtype` (default: its own):
    its steps in its order, on the signed grid. On a CPU the rows are worked through in blocks that stay in the cache.
    """
    scheme = grid.scheme
    offset = 1 << (scheme.num_bits - 1)
    dtype = dtype or weight.dtype
    scale, zero = grid.weight_scale.unsqueeze(-1), (grid.zero_point.unsqueeze(-1).to(torch.int16) - offset).to(dtype)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    rows = weight.shape[0] if weight.is_cuda else max(1, cached_elements(weight) // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        block = slice(start, start + rows)
        signed = grouped(weight[block].to(dtype), scheme) / scale[block]  # (rows, G, g)
        signed.add_(zero[block]).clamp_(-offset, offset - 1).round_()
        codes[block] = signed.to(torch.int8).view(torch.uint8).add_(offset).flatten(1)  # modulo 256
    return grid.with_codes(codes)


@repeatable
def rounding_difference(weight: Tensor, scales: Tensor, scheme: WeightScheme, dtype: torch.dtype) -> Tensor:
    """Returns D = Q(W·diag(s))·diag(1/s) - W, the change of the effective weight when W is smoothed by s and rounded to nearest.

    On a CPU the rows are worked through in blocks that stay in the cache.

    Args:
        weight: W, (O, I), or (B, O, I) of B problems, any float dtype.
        scales: s, (I,) or (B, I) float32.
        scheme: the grid's bits, symmetry and group size.
        dtype: the dtype that group scales are stored in.

    Returns:
        D in the shape of `weight`, float32.
    """
    if weight.ndim == 2:
        return rounding_difference(weight.unsqueeze(0), scales.unsqueeze(0), scheme, dtype).squeeze(0)
    difference = torch.empty_like(weight, dtype=torch.float32)
    num_problems, num_rows, width = weight.shape
    rows = num_rows if weight.is_cuda else min(num_rows, max(1, cached_elements(weight) // width))
    problems = num_problems if weight.is_cuda else max(1, cached_elements(weight) // (num_rows * width))
    for first in range(0, num_problems, problems):
        own = scales[first : first + problems].unsqueeze(1)  # (b, 1, I)
        for start in range(0, num_rows, rows):
            block = slice(first, first + problems), slice(start, start + rows)
            _difference_of_block(weight[block].float(), own, scheme, dtype, difference[block])
    return difference


def _difference_of_block(weight: Tensor, scales: Tensor, scheme: WeightScheme, dtype: torch.dtype, out: Tensor) -> None:
    """Writes the `rounding_difference` of (b, rows, I) to `out`. scales: (b, 1, I); all float32."""
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


def clipped_range(weight: Tensor, gram: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor, float]:
    """Shrinks the range of every group where that loses least under the Gram matrix.

    Peers estimate the loss on a few hundred sampled tokens. Here the g×g block of the Gram matrix on its diagonal gives it exactly over all
    tokens: Σ (D_g·G_g) ∘ D_g, where D_g is the rounding difference of the group under the shrunk range.

    Args:
        weight: (O, I) float32, smoothed.
        gram: (I, I) float32, of the smoothed input.
        scheme: the grid's bits, symmetry and group size.

    Returns:
        The lowest and the highest value of every group, each (O, G) float32, and the share of groups that were shrunk.
    """
    size = scheme.group_size if scheme.group_size > 0 else weight.shape[1]
    starts = range(0, weight.shape[1], size)
    blocks = torch.stack([gram[start : start + size, start : start + size] for start in starts])  # (G, g, g)
    blocks = blocks.to(weight.device)
    low, high = group_range(weight, scheme)
    best_shrink = torch.ones_like(low)
    rows = max(1, _CLIPPED_AT_ONCE // weight.shape[1])
    for first in range(0, weight.shape[0], rows):
        part = slice(first, first + rows)
        best_shrink[part] = _best_shrink(grouped(weight[part], scheme), low[part], high[part], blocks, scheme)
    return low * best_shrink, high * best_shrink, read_value((best_shrink < 1).float().mean(), 0.0)


def _best_shrink(weight: Tensor, low: Tensor, high: Tensor, blocks: Tensor, scheme: WeightScheme) -> Tensor:
    """Returns the best shrink (O, G). weight: (O, G, g); low, high: (O, G); blocks: (G, g, g)."""
    best_error = torch.full_like(low, float("inf"))
    best_shrink = torch.ones_like(low)
    for shrink in _SHRINKS:
        difference = _fake_quantize(weight, low * shrink, high * shrink, scheme).sub_(weight)
        by_group = difference.transpose(0, 1)  # (G, O, g)
        error = torch.bmm(by_group, blocks).mul_(by_group).sum(-1).T  # (O, G)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_shrink = torch.where(better, torch.full_like(best_shrink, shrink), best_shrink)
    return best_shrink


def _fake_quantize(weight: Tensor, low: Tensor, high: Tensor, scheme: WeightScheme) -> Tensor:
    """Returns the nearest grid values of weight (O, G, g) under ranges (O, G), float32."""
    limit = float((1 << scheme.num_bits) - 1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if scheme.symmetric:
        step = torch.maximum(high, -low).div_(limit / 2).clamp_(min=1e-12)
        zero = torch.full_like(step, float(1 << (scheme.num_bits - 1)))
    else:
        step = (high - low).div_(limit).clamp_(min=1e-12)
        zero = (-low / step).round_().clamp_(0, limit)
    step, zero = step.unsqueeze(-1), zero.unsqueeze(-1)
    return torch.addcdiv(zero, weight, step).round_().clamp_(0, limit).sub_(zero).mul_(step)
