"""GPTQ: error-compensated rounding (arXiv 2210.17323) on a grid that is fixed beforehand.

Inputs are rounded one after the other; the error of each is pushed onto the inputs not yet rounded, along the inverse Hessian
H⁻¹ = (XᵀX + λI)⁻¹, so that the outputs change least. With activation order the inputs of largest Gram diagonal go first: a permutation
inside this function only. Group scales are fixed before and codes are returned in plain order, so no `g_idx` is stored.

All rows (all linears that read one input, stacked) are independent and go through together. Work is blocked twice: errors inside a
sub-block are applied just in time as one small product per column, everything behind it by one matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awqdist.errors import NumericalError
from awqdist.quant.grid import QuantizedWeight
from awqdist.recipe import Rounding, WeightScheme

_SUB_BLOCK = 32
_MAX_DAMPENING = 1.0


def inverse_factor(gram: Tensor, dampening_frac: float) -> tuple[Tensor, float]:
    """Upper triangular U (I, I) with Uᵀ·U = (gram + λI)⁻¹, λ = dampening · mean(diag), and the dampening that was needed.

    Inputs that were never active get a unit diagonal: they are rounded to nearest. If the factorisation fails the dampening is
    raised tenfold. Raises NumericalError above 1.
    """
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    mean = float(diagonal.mean())
    added, dampening = 0.0, dampening_frac
    while dampening <= _MAX_DAMPENING:
        diagonal += dampening * mean - added
        added = dampening * mean
        # with J the reversal: J·H·J = L·Lᵀ, so H = R·Rᵀ with R = J·L·J upper triangular, and U = R⁻¹
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not int(failed):
            upper = lower.flip(0, 1)
            identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
            return torch.linalg.solve_triangular(upper, identity, upper=True), dampening
        dampening = max(dampening * 10, 1e-4)
    raise NumericalError(
        f"the Gram matrix of {gram.shape[0]} inputs is not positive definite even with dampening 1; "
        "check the calibration text and the weights of this layer, or use rounding: nearest"
    )


def round_gptq(
    weight: Tensor, gram: Tensor, weight_scale: Tensor, zero_point: Tensor, scheme: WeightScheme, rounding: Rounding
) -> QuantizedWeight:
    """Codes of `weight` under error compensation.

    weight: (O, I) float32, smoothed; gram: (I, I) float32 of the smoothed input; weight_scale, zero_point: (O, G), the fixed grid.
    """
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if rounding.actorder else None
    if order is not None:
        gram, weight = gram[order][:, order], weight[:, order]
    factor, _ = inverse_factor(gram, rounding.dampening_frac)
    size = scheme.group_size if scheme.group_size > 0 else weight.shape[1]
    inputs = torch.arange(weight.shape[1], device=weight.device) if order is None else order
    step = weight_scale.float().T[inputs // size].contiguous()  # (I, O)
    zero = zero_point.float().T[inputs // size].contiguous()  # (I, O)
    work = weight.T.contiguous()  # (I, O): an input's weights lie together
    codes = torch.empty_like(work)
    limit = float((1 << scheme.num_bits) - 1)
    for start in range(0, work.shape[0], rounding.block_size):
        stop = min(start + rounding.block_size, work.shape[0])
        errors = torch.empty_like(work[start:stop])
        for sub_start in range(start, stop, _SUB_BLOCK):
            sub_stop = min(sub_start + _SUB_BLOCK, stop)
            part = slice(sub_start, sub_stop)
            sub_errors = errors[sub_start - start : sub_stop - start]
            _round_columns(work[part], factor[part, part], step[part], zero[part], (codes[part], sub_errors), limit)
            work[sub_stop:stop].addmm_(factor[part, sub_stop:stop].T, sub_errors, alpha=-1)
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    if order is not None:
        codes = torch.empty_like(codes).index_copy_(0, order, codes)
    return QuantizedWeight(codes.T.to(torch.uint8).contiguous(), weight_scale, zero_point, scheme)


def _round_columns(
    work: Tensor, factor: Tensor, step: Tensor, zero: Tensor, out: tuple[Tensor, Tensor], limit: float
) -> None:
    """Rounds the inputs of one sub-block in turn. work, step, zero and the two outputs (codes, errors): (k, O); factor: (k, k)."""
    codes, errors = out
    pivots = factor.diagonal().tolist()
    for i, pivot in enumerate(pivots):
        column = work[i]
        if i:
            column = column - factor[:i, i] @ errors[:i]
        torch.addcdiv(zero[i], column, step[i], out=codes[i]).round_().clamp_(0, limit)
        restored = (codes[i] - zero[i]).mul_(step[i])
        torch.sub(column, restored, out=errors[i]).div_(pivot)
