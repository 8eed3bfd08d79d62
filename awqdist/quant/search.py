"""Chooses smoothing scales: the AWQ scale search (arXiv 2306.00978, section 3.2) on moments instead of activations.

Of the candidates the one whose rounded weights change the outputs of the balance layers least is chosen. Nothing of the model is run
again and nothing is mutated. The error of a change D is that of rounding to nearest, or what GPTQ is expected to leave of it: GPTQ pushes
the error of each input onto those that are rounded after it, as far as these predict it. What stays of an error d of input i is d²·vᵢ,
where vᵢ is the second moment of what the later inputs do not tell of input i: (L_ii)² where H + λI, taken backwards, is L·Lᵀ.

Large mappings are screened first: errors of all candidates on a sample of the rows, then of the best few on a larger one, both in rough
products; the errors of the winner and of the identity on all rows decide. Where errors are estimates anyway, as of experts and sketches,
the larger sample decides: no weights are rounded as a whole, and no error of all rows is known.

In front of a mixture of experts one set of scales serves linears that read different rows: the shared ones all tokens, each expert its own.
Such a mapping has several groups, whose errors are summed. Within experts it is the other way round: as many mappings as experts, alike but
for their numbers. Both go through in batches of experts, as products of (B, R, I) tensors: so many that they keep the device busy, and no
more, since the float32 copies are made of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from awqdist.quant.candidates import Candidate, ScaleChoice, candidates, sums_and_peaks
from awqdist.quant.factor import reversed_cholesky, rounding_order
from awqdist.quant.grid import grouped, rounding_difference
from awqdist.quant.moments import Diagonal, Form, Moments, form_of
from awqdist.quant.offload import ToDevice
from awqdist.recipe import Rounding, Smoothing, WeightScheme

BATCH_BYTES = {"cpu": 1 << 23, "cuda": 1 << 28}  # of the float32 weights of a batch of experts
_SCREENED_ROWS = 512  # from which a mapping is screened
# how many rank the candidates, and the best few: rows of one group, of several, of a mapping within an expert
_ROWS = (256, 8192), (2048, 16384), (128, 512)
_DECIDING_ROWS = (256, 512), (2048, 8192), (64, 256)  # the same where all rows are not looked at afterwards
_LEAST_ROWS = 8  # of each group
_NUM_FINALISTS = 3
_NUM_DECIDED = 6  # as many where the larger sample decides
_BLOCK_ELEMENTS = {
    "cpu": 1 << 20,
    "cuda": 1 << 22,
}  # of the differences of several candidates that are multiplied at a time


@dataclass(frozen=True, slots=True)
class BalanceWeight:
    """A linear that reads the smoothed tensor.

    weight: (O, I) float; scheme: None where the recipe leaves it unquantized; to_device: given if the weight is in host memory.
    """

    weight: Tensor
    scheme: WeightScheme | None
    to_device: ToDevice | None = None

    def at_hand(self) -> Tensor:
        """Returns the weight on the device of the moments."""
        return self.weight if self.to_device is None else self.to_device(self.weight)


@dataclass(frozen=True)
class SearchGroup:
    """Balance layers that read the same rows, and the moments of these. rounding: given if it is not to nearest."""

    balance: Sequence[BalanceWeight]
    moments: Moments
    rounding: Rounding | None = None

    @property
    def is_compensated(self) -> bool:
        """Whether GPTQ will compensate for errors."""
        return self.rounding is not None and self.rounding.method == "gptq"

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for groups that can be batched."""
        return tuple((b.weight.shape, b.weight.dtype, b.scheme) for b in self.balance)

    @cached_property
    def variances(self) -> Tensor:
        """v, (I,) float32. Raises NumericalError where the Gram matrix cannot be factorised."""
        assert self.rounding is not None
        gram = self.moments.gram()
        order = rounding_order(gram, self.rounding)
        lower, _ = reversed_cholesky(gram, order, self.rounding.dampening_frac)
        variances = gram.new_empty(gram.shape[0])
        variances[order.flip(0)] = lower.diagonal().square()
        return variances.to(self.moments.mean_abs.device)


@dataclass(frozen=True, slots=True)
class Problem:
    """The search for one mapping's scales.

    groups: its balance layers by the rows that they read; mean_abs: (I,), of the smoothed tensor; source: (I,) int64, the smooth layer's
    output channel that each input channel comes from (arange, or repeated under grouped-query attention): inputs of one source share a
    scale; num_sources: how many such channels there are; grid_dtype: what the group scales will be stored in.
    """

    groups: Sequence[SearchGroup]
    mean_abs: Tensor
    source: Tensor
    num_sources: int
    grid_dtype: torch.dtype


