"""The AWQ scale search (arXiv 2306.00978, section 3.2) on statistics instead of activations.

Of the candidates the one whose rounded weights change the outputs of the balance layers least is chosen. Nothing of the model is run
again and nothing is mutated.

Large layers are screened first: errors of all candidates on a sample of the rows, then of the best few on a larger one, both in rough
products; the errors of the winner and of the identity on all rows decide. A sample takes the rows with the largest error under the
identity, and every n-th of the others, counted n times. (An evenly spaced sample chose scales up to 28 % worse on a model with
outliers: few rows carry most of the error.) The statistics say what an error is: that of rounding to nearest, or what GPTQ leaves of it.

In front of a mixture of experts one set of scales serves linears that read different rows: the shared ones all tokens, each expert its
own. Such a mapping has several *groups*, whose errors are summed. Within the experts it is the other way round: as many mappings as
experts, alike but for their numbers. Both go through in batches of experts, as products of (B, R, I) tensors, in fast products to the
end where they are screened: by the rows of an expert these tell an error as well as exact ones do.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.quant.candidates import Candidate, candidates, weight_mean
from awqdist.quant.grid import rounding_difference
from awqdist.quant.stacks import BalanceWeight, SearchGroup, Stack, batches, stacked
from awqdist.quant.stats import Statistics
from awqdist.recipe import Smoothing

_ROWS = (256, 8192)  # that rank the candidates, and the best few; used where a mapping has at least twice the former
_ROWS_OF_GROUPS = (2048, 16384)  # the same of all groups together, where there are several
_ROWS_OF_EXPERT = (128, 512)  # the same of a mapping within an expert
_LEAST_ROWS = 8  # of each group
_NUM_FINALISTS = 3
_BLOCK_ELEMENTS = 1 << 22  # of the differences that are multiplied at a time, of several candidates


@dataclass(frozen=True, slots=True)
class ScaleChoice:
    """The outcome of a search. scales: (I,) float32, tied over the channels of one smooth-layer output."""

    scales: Tensor
    ratio: float | None  # None: the identity
    duo_scaling: bool
    error_before: float
    error_after: float
    num_nonfinite: int


def search_scales(
    balance: Sequence[BalanceWeight], statistics: Statistics, source: Tensor, settings: Smoothing, dtype: torch.dtype
) -> ScaleChoice:
    """Chooses the smoothing scales of one mapping whose balance layers all read the same rows.

    balance: all linears that read the smoothed tensor; source: (I,) int64, the smooth layer's output channel that each input
    channel comes from (arange, or repeated under grouped-query attention): inputs of one source share a scale; dtype: what the
    group scales are stored in.
    """
    return search_groups([SearchGroup(balance, statistics)], statistics.mean_abs, source, settings, dtype)


def search_groups(
    groups: Sequence[SearchGroup], mean_abs: Tensor, source: Tensor, settings: Smoothing, dtype: torch.dtype
) -> ScaleChoice:
    """The same for several groups of balance layers. mean_abs: (I,), of the smoothed tensor."""
    stacks = [stack for batch in batches(groups) for stack in stacked(batch)]
    w_mean = weight_mean((stack.weight().flatten(0, 1), stack.scheme) for stack in stacks)
    tried = candidates(w_mean.unsqueeze(0), mean_abs.unsqueeze(0), source, settings)
    sizes = _ROWS if len(groups) == 1 else tuple(max(_LEAST_ROWS, rows // len(groups)) for rows in _ROWS_OF_GROUPS)
    (choice,) = _Search(stacks, tried, dtype, sizes, shared=True).choices()
    return choice


def search_side_by_side(
    groups: Sequence[SearchGroup], source: Tensor, settings: Smoothing, dtype: torch.dtype
) -> list[ScaleChoice]:
    """As many mappings as groups, each with scales of its own: the inner ones of experts that are alike."""
    choices: list[ScaleChoice] = []
    for batch in batches(groups):
        stacks = stacked(batch)
        w_mean = weight_mean((stack.weight(), stack.scheme) for stack in stacks)
        mean_abs = torch.stack([group.statistics.mean_abs for group in batch])
        tried = candidates(w_mean, mean_abs, source, settings)
        choices += _Search(stacks, tried, dtype, _ROWS_OF_EXPERT, shared=False).choices()
    return choices


class _Search:
    """K mappings at a time: one whose errors are summed over the groups of all stacks, or one for each of their B groups.

    tried: the candidates, with scales (K, I), the identity first; sizes: how many rows of a group rank all of them, and the best few.
    """

    def __init__(
        self,
        stacks: Sequence[Stack],
        tried: Sequence[Candidate],
        dtype: torch.dtype,
        sizes: Sequence[int],
        *,
        shared: bool,
    ) -> None:
        self._stacks, self._tried, self._dtype, self._sizes, self._shared = stacks, tried, dtype, sizes, shared
        self._scales = torch.stack([candidate.scales for candidate in tried])  # (C, K, I)
        num_rows = sum(stack.num_rows * (len(stack.groups) if shared else 1) for stack in stacks)
        self._screened = num_rows >= 2 * _ROWS[0]

    def choices(self) -> list[ScaleChoice]:
        before = [self._row_errors(stack, self._scales[:1]) for stack in self._stacks]
        identity = self._total(before)  # (1, K)
        left, sound = self._screen(before, identity.shape[1])
        after = self._total([self._row_errors(stack, self._of(left)) for stack in self._stacks])  # (n, K)
        errors = torch.cat([identity, after])
        tried = torch.cat([torch.zeros_like(identity, dtype=torch.int64), left])
        best = torch.where(torch.isfinite(errors), errors, torch.inf).argsort(dim=0, stable=True)[:1]  # (1, K)
        num_unsound = (~torch.isfinite(identity)).sum(0) + (~sound).sum(0)
        num_unsound += (sound.gather(0, left - 1) & ~torch.isfinite(after)).sum(0)
        columns = (tried.gather(0, best)[0], identity[0], errors.gather(0, best)[0], num_unsound)
        return [
            ScaleChoice(self._scales[c, k], self._tried[c].ratio, self._tried[c].duo_scaling, *found)
            for k, (c, *found) in enumerate(zip(*(column.tolist() for column in columns), strict=True))
        ]

    def _screen(self, row_errors: Sequence[Tensor], num_mappings: int) -> tuple[Tensor, Tensor]:
        """Those of the candidates behind the identity that are worth an exact look (n, K), and which gave a finite error at all (C - 1, K).

        row_errors: (1, B, R) under the identity, by stack.
        """
        num_others = len(self._tried) - 1
        left = torch.arange(1, num_others + 1, device=self._scales.device).unsqueeze(1).expand(-1, num_mappings)
        sound = torch.ones_like(left, dtype=torch.bool)
        if not self._screened or not num_others:
            return left, sound
        for step, num_kept in enumerate((_NUM_FINALISTS, 1)):
            errors = self._sampled_errors(self._of(left), row_errors, self._sizes[step])
            sound = sound if step else torch.isfinite(errors)
            order = torch.where(torch.isfinite(errors), errors, torch.inf).argsort(dim=0, stable=True)
            left = left.gather(0, order[:num_kept])
        return left, sound

    def _of(self, left: Tensor) -> Tensor:
        """Scales (n, K, I) of candidates (n, K)."""
        return self._scales[left, torch.arange(left.shape[1], device=left.device)]

    def _total(self, row_errors: Sequence[Tensor]) -> Tensor:
        """(n, K) from (n, B, R) of every stack."""
        totals = [errors.sum(-1) for errors in row_errors]  # (n, B)
        return torch.stack([t.sum(1, keepdim=True) if self._shared else t for t in totals]).sum(0)

    def _row_errors(self, stack: Stack, scales: Tensor) -> Tensor:
        """Of all rows, under scales (n, K, I): (n, B, R) float64."""
        weight = stack.weight()
        found = weight.new_empty(scales.shape[0], *weight.shape[:2], dtype=torch.float64)
        rough = self._screened and stack.of_experts
        with nullcontext() if rough else stack.hold():
            for i, one in enumerate(scales):
                difference = rounding_difference(weight, one.expand(weight.shape[0], -1), stack.scheme, self._dtype)
                found[i] = stack.rough_row_errors(difference) if rough else stack.row_errors(difference)
        return found

    def _sampled_errors(self, scales: Tensor, row_errors: Sequence[Tensor], num_rows: int) -> Tensor:
        """Errors under scales (n, K, I) as a sample of the rows tells them: (n, K)."""
        total = torch.zeros(scales.shape[:2], dtype=torch.float64, device=scales.device)
        for stack, errors in zip(self._stacks, row_errors, strict=True):
            weight, counts = _sample(stack.weight(), errors[0], num_rows)
            num_groups, size, _ = weight.shape
            step = max(1, _BLOCK_ELEMENTS // weight.numel())
            for part in (slice(start, start + step) for start in range(0, scales.shape[0], step)):
                differences = [
                    rounding_difference(weight, one.expand(num_groups, -1), stack.scheme, self._dtype)
                    for one in scales[part]
                ]
                found = stack.rough_row_errors(torch.cat(differences, 1)).unflatten(1, (-1, size)) @ counts  # (B, n)
                total[part] += found.T.sum(1, keepdim=True) if self._shared else found.T
        return total


def _sample(weight: Tensor, errors: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """About `num_rows` rows of every group, (B, r, I), and how many rows each stands for, (r,) float64.

    weight: (B, R, I); errors: (B, R), of the rows under the identity.
    """
    if num_rows >= weight.shape[1]:
        return weight, errors.new_ones(weight.shape[1])
    half = num_rows // 2
    order = torch.argsort(errors, dim=1, descending=True, stable=True)
    step = max(1, (weight.shape[1] - half) // half)
    rows = torch.cat([order[:, :half], order[:, half::step]], 1)
    counts = errors.new_full((rows.shape[1],), step)
    counts[:half] = 1
    return weight[torch.arange(weight.shape[0], device=weight.device).unsqueeze(1), rows], counts
