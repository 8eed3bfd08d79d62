"""Range clipping: per row and group, the shrink of the range that loses least.

Peers estimate the loss on a few hundred sampled tokens; here the g×g diagonal block of the Gram matrix of a group gives it exactly over
all tokens: Σ (D_g·G_g) ∘ D_g, where D_g is the rounding difference of the group under the shrunk range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awqdist.quant.grid import group_range, grouped
from awqdist.recipe import WeightScheme

_SHRINKS = tuple(1.0 - 0.04 * k for k in range(11))  # 1.00, 0.96 … 0.60 of the full range
_MAX_ELEMENTS = 1 << 24  # of one block of rows, to bound the memory


def clipped_range(weight: Tensor, gram: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor, float]:
    """Best range of every group and the share of groups that were shrunk.

    weight: (O, I) float32, smoothed; gram: (I, I) float32 of the smoothed input. Returns low and high (O, G) float32.
    """
    size = scheme.group_size if scheme.group_size > 0 else weight.shape[1]
    starts = range(0, weight.shape[1], size)
    blocks = torch.stack([gram[start : start + size, start : start + size] for start in starts]).to(
        weight.device
    )  # (G, g, g)
    low, high = group_range(weight, scheme)
    best_shrink = torch.ones_like(low)
    rows = max(1, _MAX_ELEMENTS // weight.shape[1])
    for first in range(0, weight.shape[0], rows):
        part = slice(first, first + rows)
        best_shrink[part] = _best_shrink(grouped(weight[part], scheme), low[part], high[part], blocks, scheme)
    return low * best_shrink, high * best_shrink, float((best_shrink < 1).float().mean())


def _best_shrink(weight: Tensor, low: Tensor, high: Tensor, blocks: Tensor, scheme: WeightScheme) -> Tensor:
    """weight: (O, G, g); low, high: (O, G); blocks: (G, g, g). Returns (O, G)."""
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
    """Nearest grid values of weight (O, G, g) under ranges (O, G), float32."""
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
