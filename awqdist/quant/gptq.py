"""GPTQ: rounds one input after the other, and pushes each rounding error onto the inputs not yet rounded (arXiv 2210.17323).

The errors are pushed along the inverse Hessian (XᵀX + λI)⁻¹, so that the outputs change least. The grid is fixed
before, and activation order is a permutation inside this file only: codes are returned in plain order, and no `g_idx`
is stored.

Optionally a linear is compensated over its outputs too. What a linear adds to the residual stream is read by all that
follows, and some directions of it count a hundred times more than others. With R (O, O) for how much directions
count, the error of D is tr(R·D·H·Dᵀ). Where R = Lᵀ·L with L lower triangular, that is

    Σ_o L_oo² · ‖ D_o + Σ_{p<o} (L_op / L_oo) · D_p ‖²_H

so output o is best rounded by GPTQ from a target that the errors of the outputs before it have moved. (YAQA, arXiv
2505.22988, minimises the same error by other means, with R from gradients.)

One solver does all: outputs are rounded in blocks (one block without R), inputs in blocks of `block_size`, and
problems of one shape, such as hundreds of experts, side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from awqdist.quant.factor import inverse_cholesky, reversed_cholesky, rounding_order
from awqdist.quant.grid import Grid, QuantizedWeight
from awqdist.quant.precision import repeatable
from awqdist.recipe import Rounding

SUB_BLOCK = 32  # inputs, within which errors are applied just in time
_SIDE_BY_SIDE_BYTES = {"cpu": 1 << 29, "cuda": 1 << 32}  # of Gram matrices and factors, or of weights if larger
_OUTPUT_DAMPENING = 0.1  # of the mean of R's diagonal
_NUM_OUTPUT_BLOCKS, _LEAST_OUTPUTS = 8, 32
_TOKENS_AT_ONCE = 1 << 12


@repeatable
def gptq(
    targets: Sequence[Tensor],
    grams: Sequence[Tensor],
    grids: Sequence[Grid],
    rounding: Rounding,
    outputs: OutputOrder | None = None,
) -> list[QuantizedWeight]:
    """Rounds every target on its grid under error compensation. Problems of one shape and scheme are solved side by side.

    Args:
        targets: weights (O, I) float32, after smoothing; they are not written to.
        grams: the Gram matrix (I, I) float32 of each target's input, on its device or in host memory. A matrix that
            several targets share is factorised once.
        grids: the fixed grid of each target.
        rounding: activation order, dampening and the number of inputs per block.
        outputs: if given, targets of that many outputs are compensated over these too.

    Raises:
        NumericalError: a Gram matrix is not positive definite even with dampening 1.
    """
    factors: dict[int, tuple[Tensor, Tensor]] = {}  # by the identity of the matrix
    for gram in grams:
        if id(gram) not in factors:
            order = rounding_order(gram, rounding)
            factors[id(gram)] = order, inverse_cholesky(gram, order, rounding.dampening_frac)[0]
    alike: dict[object, list[int]] = {}
    for i, (target, grid) in enumerate(zip(targets, grids, strict=True)):
        alike.setdefault((target.shape, grid.scheme), []).append(i)
    codes: dict[int, Tensor] = {}
    for indices in alike.values():
        own = [factors[id(grams[i])] for i in indices]
        solver = _Solver([targets[i] for i in indices], own, [grids[i] for i in indices], rounding.block_size, outputs)
        codes.update(zip(indices, solver.solve(), strict=True))
    return [grid.with_codes(codes[i]) for i, grid in enumerate(grids)]


def num_side_by_side(num_outputs: int, num_inputs: int, device: str) -> int:
    """Returns how many problems (O, I) are solved at a time. Free memory does not count, since it would decide the bytes."""
    return max(1, ceil(_SIDE_BY_SIDE_BYTES[device] / (8 * num_inputs * max(num_inputs, num_outputs))))


@dataclass(frozen=True, slots=True)
class OutputOrder:
    """The order (O,) in which outputs are rounded, and L (O, O) float32, lower triangular in that order, with R = Lᵀ·L."""

    order: Tensor
    factor: Tensor

    @classmethod
    def from_weighting(cls, weighting: Tensor) -> OutputOrder:
        """Factorises R (O, O) float32, positive semidefinite.

        Raises:
            NumericalError: R is not positive definite even with dampening 1.
        """
        order = rounding_order(weighting, Rounding("gptq"))
        backwards, _ = reversed_cholesky(weighting, order, _OUTPUT_DAMPENING)
        return cls(order, backwards.mT.flip(0, 1).contiguous())

    def weighted(self, difference: Tensor) -> Tensor:
        """Returns L·D (O, I) of a change of weights D (O, I): its squares under the Gram matrix are the weighted error of D."""
        return self.factor @ difference[self.order]


def output_block_size(num_outputs: int) -> int:
    """Returns how many outputs are rounded at a time where they are compensated over."""
    return max(_LEAST_OUTPUTS, -(-num_outputs // _NUM_OUTPUT_BLOCKS))


def logit_weighting(head: Tensor, counts: Tensor, norm_weight: Tensor | None) -> Tensor:
    """Returns R for what is written to the residual stream: how much each of its directions moves the logits.

    With the rows u_v of lm_head times the final norm's weight, and shares p_v of the tokens in the calibration text,
    R is Σ_v p_v·u_v·u_vᵀ less the part that all logits share. It needs no gradients and is one matrix for all layers.
    The shares are of the square roots of how often tokens occur: what a model says is less even than a text, and less
    uneven than its most frequent words.

    Args:
        head: lm_head's weight (V, H), any float dtype.
        counts: (V,), how often each token occurs.
        norm_weight: (H,), the factor of the final norm; None for 1.

    Returns:
        (H, H) float32.
    """
    occurring = counts.nonzero().squeeze(1)
    shares = counts[occurring].float().sqrt_()
    shares = (shares / shares.sum()).unsqueeze(1)
    width = head.shape[1]
    moment, mean = torch.zeros(width, width, device=head.device), torch.zeros(width, device=head.device)
    for part in range(0, occurring.shape[0], _TOKENS_AT_ONCE):
        own = slice(part, part + _TOKENS_AT_ONCE)
        rows = head[occurring[own]].float()
        rows = rows if norm_weight is None else rows * norm_weight.float()
        moment.addmm_(rows.T, rows * shares[own])
        mean += (rows * shares[own]).sum(0)
    return moment.addr_(mean, mean, alpha=-1)


class _Solver:
    """Solves B problems of one shape and scheme, cut into blocks of outputs and blocks of inputs."""

    def __init__(
        self,
        targets: Sequence[Tensor],
        factors: Sequence[tuple[Tensor, Tensor]],
        grids: Sequence[Grid],
        block_size: int,
        outputs: OutputOrder | None,
    ) -> None:
        num_outputs, num_inputs = targets[0].shape
        device, scheme = targets[0].device, grids[0].scheme
        self._targets, self._outputs = targets, outputs
        self._limit = float((1 << scheme.num_bits) - 1)
        self._factors = [factor for _, factor in factors]
        self._order = _stacked([order.to(device) for order, _ in factors])  # (B, I)
        self._problem = torch.arange(len(targets), device=device).unsqueeze(1)  # (B, 1), to pair with rows of the order
        self._groups = self._order // (scheme.group_size if scheme.group_size > 0 else num_inputs)
        self._inputs = _slices(num_inputs, block_size)
        self._codes = torch.empty(len(targets), num_inputs, num_outputs, dtype=torch.uint8, device=device)
        if outputs is None:
            self._rows: list[Tensor | slice] = [slice(None)]
            self._blocks = [slice(0, num_outputs)]
        else:
            self._blocks = _slices(num_outputs, output_block_size(num_outputs))
            self._rows = [outputs.order[own] for own in self._blocks]
            self._moves = [
                torch.linalg.solve_triangular(outputs.factor[own, own], outputs.factor[own, : own.start], upper=False).T
                for own in self._blocks
            ]  # per block, what the errors (…, p) of the outputs before it are multiplied by: (p, o)
            self._errors = torch.zeros(self._codes.shape, device=device)  # (B, I, O), in the order of rounding
        scales = _stacked([grid.weight_scale.float().T for grid in grids])  # (B, G, O)
        zeros = _stacked([grid.zero_point.float().T for grid in grids])
        self._tables = [(scales[..., rows], zeros[..., rows]) for rows in self._rows]  # per block of outputs, (B, G, o)
        self._work = [
            _stacked([target[rows].T[order] for target, order in zip(targets, self._order, strict=True)])
            for rows in self._rows
        ]  # per block of outputs, (B, I, o): an input's weights lie together

    def solve(self) -> list[Tensor]:
        """Returns the codes (O, I) uint8 of every problem.

        A block of outputs needs the errors of those before it only at the inputs that it rounds. So all blocks
        proceed at a time, each one block of inputs behind the one before it, in hardly more steps than without
        compensation over outputs.
        """
        for step in range(len(self._blocks) + len(self._inputs) - 1):
            places = [
                (outer, step - outer) for outer in range(len(self._blocks)) if 0 <= step - outer < len(self._inputs)
            ]
            shapes = [(_length(self._blocks[outer]), _length(self._inputs[inner])) for outer, inner in places]
            for shape in dict.fromkeys(shapes):  # the last blocks may be smaller
                self._round([place for place, own in zip(places, shapes, strict=True) if own == shape])
        codes = self._codes.transpose(1, 2)  # (B, O, I)
        if self._outputs is not None:
            codes = torch.empty_like(codes).index_copy_(1, self._outputs.order, codes)
        return list(codes.contiguous())

    def _round(self, places: Sequence[tuple[int, int]]) -> None:
        """Rounds P places of one shape, each a block of o outputs at a block of k inputs, for all B problems."""
        factors = [
            _stacked([f[self._inputs[inner]].to(self._codes.device) for f in self._factors]) for _, inner in places
        ]
        diagonal = _joined([f[:, :, self._inputs[inner]] for f, (_, inner) in zip(factors, places, strict=True)])
        scales, zeros = (
            _joined(
                [
                    self._tables[outer][which][self._problem, self._groups[:, self._inputs[inner]]]
                    for outer, inner in places
                ]
            )
            for which in (0, 1)
        )  # (P·B, k, o)
        work = _joined([self._moved(outer, inner) for outer, inner in places])
        codes, pushed = round_block(work, diagonal, scales, zeros, self._limit)
        restored = (codes - zeros).mul_(scales) if self._outputs is not None else codes
        num_problems = len(self._targets)
        for i, (outer, inner) in enumerate(places):
            own, part, here = self._blocks[outer], self._inputs[inner], slice(i * num_problems, (i + 1) * num_problems)
            self._codes[self._problem, self._order[:, part], own] = codes[here]
            if self._outputs is not None:
                self._errors[:, part, own] = restored[here] - self._original(outer, inner)
            self._work[outer][:, part.stop :].baddbmm_(factors[i][:, :, part.stop :].mT, pushed[here], alpha=-1)

    def _moved(self, outer: int, inner: int) -> Tensor:
        """Returns what is rounded at a place (B, k, o): the weights as the errors of earlier inputs and outputs have moved them."""
        work, before = self._work[outer][:, self._inputs[inner]], self._blocks[outer].start
        if not before:
            return work
        moves = self._moves[outer].expand(len(self._targets), -1, -1)
        moved: Tensor = work - self._errors[:, self._inputs[inner], :before] @ moves
        return moved

    def _original(self, outer: int, inner: int) -> Tensor:
        """Returns the targets at a place as they were given, (B, k, o)."""
        rows, orders = self._rows[outer], self._order[:, self._inputs[inner]]
        assert isinstance(rows, Tensor)
        return _stacked([t[rows.unsqueeze(1), order].T for t, order in zip(self._targets, orders, strict=True)])


@torch.library.custom_op("awqdist::round_block", mutates_args=("work",))
def round_block(work: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Rounds a block of k inputs of B problems, input by input.

    This inner loop of GPTQ is one operator, so that a layer can be measured without running it. Within sub-blocks
    errors are applied just in time as one small product per input; behind them by one product per sub-block.

    Args:
        work: (B, k, O) float32, what is to be rounded; used up.
        factor: (B, k, k) float32, the block's part of U.
        scales: (B, k, O) float32, group scales.
        zeros: (B, k, O) float32, zero points.
        limit: the largest code.

    Returns:
        The codes (B, k, O) uint8, and the errors (B, k, O) float32 to push onto later inputs.
    """
    codes, errors = torch.empty_like(work, dtype=torch.uint8), torch.empty_like(work)
    pivots = factor.diagonal(dim1=1, dim2=2).unsqueeze(-1)  # (B, k, 1)
    for start in range(0, work.shape[1], SUB_BLOCK):
        stop = min(start + SUB_BLOCK, work.shape[1])
        own = factor[
            :, start:stop, start:stop
        ].mT.contiguous()  # its rows lie together: products of many problems take half the time
        for i in range(start, stop):
            column, scale, zero = work[:, i], scales[:, i], zeros[:, i]  # (B, O)
            if i > start:
                before = own[:, i - start : i - start + 1, : i - start]  # (B, 1, i - start)
                column = column - torch.bmm(before, errors[:, start:i]).squeeze(1)
            code = torch.addcdiv(zero, column, scale).round_().clamp_(0, limit)
            codes[:, i] = code
            torch.sub(column, code.sub_(zero).mul_(scale), out=errors[:, i]).div_(pivots[:, i])
        work[:, stop:].baddbmm_(factor[:, start:stop, stop:].mT, errors[:, start:stop], alpha=-1)
    return codes, errors


@round_block.register_fake
def _(work: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(work, dtype=torch.uint8), torch.empty_like(work)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stacks tensors along a new first dimension, without a copy of a single one."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _length(part: slice) -> int:
    length: int = part.stop - part.start
    return length
