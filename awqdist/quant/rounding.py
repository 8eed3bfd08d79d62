"""GPTQ: error-compensated rounding (arXiv 2210.17323) on a grid that is fixed beforehand.

Inputs are rounded one after the other; the error of each is pushed onto the inputs not yet rounded, along the inverse Hessian
H⁻¹ = (XᵀX + λI)⁻¹, so that the outputs change least. With activation order the inputs of largest Gram diagonal go first: a permutation
inside this function only. Group scales are fixed before and codes are returned in plain order, so no `g_idx` is stored.

All rows (all linears that read one input, stacked) are independent and go through together. Work is blocked twice: errors inside a
sub-block are applied just in time as one small product per column, everything behind it by one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.errors import NumericalError
from awqdist.quant.grid import QuantizedWeight
from awqdist.recipe import Rounding, WeightScheme

SUB_BLOCK = 32
_INVERSE_BLOCK = 512
_REVERSED_AT_ONCE = 1 << 20
_MAX_DAMPENING = 1.0


def rounding_order(gram: Tensor, rounding: Rounding) -> Tensor:
    """The order (I,) in which the inputs of a Gram matrix (I, I) are rounded."""
    if rounding.actorder:
        return torch.argsort(gram.diagonal(), descending=True, stable=True)
    return torch.arange(gram.shape[0], device=gram.device)


def inverse_factor(gram: Tensor, order: Tensor, dampening_frac: float) -> tuple[Tensor, float]:
    """Upper triangular U (I, I) with Uᵀ·U = (H + λI)⁻¹, λ = dampening · mean(diag), and the dampening that was needed.

    H is `gram` with rows and columns in `order` (I,). Raises NumericalError, see `factorised`.
    """
    # with J the reversal, J·H·J = L·Lᵀ gives U = J·L⁻¹·J: one factorisation and one triangular inverse
    lower, dampening = factorised(gram, order, dampening_frac)
    _invert_lower(lower)
    _reverse(lower.mT)
    return lower, dampening


def factorised(gram: Tensor, order: Tensor, dampening_frac: float) -> tuple[Tensor, float]:
    """Lower triangular L (I, I) with L·Lᵀ = H + λI, λ = dampening · mean(diag), and the dampening that was needed.

    H is `gram` with rows and columns in `order` (I,) reversed. Inputs that were never active get the mean diagonal of the others, and are
    thereby rounded to nearest; the mean, so that neither their number nor the size of the activations decides how much dampening the
    others get. If the factorisation fails the dampening is raised tenfold. Raises NumericalError above 1.
    """
    turned = order.flip(0)
    dampening = dampening_frac
    while dampening <= max(_MAX_DAMPENING, dampening_frac):
        lower = _hessian(gram, turned, dampening).mT  # column by column, so that it is factorised in its place
        failed = torch.linalg.cholesky_ex(lower, out=(lower, torch.empty((), dtype=torch.int32, device=gram.device)))[1]
        if not int(failed):
            return lower, dampening
        dampening = max(dampening * 10, 1e-4)
    raise NumericalError(
        f"the Gram matrix of {gram.shape[0]} inputs is not positive definite even with dampening 1; "
        "check the calibration text and the weights of this layer, or use rounding: nearest"
    )


def _hessian(gram: Tensor, order: Tensor, dampening: float) -> Tensor:
    """(I, I): H + λI, a new tensor, with rows and columns in `order` (I,)."""
    hessian = gram[order.unsqueeze(1), order]
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = float(diagonal.sum() / (~dead).sum().clamp(min=1)) or 1.0
    diagonal[dead] = mean
    diagonal += dampening * mean
    return hessian


def _invert_lower(lower: Tensor) -> None:
    """Replaces a lower triangular L (I, I) by its inverse. By halves, [[A, 0], [B, C]] -> [[A⁻¹, 0], [-C⁻¹·B·A⁻¹, C⁻¹]]: mostly matrix
    products, and no second matrix of that size."""
    size = lower.shape[0]
    if size <= _INVERSE_BLOCK:
        unit = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, unit, upper=False))
        return
    half = size // 2
    _invert_lower(lower[:half, :half])
    _invert_lower(lower[half:, half:])
    lower[half:, :half] = (lower[half:, half:] @ (lower[half:, :half] @ lower[:half, :half])).neg_()


def _reverse(matrix: Tensor) -> None:
    """Turns a contiguous matrix round, first row and first column last, in its place."""
    values = matrix.view(-1)
    half, end = values.numel() // 2, values.numel()
    for start in range(0, half, _REVERSED_AT_ONCE):
        stop = min(start + _REVERSED_AT_ONCE, half)
        front = values[start:stop].flip(0)
        values[start:stop] = values[end - stop : end - start].flip(0)
        values[end - stop : end - start] = front


@dataclass(frozen=True, slots=True)
class Columns:
    """The order (I,) in which inputs are rounded, the factor U (I, I) in that order, and how many go through at a time."""

    order: Tensor
    factor: Tensor
    block_size: int

    @classmethod
    def of(cls, gram: Tensor, rounding: Rounding) -> Columns:
        """gram: (I, I) float32 of the smoothed input. It is factorised where it lies. Raises NumericalError, see `factorised`."""
        order = rounding_order(gram, rounding)
        return cls(order, inverse_factor(gram, order, rounding.dampening_frac)[0], rounding.block_size)


def round_gptq(
    weight: Tensor, gram: Tensor, weight_scale: Tensor, zero_point: Tensor, scheme: WeightScheme, rounding: Rounding
) -> QuantizedWeight:
    """Codes of `weight` under error compensation.

    weight: (O, I) float32, smoothed; gram: (I, I) float32 of the smoothed input; weight_scale, zero_point: (O, G), the fixed grid.
    """
    return round_in_order(weight, Columns.of(gram, rounding), (weight_scale, zero_point), scheme)


def round_in_order(
    weight: Tensor, columns: Columns, grid: tuple[Tensor, Tensor], scheme: WeightScheme
) -> QuantizedWeight:
    """The same with the matrix factorised already; the factor comes to the weights block by block. grid: weight_scale, zero_point."""
    weight_scale, zero_point = grid
    order, factor = columns.order.to(weight.device), columns.factor
    groups = order // (scheme.group_size if scheme.group_size > 0 else weight.shape[1])
    scales, zeros = weight_scale.float().T, zero_point.float().T  # (G, O)
    work = weight.T[order]  # (I, O): an input's weights lie together
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    limit = float((1 << scheme.num_bits) - 1)
    for start in range(0, work.shape[0], columns.block_size):
        stop = min(start + columns.block_size, work.shape[0])
        errors = torch.empty_like(work[start:stop])
        block = factor[start:stop].to(work.device)  # (k, I)
        for sub_start in range(start, stop, SUB_BLOCK):
            part = slice(sub_start, min(sub_start + SUB_BLOCK, stop))
            own = slice(sub_start - start, part.stop - start)
            sub_errors = errors[own]
            here = scales[groups[part]], zeros[groups[part]], limit
            codes[order[part]] = _round_columns(work[part], block[own, part], here, sub_errors)
            work[part.stop : stop].addmm_(block[own, part.stop : stop].T, sub_errors, alpha=-1)
        work[stop:].addmm_(block[:, stop:].T, errors, alpha=-1)
    return QuantizedWeight(codes.T.contiguous(), weight_scale, zero_point, scheme)


def _round_columns(work: Tensor, factor: Tensor, grid: tuple[Tensor, Tensor, float], errors: Tensor) -> Tensor:
    """Rounds the inputs of one sub-block in turn. Returns their codes (k, O) uint8 and fills `errors` (k, O).

    work: (k, O); factor: (k, k); grid: scales and zero points (k, O), and the largest code.
    """
    step, zero, limit = grid
    codes = torch.empty_like(work)
    for i, pivot in enumerate(factor.diagonal().tolist()):
        column = work[i]
        if i:
            column = column - factor[:i, i] @ errors[:i]
        torch.addcdiv(zero[i], column, step[i], out=codes[i]).round_().clamp_(0, limit)
        restored = (codes[i] - zero[i]).mul_(step[i])
        torch.sub(column, restored, out=errors[i]).div_(pivot)
    return codes.to(torch.uint8)
