"""The AWQ scale search (arXiv 2306.00978, section 3.2) on statistics instead of activations.

Of the candidates the one whose rounded weights change the outputs of the balance layers least is chosen. Nothing of the model is run
again and nothing is mutated.

Large layers are screened first: errors of all candidates on a sample of the rows, then of the best few on a larger one, both in rough
products; the errors of the winner and of the identity on all rows decide. The statistics say what an error is: that of rounding to
nearest, or what GPTQ leaves of it.

In front of a mixture of experts one set of scales serves linears that read different rows: the shared ones all tokens, each expert its
own. Such a mapping has several *groups*, whose errors are summed. Within the experts it is the other way round: as many mappings as
experts, alike but for their numbers. Both go through in batches of experts, as products of (B, R, I) tensors. Where errors
are estimates anyway, as of experts and sketches, samples also decide: no weights are rounded as a whole, and no error of all rows is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from awqdist.quant.candidates import Candidate, ScaleChoice, candidates, sums_and_peaks
from awqdist.quant.grid import grouped, rounding_difference
from awqdist.quant.samples import WeightSample, sample_rows, total_error
from awqdist.quant.stacks import BalanceWeight, SearchGroup, Stack, batches, stacked
from awqdist.quant.stats import Statistics
from awqdist.recipe import Smoothing

_SCREENED_ROWS = 512  # from which a mapping is screened
# how many rank the candidates, and the best few: rows of one group, of several, of a mapping within an expert
_ROWS = (256, 8192), (2048, 16384), (128, 512)
_DECIDING_ROWS = (256, 512), (2048, 8192), (64, 256)  # the same where all rows are not looked at afterwards
_LEAST_ROWS = 8  # of each group
_NUM_FINALISTS = 3
_NUM_DECIDED = 6  # as many where the larger sample decides


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
    search = _Search(stacks, len(groups), dtype, shared=True)
    (choice,) = search.choices(mean_abs.unsqueeze(0), source, settings)
    return choice


def search_side_by_side(
    groups: Sequence[SearchGroup], source: Tensor, settings: Smoothing, dtype: torch.dtype
) -> list[ScaleChoice]:
    """As many mappings as groups, each with scales of its own: the inner ones of experts that are alike."""
    choices: list[ScaleChoice] = []
    for batch in batches(groups):
        mean_abs = torch.stack([group.statistics.mean_abs for group in batch])
        search = _Search(stacked(batch), len(batch), dtype, shared=False)
        choices += search.choices(mean_abs, source, settings)
    return choices


class _Search:
    """K mappings at a time: one whose errors are summed over the groups of all stacks, or one for each of their B groups."""

    def __init__(self, stacks: Sequence[Stack], num_groups: int, dtype: torch.dtype, *, shared: bool) -> None:
        self._stacks, self._dtype, self._shared = stacks, dtype, shared
        self._num_rows = sum(stack.num_rows * (len(stack.groups) if shared else 1) for stack in stacks)
        self._screened = self._num_rows >= _SCREENED_ROWS
        self._on_samples = self._screened and any(stack.is_sketched for stack in stacks)
        of_one, of_groups, of_expert = _DECIDING_ROWS if self._on_samples else _ROWS
        several = tuple(max(_LEAST_ROWS, rows // num_groups) for rows in of_groups)
        self._sizes = (of_one if num_groups == 1 else several) if shared else of_expert  # rows of a group, by step

    def choices(self, mean_abs: Tensor, source: Tensor, settings: Smoothing) -> list[ScaleChoice]:
        """mean_abs: (K, I)."""
        samples: list[list[WeightSample]] = [[] for _ in self._sizes]
        sums = torch.zeros_like(mean_abs)
        for stack in self._stacks:
            weight = stack.weight()
            own, peaks = sums_and_peaks(weight, stack.scheme)  # (B, I), (B, R, G)
            sums += own.sum(0, keepdim=True) if self._shared else own
            if self._on_samples:
                importance, rough = _expected_errors(stack, peaks), stack.rough()
                for size, found in zip(self._sizes, samples, strict=True):
                    found.append(WeightSample(*sample_rows(weight, importance, size), stack.scheme, rough))
        tried = candidates(sums / self._num_rows, mean_abs, source, settings)
        return self._decide_on_samples(tried, samples) if self._on_samples else self._decide(tried)

    def _decide(self, tried: Sequence[Candidate]) -> list[ScaleChoice]:
        """By the errors of all rows, of those that samples leave over."""
        scales = torch.stack([candidate.scales for candidate in tried])  # (C, K, I)
        before = [self._row_errors(stack, scales[:1]) for stack in self._stacks]
        left = _others(scales)
        sound = torch.ones_like(left, dtype=torch.bool)
        if self._screened and left.shape[0]:
            for step, num_kept in enumerate((_NUM_FINALISTS, 1)):
                samples = [
                    WeightSample(*sample_rows(s.weight(), errors[0], self._sizes[step]), s.scheme, s.rough())
                    for s, errors in zip(self._stacks, before, strict=True)
                ]
                found = total_error(samples, _of(scales, left), self._dtype, shared=self._shared)
                sound = sound if step else torch.isfinite(found)
                left = left.gather(0, _order(found)[:num_kept])
        after = [self._row_errors(stack, _of(scales, left)) for stack in self._stacks]
        errors = torch.cat([self._total(before), self._total(after)])
        return _choices(tried, left, errors, sound)

    def _decide_on_samples(
        self, tried: Sequence[Candidate], samples: Sequence[Sequence[WeightSample]]
    ) -> list[ScaleChoice]:
        scales = torch.stack([candidate.scales for candidate in tried])  # (C, K, I)
        left = _others(scales)
        sound = torch.ones_like(left, dtype=torch.bool)
        if left.shape[0]:
            errors = total_error(samples[0], _of(scales, left), self._dtype, shared=self._shared)
            sound = torch.isfinite(errors)
            left = left.gather(0, _order(errors)[:_NUM_DECIDED])
        finalists = torch.cat([_identity(left), left])
        errors = total_error(samples[1], _of(scales, finalists), self._dtype, shared=self._shared)
        return _choices(tried, left, errors, sound)

    def _total(self, row_errors: Sequence[Tensor]) -> Tensor:
        """(n, K) from (n, B, R) of every stack."""
        totals = [errors.sum(-1) for errors in row_errors]  # (n, B)
        return torch.stack([t.sum(1, keepdim=True) if self._shared else t for t in totals]).sum(0)

    def _row_errors(self, stack: Stack, scales: Tensor) -> Tensor:
        """Of all rows, under scales (n, K, I): (n, B, R) float64."""
        weight = stack.weight()
        found = weight.new_empty(scales.shape[0], *weight.shape[:2], dtype=torch.float64)
        with stack.hold():
            for i, one in enumerate(scales):
                difference = rounding_difference(weight, one.expand(weight.shape[0], -1), stack.scheme, self._dtype)
                found[i] = stack.row_errors(difference)
        return found


def _expected_errors(stack: Stack, peaks: Tensor) -> Tensor:
    """(B, R), in proportion to the error of every row under the identity, were it independent from input to input: of a group its
    largest weight, squared, times what its inputs carry. peaks: (B, R, G), see `sums_and_peaks`."""
    mean_abs = torch.stack([group.statistics.mean_abs for group in stack.groups])
    energy = grouped(mean_abs.square(), stack.scheme).sum(-1)  # (B, G)
    return (peaks.square() @ energy.unsqueeze(2)).squeeze(2)


def _others(scales: Tensor) -> Tensor:
    """The numbers of the candidates behind the identity, (C - 1, K), of scales (C, K, I)."""
    numbers = torch.arange(1, scales.shape[0], device=scales.device)
    return numbers.unsqueeze(1).expand(-1, scales.shape[1])


def _identity(left: Tensor) -> Tensor:
    """Its number for as many mappings, (1, K), as candidates (n, K) are of."""
    return left.new_zeros(1, left.shape[1])


def _of(scales: Tensor, left: Tensor) -> Tensor:
    """Scales (n, K, I) of candidates (n, K)."""
    return scales[left, torch.arange(left.shape[1], device=left.device)]


def _order(errors: Tensor) -> Tensor:
    """Best first, what is not finite last: (n, K)."""
    return torch.where(torch.isfinite(errors), errors, torch.inf).argsort(dim=0, stable=True)


def _choices(tried: Sequence[Candidate], left: Tensor, errors: Tensor, sound: Tensor) -> list[ScaleChoice]:
    """left: candidates (n, K) that were looked at last; errors: of the identity and of these, (1 + n, K); sound: which of all candidates
    behind the identity gave a finite error before that, (C - 1, K)."""
    best = _order(errors)[:1]  # (1, K)
    finite = torch.isfinite(errors)
    num_unsound = (~finite[0]).long() + (~sound).sum(0) + (sound.gather(0, left - 1) & ~finite[1:]).sum(0)
    numbers = torch.cat([_identity(left), left]).gather(0, best)[0]
    columns = (numbers, errors[0], errors.gather(0, best)[0], num_unsound)
    found = zip(*(column.tolist() for column in columns), strict=True)
    return [
        ScaleChoice(tried[c].scales[k], tried[c].ratio, tried[c].duo_scaling, *f) for k, (c, *f) in enumerate(found)
    ]
