"""GPTQ for many small linears at a time: `rounding.py`'s recursion as batched products, one problem per expert.

Each problem has its own Gram matrix, its own order of inputs and its own grid. A GPU, and Python itself, would spend most of their time
between the small products of one expert; side by side they are B times larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from awqdist.quant.grid import QuantizedWeight
from awqdist.quant.rounding import SUB_BLOCK, inverse_factor, rounding_order
from awqdist.recipe import Rounding, WeightScheme

Grid = tuple[Tensor, Tensor]  # weight_scale, zero_point: (O, G)
_BYTES = {
    "cpu": 1 << 29,
    "cuda": 1 << 32,
}  # of Gram matrices and their factors, or of the weights where these are larger


def num_side_by_side(num_outputs: int, num_inputs: int, device: str) -> int:
    """How many problems of (O, I) are solved at a time on that type of device: never by its free memory, which would decide the bytes."""
    return max(1, ceil(_BYTES[device] / (8 * num_inputs * max(num_inputs, num_outputs))))


def round_gptq_side_by_side(
    weights: Sequence[Tensor], grams: Sequence[Tensor], grids: Sequence[Grid], scheme: WeightScheme, rounding: Rounding
) -> list[QuantizedWeight]:
    """Codes of every weight under error compensation. weights: B times (O, I) float32, smoothed; grams: B times (I, I) float32."""
    num_inputs = weights[0].shape[1]
    order = torch.stack([rounding_order(gram, rounding) for gram in grams])  # (B, I)
    factor = torch.stack([inverse_factor(g, o, rounding.dampening_frac)[0] for g, o in zip(grams, order, strict=True)])
    problems = torch.arange(len(weights), device=order.device).unsqueeze(1)  # (B, 1), to pair with rows of `order`
    groups = order // (scheme.group_size if scheme.group_size > 0 else num_inputs)
    scales = torch.stack([scale.float().T for scale, _ in grids])  # (B, G, O)
    zeros = torch.stack([zero.float().T for _, zero in grids])
    work = torch.stack([weight.T[o] for weight, o in zip(weights, order, strict=True)])  # (B, I, O)
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    limit = float((1 << scheme.num_bits) - 1)
    for start in range(0, num_inputs, rounding.block_size):
        block = slice(start, min(start + rounding.block_size, num_inputs))
        here = groups[:, block]
        grid = scales[problems, here], zeros[problems, here], limit
        codes[problems, order[:, block]], errors = round_block(work[:, block], factor[:, block, block], grid)
        work[:, block.stop :] -= factor[:, block, block.stop :].transpose(1, 2) @ errors
    results = codes.transpose(1, 2).contiguous()  # (B, O, I)
    return [QuantizedWeight(c, scale, zero, scheme) for c, (scale, zero) in zip(results, grids, strict=True)]


def round_block(work: Tensor, factor: Tensor, grid: tuple[Tensor, Tensor, float]) -> tuple[Tensor, Tensor]:
    """Rounds a block of the inputs of B problems. Returns their codes (B, k, O) uint8, and the errors (B, k, O) to push onto later inputs.

    work: (B, k, O), used up; factor: (B, k, k); grid: scales and zero points (B, k, O), and the largest code.
    """
    codes, errors = torch.empty_like(work, dtype=torch.uint8), torch.empty_like(work)
    for start in range(0, work.shape[1], SUB_BLOCK):
        part = slice(start, min(start + SUB_BLOCK, work.shape[1]))
        own = grid[0][:, part], grid[1][:, part], grid[2]
        codes[:, part] = _round_columns(work[:, part], factor[:, part, part], own, errors[:, part])
        work[:, part.stop :] -= factor[:, part, part.stop :].transpose(1, 2) @ errors[:, part]
    return codes, errors


def _round_columns(work: Tensor, factor: Tensor, grid: tuple[Tensor, Tensor, float], errors: Tensor) -> Tensor:
    """Rounds the inputs of one sub-block in turn. Returns their codes (B, k, O) uint8 and fills `errors` (B, k, O).

    work: (B, k, O); factor: (B, k, k); grid: scales and zero points (B, k, O), and the largest code.
    """
    step, zero, limit = grid
    codes = torch.empty_like(work)
    pivots = factor.diagonal(dim1=1, dim2=2)  # (B, k)
    for i in range(work.shape[1]):
        column = work[:, i]
        if i:
            column = column - torch.bmm(factor[:, :i, i].unsqueeze(1), errors[:, :i]).squeeze(1)
        code = torch.addcdiv(zero[:, i], column, step[:, i]).round_().clamp_(0, limit)
        codes[:, i] = code
        errors[:, i] = (column - (code - zero[:, i]).mul_(step[:, i])).div_(pivots[:, i : i + 1])
    return codes.to(torch.uint8)