def choose_scales(problems: Sequence[Problem], settings: Smoothing) -> list[ScaleChoice]:
    """Chooses the smoothing scales of one mapping, or of several mappings side by side.

    Args:
        problems: One of any kind; or several that are alike, of one group each, as those of experts are.
        settings: The grid of candidates.

    Returns:
        A choice for every problem. Its errors are not finite if those of no candidate are.

    Raises:
        NumericalError: A Gram matrix cannot be factorised.
    """
    first = problems[0]
    if len(problems) == 1:
        stacks = [stack for batch in _batches(first.groups) for stack in _stacked(batch)]
        search = _Search(stacks, len(first.groups), first.grid_dtype, shared=True)
        return search.choices(first.mean_abs.unsqueeze(0), first, settings)
    choices: list[ScaleChoice] = []
    for batch in _batches([group for problem in problems for group in problem.groups]):
        search = _Search(_stacked(batch), len(batch), first.grid_dtype, shared=False)
        choices += search.choices(torch.stack([group.moments.mean_abs for group in batch]), first, settings)
    return choices


@dataclass(frozen=True, slots=True)
class _Stack:
    """The linears of B groups under one scheme, stacked to (B, R, I): their rows are independent of each other."""

    groups: Sequence[SearchGroup]
    scheme: WeightScheme

    @property
    def num_rows(self) -> int:
        """Of one group."""
        return sum(b.weight.shape[0] for b in self.groups[0].balance if b.scheme == self.scheme)

    @property
    def is_sketched(self) -> bool:
        return self.groups[0].moments.is_sketch and not self.groups[0].is_compensated

    def weight(self) -> Tensor:
        """(B, R, I) in the checkpoint's dtype, made anew."""
        weights = [b.at_hand() for group in self.groups for b in group.balance if b.scheme == self.scheme]
        return torch.cat(weights).view(len(self.groups), -1, weights[0].shape[1])

    def form(self, *, rough: bool = False) -> Form:
        """What tells the errors of changes (B, r, I). rough: to rank by, which for experts is by their sketches."""
        if self.groups[0].is_compensated:
            return Diagonal(torch.stack([group.variances for group in self.groups]))
        return form_of([group.moments for group in self.groups], rough=rough)


def _batches(groups: Sequence[SearchGroup]) -> Iterator[list[SearchGroup]]:
    """Groups of experts that are alike together, up to a bound; every other group alone. Those without a quantized linear are left out."""
    batch: list[SearchGroup] = []
    for group in (group for group in groups if any(b.scheme is not None for b in group.balance)):
        device = group.moments.mean_abs.device.type  # the weights may be elsewhere
        room = BATCH_BYTES.get(device, 0) // (4 * sum(b.weight.numel() for b in group.balance))
        alone = not (group.moments.has_prior or group.is_compensated)
        if batch and (alone or len(batch) >= room or group.kind != batch[0].kind):
            yield batch
            batch = []
        batch.append(group)
        if alone:
            yield batch
            batch = []
    if batch:
        yield batch


def _stacked(batch: Sequence[SearchGroup]) -> list[_Stack]:
    """A batch by scheme."""
    schemes = dict.fromkeys(b.scheme for b in batch[0].balance if b.scheme is not None)
    return [_Stack(batch, scheme) for scheme in schemes]


