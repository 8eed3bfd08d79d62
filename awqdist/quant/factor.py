"""Factorises Gram matrices for GPTQ, and solves the ridge regression that refits a linear to its rounded inputs.

With H = XᵀX of the calibration inputs and λ = dampening · mean(diag H), GPTQ needs the upper triangular U with Uᵀ·U =
(H + λI)⁻¹. With J the reversal of all inputs, J·(H + λI)·J = L·Lᵀ gives U = J·L⁻¹·J: one factorisation and one
triangular inverse, both in the memory of one matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awqdist.errors import NumericalError
from awqdist.quant.precision import read_value, repeatable
from awqdist.recipe import Rounding

_INVERSE_BLOCK = 512
_REVERSED_AT_ONCE = 1 << 20  # elements
_MAX_DAMPENING = 1.0


def rounding_order(gram: Tensor, rounding: Rounding) -> Tensor:
    """Returns the order (I,) in which inputs are rounded: with activation order those of largest Gram diagonal first."""
    if rounding.actorder:
        return torch.argsort(gram.diagonal(), descending=True, stable=True)
    return torch.arange(gram.shape[0], device=gram.device)


@repeatable
def reversed_cholesky(gram: Tensor, order: Tensor, dampening_frac: float) -> tuple[Tensor, float]:
    """Factorises H + λI with its inputs in reversed rounding order, raising the dampening tenfold while that fails.

    Inputs that were never active get the mean diagonal of the others, so that they are rounded to nearest. The mean,
    since neither their number nor the size of the activations may decide how much dampening the others get.

    Args:
        gram: (I, I) float32, H.
        order: (I,), the order in which inputs are rounded.
        dampening_frac: λ as a fraction of the mean of H's diagonal.

    Returns:
        The lower triangular L (I, I) with L·Lᵀ = H + λI, rows and columns in `order` reversed, and the dampening that
        was used.

    Raises:
        NumericalError: H is not positive definite even with dampening 1.
    """
    dampening = dampening_frac
    while dampening <= max(_MAX_DAMPENING, dampening_frac):
        lower = _hessian(gram, order.flip(0), dampening).mT  # column by column, so that it is factorised in place
        failed = torch.linalg.cholesky_ex(lower, out=(lower, torch.empty((), dtype=torch.int32, device=gram.device)))[1]
        if not read_value(failed, 0):
            return lower, dampening
        dampening = max(dampening * 10, 1e-4)
    raise NumericalError(
        f"the Gram matrix of {gram.shape[0]} inputs is not positive definite even with dampening 1; "
        "check the calibration text and the weights of this layer, or use rounding: nearest"
    )


@repeatable
def inverse_cholesky(gram: Tensor, order: Tensor, dampening_frac: float) -> tuple[Tensor, float]:
    """Returns the upper triangular U (I, I) with Uᵀ·U = (H + λI)⁻¹, rows and columns in `order`, and the dampening that was used.

    The arguments and errors are those of `reversed_cholesky`.
    """
    lower, dampening = reversed_cholesky(gram, order, dampening_frac)
    _invert_lower(lower)
    _reverse(lower.mT)
    return lower, dampening


def refit_correction(gram: Tensor, lost: Tensor, dampening_frac: float) -> Tensor:
    """Returns the correction C of a linear for the rounding errors of the linears that feed it.

    GPTAQ (arXiv 2504.02692) does the same between layers. Where the linear reads hq instead of h, because what
    computes h was rounded, the best weight for W·h is W + C with C = E·(Hq + λI)⁻¹, Hq = Σ_t hq·hqᵀ and E = Σ_t W·(h
    - hq)·hqᵀ.

    Args:
        gram: (I, I) float32, Hq.
        lost: (I, O) float32, Eᵀ.
        dampening_frac: λ as a fraction of the mean of Hq's diagonal.

    Returns:
        C, (O, I) float32, on the device of `lost`.

    Raises:
        NumericalError: see `reversed_cholesky`.
    """
    order = torch.arange(gram.shape[0], device=gram.device)
    lower, _ = reversed_cholesky(gram, order, dampening_frac)
    solved = torch.cholesky_solve(lost.flip(0).to(gram.device), lower)
    return solved.flip(0).T.to(lost.device)


def _hessian(gram: Tensor, order: Tensor, dampening: float) -> Tensor:
    """Returns H + λI (I, I) as a new tensor, with rows and columns in `order` (I,)."""
    hessian = gram[order.unsqueeze(1), order]
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / (~dead).sum().clamp(min=1)
    mean = torch.where(mean == 0, 1.0, mean)
    diagonal.masked_fill_(dead, mean)
    diagonal += (mean.double() * dampening).float()
    return hessian


def _invert_lower(lower: Tensor) -> None:
    """Inverts a lower triangular (I, I) in place, by halves: [[A, 0], [B, C]] becomes [[A⁻¹, 0], [-C⁻¹·B·A⁻¹, C⁻¹]].

    That is mostly matrix products, and takes no second matrix of that size.
    """
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
    """Reverses the rows and the columns of a contiguous matrix in place."""
    values = matrix.view(-1)
    half, end = values.numel() // 2, values.numel()
    for start in range(0, half, _REVERSED_AT_ONCE):
        stop = min(start + _REVERSED_AT_ONCE, half)
        front = values[start:stop].flip(0)
        values[start:stop] = values[end - stop : end - start].flip(0)
        values[end - stop : end - start] = front
