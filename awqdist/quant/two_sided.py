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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.quant.grid import QuantizedWeight
from awqdist.quant.rounding import Columns, factorised, rounding_order
from awqdist.quant.rounding_experts import round_block
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


def block_of_outputs(num_outputs: int) -> int:
    """How many outputs are rounded at a time."""
    return max(_LEAST_OUTPUTS, -(-num_outputs // _NUM_BLOCKS))


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
    """Codes of `weight` (O, I) float32, smoothed, under compensation over inputs and outputs. grid: weight_scale, zero_point (O, G).

    A block of outputs needs the errors of those before it only at the inputs that it rounds. So all blocks go on at a time, each one block
    of inputs behind the one before it: there are hardly more steps than under one-sided compensation.
    """
    blocks = _Blocks(weight, columns, grid, scheme, outputs)
    for step in range(blocks.num_outer + blocks.num_inner - 1):
        places = [(outer, step - outer) for outer in range(blocks.num_outer) if 0 <= step - outer < blocks.num_inner]
        for shape in dict.fromkeys(blocks.shape(*place) for place in places):  # the last blocks may be smaller
            blocks.round([place for place in places if blocks.shape(*place) == shape])
    return QuantizedWeight(blocks.codes, *grid, scheme)


class _Blocks:
    """Blocks of outputs, each with its own weights that are still to be rounded, and blocks of inputs."""

    def __init__(
        self,
        weight: Tensor,
        columns: Columns,
        grid: tuple[Tensor, Tensor],
        scheme: WeightScheme,
        outputs: OutputOrder,
    ) -> None:
        num_outputs, num_inputs = weight.shape
        order = columns.order.to(weight.device)
        self._weight, self._factor, self._order = weight, columns.factor, order
        self._outputs = _slices(num_outputs, block_of_outputs(num_outputs))
        self._inputs = _slices(num_inputs, columns.block_size)
        self._rows = [outputs.order[own] for own in self._outputs]
        self._work = [weight[rows].T[order] for rows in self._rows]  # (I, o) each
        self._moves = [
            torch.linalg.solve_triangular(outputs.factor[own, own], outputs.factor[own, : own.start], upper=False).T
            for own in self._outputs
        ]  # (outputs before, o) each
        self._groups = order // (scheme.group_size if scheme.group_size > 0 else num_inputs)
        self._scales, self._zeros, self._limit = grid[0].float(), grid[1].float(), float((1 << scheme.num_bits) - 1)
        self._errors = torch.zeros(num_inputs, num_outputs, device=weight.device)  # both in the order of rounding
        self.codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        self.num_outer, self.num_inner = len(self._outputs), len(self._inputs)

    def shape(self, outer: int, inner: int) -> tuple[int, int]:
        """How many inputs, and how many outputs."""
        own, part = self._outputs[outer], self._inputs[inner]
        return part.stop - part.start, own.stop - own.start

    def round(self, places: Sequence[tuple[int, int]]) -> None:
        """Rounds blocks of outputs, each at a block of inputs; all of one shape."""
        pairs = [(outer, self._inputs[inner]) for outer, inner in places]
        factors = [self._factor[part].to(self._weight.device) for _, part in pairs]  # (k, I) each
        scales, zeros = (
            torch.stack([table[self._rows[outer]][:, self._groups[part]].T for outer, part in pairs])
            for table in (self._scales, self._zeros)
        )
        targets = [
            self._work[outer][part] - self._errors[part, : self._outputs[outer].start] @ self._moves[outer]
            for outer, part in pairs
        ]
        diagonal = torch.stack([factor[:, part] for factor, (_, part) in zip(factors, pairs, strict=True)])
        codes, pushed = round_block(torch.stack(targets), diagonal, (scales, zeros, self._limit))
        restored = (codes - zeros).mul_(scales)  # (B, k, o)
        for i, (outer, part) in enumerate(pairs):
            places_of = self._rows[outer].unsqueeze(1), self._order[part]
            self.codes[places_of] = codes[i].T
            self._errors[part, self._outputs[outer]] = restored[i] - self._weight[places_of].T
            self._work[outer][part.stop :].addmm_(factors[i][:, part.stop :].T, pushed[i], alpha=-1)


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