class _Search:
    """K mappings at a time: one whose errors are summed over the groups of all stacks, or one for each of their B groups."""

    def __init__(self, stacks: Sequence[_Stack], num_groups: int, dtype: torch.dtype, *, shared: bool) -> None:
        self._stacks, self._dtype, self._shared = stacks, dtype, shared
        self._num_rows = sum(stack.num_rows * (len(stack.groups) if shared else 1) for stack in stacks)
        self._screened = self._num_rows >= _SCREENED_ROWS
        self._on_samples = self._screened and any(stack.is_sketched for stack in stacks)
        of_one, of_groups, of_expert = _DECIDING_ROWS if self._on_samples else _ROWS
        several = tuple(max(_LEAST_ROWS, rows // num_groups) for rows in of_groups)
        self._sizes = (of_one if num_groups == 1 else several) if shared else of_expert  # rows of a group, by step

    def choices(self, mean_abs: Tensor, like: Problem, settings: Smoothing) -> list[ScaleChoice]:
        """mean_abs: (K, I)."""
        samples: list[list[WeightSample]] = [[] for _ in self._sizes]
        sums = torch.zeros_like(mean_abs)
        for stack in self._stacks:
            weight = stack.weight()
            own, peaks = sums_and_peaks(weight, stack.scheme)  # (B, I), (B, R, G)
            sums += own.sum(0, keepdim=True) if self._shared else own
            if self._on_samples:
                importance, form = _expected_errors(stack, peaks), stack.form(rough=True)
                for size, found in zip(self._sizes, samples, strict=True):
                    found.append(WeightSample(*sample_rows(weight, importance, size), stack.scheme, form))
        tried = candidates(sums / self._num_rows, mean_abs, like.source, like.num_sources, settings)
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
                    WeightSample(*sample_rows(s.weight(), errors[0], self._sizes[step]), s.scheme, s.form(rough=True))
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

    def _row_errors(self, stack: _Stack, scales: Tensor) -> Tensor:
        """Of all rows, under scales (n, K, I): (n, B, R) float64."""
        weight, form = stack.weight(), stack.form()
        found = weight.new_empty(scales.shape[0], *weight.shape[:2], dtype=torch.float64)
        for i, one in enumerate(scales):
            found[i] = form.errors(
                rounding_difference(weight, one.expand(weight.shape[0], -1), stack.scheme, self._dtype)
            )
        return found


@dataclass(frozen=True, slots=True)
class WeightSample:
    """Rows of B groups of linears that stand for all of them.

    weight: (B, r, I); counts: how many rows each stands for, (r,) float64; form: tells errors of changes (B, n, I).
    """

    weight: Tensor
    counts: Tensor
    scheme: WeightScheme
    form: Form

    def errors(self, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the errors of all rows, as far as these tell, under several scales.

        Args:
            scales: (n, K, I), K being 1 or B.
            dtype: What the group scales are stored in.

        Returns:
            (n, B) float64.
        """
        num_groups, size, width = self.weight.shape
        most = _BLOCK_ELEMENTS[self.weight.device.type]
        found = []
        for part in scales.split(max(1, most // self.weight.numel())):
            num_tried = part.shape[0]
            each = part.expand(-1, num_groups, -1).transpose(0, 1).flatten(0, 1)  # (B·n, I)
            weight = self.weight.repeat_interleave(num_tried, 0)  # (B·n, r, I)
            differences = rounding_difference(weight, each, self.scheme, dtype)
            errors = self.form.errors(differences.view(num_groups, -1, width))  # (B, n·r)
            found.append(errors.unflatten(1, (num_tried, size)) @ self.counts)
        return torch.cat(found, 1).T


def sample_rows(weight: Tensor, importance: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Returns rows of every group, (B, r, I), and how many rows each stands for, (r,) float64, see `sampled_rows`.

    Args:
        weight: (B, R, I).
        importance: (B, R).
        num_rows: r, if there are as many.
    """
    if num_rows >= weight.shape[1]:
        return weight, importance.new_ones(weight.shape[1], dtype=torch.float64)
    rows, counts = sampled_rows(importance, num_rows)
    return weight[torch.arange(weight.shape[0], device=weight.device).unsqueeze(1), rows], counts


def sampled_rows(importance: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Chooses rows that stand for all: those of largest importance, and evenly spaced ones of the others, counted for those between them.

    Evenly spaced rows alone chose scales up to 28 % worse on a model with outliers: few rows carry most of the error.

    Args:
        importance: (B, R), which grows with a row's error.
        num_rows: r, or R if that is less.

    Returns:
        The numbers of rows of every group, (B, r) int64, and how many rows each stands for, (r,) float64.
    """
    num_groups, total = importance.shape
    if num_rows >= total:
        rows = torch.arange(total, device=importance.device).expand(num_groups, -1)
        return rows, importance.new_ones(total, dtype=torch.float64)
    half = num_rows // 2
    spaced = torch.arange(num_rows - half, device=importance.device) * (total - half) // (num_rows - half)
    order = torch.argsort(importance, dim=1, descending=True, stable=True)
    counts = importance.new_ones(num_rows, dtype=torch.float64)
    counts[half:] = (total - half) / (num_rows - half)
    return torch.cat([order[:, :half], order[:, half + spaced]], 1), counts


def total_error(samples: Sequence[WeightSample], scales: Tensor, dtype: torch.dtype, *, shared: bool) -> Tensor:
    """Returns the errors under scales (n, K, I), summed over the samples, and over their groups if `shared`, as (n, K) float64."""
    errors = [sample.errors(scales, dtype) for sample in samples]
    return torch.stack([e.sum(1, keepdim=True) if shared else e for e in errors]).sum(0)


def _expected_errors(stack: _Stack, peaks: Tensor) -> Tensor:
    """(B, R), in proportion to the error of every row under the identity, were it independent from input to input: of a group its
    largest weight, squared, times what its inputs carry. peaks: (B, R, G), see `sums_and_peaks`."""
    mean_abs = torch.stack([group.moments.mean_abs for group in stack.groups])
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
