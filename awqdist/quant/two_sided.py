"""Two-sided error compensation: what is wrong in one output is made up for in others.

GPTQ minimises the error of every output by itself. What a linear adds to the residual stream is read by all that follows, and some
directions of it count a hundred times more than others. With R (O, O) of how much a direction counts, and H the Gram matrix of the inputs,
the error of D is tr(R·D·H·Dᵀ). Where R = Lᵀ·L with L lower triangular that is

    Σ_o L_oo² · ‖ D_o + Σ_{p<o} (L_op / L_oo) · D_p ‖²_H

so that output o is best rounded by GPTQ from a target that its predecessors' errors have moved. (The same error is minimised, by other
means, in YAQA, arXiv 2505.22988, with R from gradients.) Outputs go through in a few blocks, within which they are independent.

Here R is that of the logits: with the rows u_v of lm_head times the final norm's weight, and shares p_v of the tokens in the calibration
text, Σ_v p_v·u_v·u_vᵀ less the part that all logits share. It needs no gradients, and is one matrix for all layers. The shares are of the
square roots of how often tokens occur: what a model says is less even than a text, and less uneven than its most frequent words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.quant.grid import QuantizedWeight
from awqdist.quant.rounding import Columns, factorised, round_in_order, rounding_order
from awqdist.recipe import Rounding, WeightScheme

_DAMPENING = 0.1  # of the mean of R's diagonal
_NUM_BLOCKS = 8
_LEAST_OUTPUTS = 32  # of a block
_ROWS_AT_ONCE = 1 << 12


@dataclass(frozen=True, slots=True)
class OutputOrder:
    """The order (O,) in which outputs are rounded, and L (O, O) float32, lower triangular, in that order."""

    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, weighting: Tensor) -> OutputOrder:
        """weighting: R (O, O) float32, positive semidefinite. Raises NumericalError, see `factorised`."""
        order = rounding_order(weighting, Rounding("gptq"))
        backwards, _ = factorised(weighting, order, _DAMPENING)
        return cls(order, backwards.mT.flip(0, 1).contiguous())


def logit_weighting(head: Tensor, counts: Tensor, norm_weight: Tensor | None) -> Tensor:
    """R, (H, H) float32. head: lm_head's weight (V, H); counts: (V,), how often each token occurs; norm_weight: (H,), what the final norm
    multiplies by."""
    occurring = counts.nonzero().squeeze(1)
    shares = counts[occurring].float().sqrt_()
    shares = (shares / shares.sum()).unsqueeze(1)
    width = head.shape[1]
    moment, mean = torch.zeros(width, width, device=head.device), torch.zeros(width, device=head.device)
    for part in range(0, occurring.shape[0], _ROWS_AT_ONCE):
        own = slice(part, part + _ROWS_AT_ONCE)
        rows = head[occurring[own]].float()
        rows = rows if norm_weight is None else rows * norm_weight.float()
        moment.addmm_(rows.T, rows * shares[own])
        mean += (rows * shares[own]).sum(0)
    return moment.addr_(mean, mean, alpha=-1)


def round_two_sided(
    weight: Tensor, columns: Columns, grid: tuple[Tensor, Tensor], scheme: WeightScheme, outputs: OutputOrder
) -> QuantizedWeight:
    """Codes of `weight` (O, I) float32, smoothed, under compensation over inputs and outputs. grid: weight_scale, zero_point (O, G)."""
    num_outputs = weight.shape[0]
    size = max(_LEAST_OUTPUTS, -(-num_outputs // _NUM_BLOCKS))
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    errors = torch.empty_like(weight)  # in the order of the outputs
    for start in range(0, num_outputs, size):
        stop = min(start + size, num_outputs)
        own = outputs.order[start:stop]
        target = weight[own]
        if start:
            lower = outputs.factor[start:stop]
            moved = lower[:, :start] @ errors[:start]
            target -= torch.linalg.solve_triangular(lower[:, start:stop], moved, upper=False)
        found = round_in_order(target, columns, (grid[0][own], grid[1][own]), scheme)
        codes[own] = found.codes
        errors[start:stop] = found.dequantize().sub_(weight[own])
    return QuantizedWeight(codes, *grid, scheme)
