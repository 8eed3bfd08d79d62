"""What a linear makes up for of the rounding of those before it (as GPTAQ, arXiv 2504.02692, does between layers).

Where inputs h come as h + e, since what computes them was rounded, the weight that gives W·h best is W + C with

    C = E·Hq⁻¹,    E = Σ_t W·(h - hq)·hqᵀ,    Hq = Σ_t hq·hqᵀ

of the inputs hq = h + e as they come. An MLP's intermediate channels are many more than its inputs, so they tell most of their own error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awqdist.quant.rounding import factorised


def correction(gram: Tensor, lost: Tensor, dampening_frac: float) -> Tensor:
    """C, (O, I) float32. gram: Hq + λI is solved with, λ = dampening · mean(diag), (I, I) float32; lost: Eᵀ, (I, O) float32.

    Raises NumericalError, see `factorised`.
    """
    order = torch.arange(gram.shape[0], device=gram.device)
    lower, _ = factorised(gram, order, dampening_frac)
    solved = torch.cholesky_solve(lost.flip(0).to(gram.device), lower)
    return solved.flip(0).T.to(lost.device)
