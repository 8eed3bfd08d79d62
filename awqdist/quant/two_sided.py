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

    def weighted(self, difference: Tensor) -> Tensor:
        """L·D of D (O, I): its squares are what counts of D's."""
        return self.factor @ difference[self.order]

    def moves(self, blocks: Sequence[slice]) -> list[Tensor]:
        """Of every block of outputs, in this order: what the errors (…, p) of all before it are multiplied by, (p, o)."""
        return [
            torch.linalg.solve_triangular(self.factor[own, own], self.factor[own, : own.start], upper=False).T
            for own in blocks
        ]


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


@dataclass(frozen=True, slots=True)
class Problem:
    """A weight (O, I) float32, smoothed, to be rounded: the order of its inputs, and its grid, weight_scale and zero_point (O, G)."""

    weight: Tensor
    columns: Columns
    grid: tuple[Tensor, Tensor]


def round_two_sided(problems: Sequence[Problem], scheme: WeightScheme, outputs: OutputOrder) -> list[QuantizedWeight]:
    """Codes of every weight under compensation over inputs and outputs; all are of one shape.

    A block of outputs needs the errors of those before it only at the inputs that it rounds. So all blocks go on at a time, each one block
    of inputs behind the one before it: there are hardly more steps than under one-sided compensation.
    """
    blocks = [_Blocks(problem, scheme, outputs) for problem in problems]
    num_outer, num_inner = len(blocks[0].outputs), len(blocks[0].inputs)
    for step in range(num_outer + num_inner - 1):
        places = [(outer, step - outer) for outer in range(num_outer) if 0 <= step - outer < num_inner]
        for shape in dict.fromkeys(blocks[0].shape(*place) for place in places):  # the last blocks may be smaller
            alike = [place for place in places if blocks[0].shape(*place) == shape]
            _round([(own, *place) for own in blocks for place in alike], float((1 << scheme.num_bits) - 1))
    return [QuantizedWeight(own.codes, *own.problem.grid, scheme) for own in blocks]


class _Blocks:
    """One problem as blocks of outputs, each with its own weights that are still to be rounded, and blocks of inputs."""

    def __init__(self, problem: Problem, scheme: WeightScheme, outputs: OutputOrder) -> None:
        weight = problem.weight
        num_outputs, num_inputs = weight.shape
        self.problem = problem
        self.order = problem.columns.order.to(weight.device)
        self.outputs = _slices(num_outputs, block_of_outputs(num_outputs))
        self.inputs = _slices(num_inputs, problem.columns.block_size)
        self.rows = [outputs.order[own] for own in self.outputs]
        self.work = [weight[rows].T[self.order] for rows in self.rows]  # (I, o) each
        self.errors = torch.zeros(num_inputs, num_outputs, device=weight.device)  # both in the order of rounding
        self.codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        self._moves = outputs.moves(self.outputs)
        self._groups = self.order // (scheme.group_size if scheme.group_size > 0 else num_inputs)
        self._tables = [table.float() for table in problem.grid]

    def shape(self, outer: int, inner: int) -> tuple[int, int]:
        """How many inputs, and how many outputs."""
        own, part = self.outputs[outer], self.inputs[inner]
        return part.stop - part.start, own.stop - own.start

    def target(self, outer: int, inner: int) -> Tensor:
        """(k, o): what is to be rounded."""
        part = self.inputs[inner]
        return self.work[outer][part] - self.errors[part, : self.outputs[outer].start] @ self._moves[outer]

    def grid(self, outer: int, inner: int) -> Tensor:
        """Scales and zero points, (2, k, o)."""
        groups = self._groups[self.inputs[inner]]
        return torch.stack([table[self.rows[outer]][:, groups].T for table in self._tables])

    def factor(self, inner: int) -> Tensor:
        """(k, I), with the weights."""
        return self.problem.columns.factor[self.inputs[inner]].to(self.order.device)


def _round(places: Sequence[tuple[_Blocks, int, int]], limit: float) -> None:
    """Rounds blocks of outputs, each at a block of inputs; all of one shape."""
    factors = [own.factor(inner) for own, _, inner in places]
    targets = torch.stack([own.target(outer, inner) for own, outer, inner in places])
    scales, zeros = torch.stack([own.grid(outer, inner) for own, outer, inner in places], 1)
    diagonal = torch.stack([f[:, own.inputs[inner]] for f, (own, _, inner) in zip(factors, places, strict=True)])
    codes, pushed = round_block(targets, diagonal, (scales, zeros, limit))
    restored = (codes - zeros).mul_(scales)  # (B, k, o)
    for i, (own, outer, inner) in enumerate(places):
        part = own.inputs[inner]
        where = own.rows[outer].unsqueeze(1), own.order[part]
        own.codes[where] = codes[i].T
        own.errors[part, own.outputs[outer]] = restored[i] - own.problem.weight[where].T
        own.work[outer][part.stop :].addmm_(factors[i][:, part.stop :].T, pushed[i], alpha=-1)


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
