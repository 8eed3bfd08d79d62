"""The AWQ scale search (arXiv 2306.00978, section 3.2) on statistics instead of activations.

Per mapping the candidates are the identity and s = mean_abs^r / (w_mean^(1-r) + 1e-4) over a grid of ratios r, normalised by
s /= sqrt(max·min). The one whose rounded weights change the outputs of the balance layers least is chosen. Nothing of the model
is run again and nothing is mutated.

Large layers are screened first: errors of all candidates on a sample of the rows, then of the best few on all rows, both in rough products;
the exact errors of the winner and of the identity decide. The sample takes the rows with the largest error under the identity, and every
n-th of the others, counted n times. (An evenly spaced sample chose scales up to 28 % worse on a model with outliers: few rows carry most
of the error.)

In front of a mixture of experts one set of scales serves linears that read different rows: the shared ones all tokens, each expert its
own. Such a mapping has several *groups*; errors are summed over them, and one group is worked on at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.quant.grid import grouped, rounding_difference
from awqdist.quant.stats import Statistics
from awqdist.recipe import Smoothing, WeightScheme

_SCREENED_ROWS = (
    256  # rows that rank the candidates, half of them the worst; used where a mapping has at least twice as many
)
_GROUP_ROWS = (32, 1024)  # with several groups: rows of each, at least, and of all together
_NUM_FINALISTS = 3


@dataclass(frozen=True, slots=True)
class BalanceWeight:
    """A linear that reads the smoothed tensor. weight: (O, I) float; scheme: None where the recipe leaves it unquantized."""

    weight: Tensor
    scheme: WeightScheme | None


@dataclass(frozen=True, slots=True)
class ScaleChoice:
    """The outcome of a search. scales: (I,) float32, tied over the channels of one smooth-layer output."""

    scales: Tensor
    ratio: float | None  # None: the identity
    duo_scaling: bool
    error_before: float
    error_after: float
    num_nonfinite: int


Stack = tuple[Tensor, WeightScheme]  # the (ΣO, I) float32 rows under one scheme


@dataclass(frozen=True, slots=True)
class _Candidate:
    scales: Tensor  # (I,)
    ratio: float | None
    duo_scaling: bool


@dataclass(frozen=True, slots=True)
class SearchGroup:
    """Balance layers that read the same rows, and the statistics of these."""

    balance: Sequence[BalanceWeight]
    statistics: Statistics

    def stacks(self) -> list[Stack]:
        """Quantized linears under one scheme as one (ΣO, I) matrix: their rows are independent of each other."""
        schemes = dict.fromkeys(b.scheme for b in self.balance if b.scheme is not None)
        return [(torch.cat([b.weight.float() for b in self.balance if b.scheme == s]), s) for s in schemes]


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
    units = [_Unit(group, group.stacks() if len(groups) == 1 else None) for group in groups]
    candidates = _candidates(weight_mean(s for u in units for s in u.stacks()), mean_abs, source, settings)
    finite = [c for c in candidates if bool(torch.isfinite(c.scales).all())]
    identity, others = finite[0], finite[1:]
    num_nonfinite = len(candidates) - len(finite)
    screened = sum(unit.num_rows for unit in units) >= 2 * _SCREENED_ROWS
    error_before, estimates = _first_look(units, identity, others if screened else [], dtype)
    if screened:
        usable = _ranked(others, estimates)
        num_nonfinite += len(others) - len(usable)
        finalists = usable[:_NUM_FINALISTS]
        others = _ranked(finalists, _errors(units, finalists, dtype, rough=True))[:1]
    errors = [error_before, *_errors(units, others, dtype)]
    usable_errors = [(error, i) for i, error in enumerate(errors) if math.isfinite(error)]
    num_nonfinite += len(errors) - len(usable_errors)
    best_error, best = min(usable_errors, default=(errors[0], 0))
    chosen = [identity, *others][best]
    return ScaleChoice(chosen.scales, chosen.ratio, chosen.duo_scaling, errors[0], best_error, num_nonfinite)


def weight_mean(stacks: Iterable[Stack]) -> Tensor:
    """(I,) float32: mean over all rows of |W| / (max |W| of its group + 1e-6)."""
    total, num_rows = torch.zeros(()), 0
    for weight, scheme in stacks:
        magnitude = grouped(weight.abs(), scheme)  # (O, G, g)
        sums = (magnitude / (magnitude.amax(-1, keepdim=True) + 1e-6)).flatten(1).sum(0)
        total = total + sums if num_rows else sums
        num_rows += weight.shape[0]
    return total / num_rows


@dataclass(frozen=True, slots=True)
class _Unit:
    """A group in the search. kept: its stacks; None where there are many groups, whose float32 weights are not held at one time."""

    group: SearchGroup
    kept: list[Stack] | None

    def stacks(self) -> list[Stack]:
        return self.group.stacks() if self.kept is None else self.kept

    @property
    def num_rows(self) -> int:
        return sum(b.weight.shape[0] for b in self.group.balance if b.scheme is not None)


def _candidates(w_mean: Tensor, mean_abs: Tensor, source: Tensor, settings: Smoothing) -> list[_Candidate]:
    """The identity first, then the grid of DESIGN: n_grid candidates in all (with duo "both": half of them each way)."""
    x_mean, w_mean = _tie(mean_abs, source), _tie(w_mean, source)
    num = settings.n_grid
    if settings.duo_scaling == "both":
        half = max(num // 2, 2)
        grid = [(k / (half - 1), duo) for duo in (False, True) for k in range(half) if k or duo]
    elif settings.duo_scaling:
        grid = [(k / max(num - 2, 1), True) for k in range(num - 1)]
    else:
        grid = [(k / max(num - 1, 1), False) for k in range(1, num)]
    identity = _Candidate(torch.ones_like(x_mean), None, False)
    return [identity, *(_Candidate(_scales(x_mean, w_mean, ratio, duo), ratio, duo) for ratio, duo in grid)]


def _scales(x_mean: Tensor, w_mean: Tensor, ratio: float, duo_scaling: bool) -> Tensor:
    divisor = w_mean.pow(1 - ratio) + 1e-4 if duo_scaling else 1.0
    scales = (x_mean.pow(ratio) / divisor).clamp(min=1e-4)
    scales = scales / (scales.max() * scales.min()).sqrt()
    return torch.where(torch.isfinite(scales), scales, torch.ones_like(scales))


def _tie(per_input: Tensor, source: Tensor) -> Tensor:
    """Mean over the inputs that share a source channel, spread back over them: (I,) -> (I,)."""
    num_sources = int(source.max()) + 1
    sums = per_input.new_zeros(num_sources).index_add_(0, source, per_input)
    counts = per_input.new_zeros(num_sources).index_add_(0, source, torch.ones_like(per_input))
    return (sums / counts.clamp(min=1))[source]


@dataclass(frozen=True, slots=True)
class _Sample:
    """Rows that stand for a stack: weight (k, I), and how many rows each stands for, (k,) float64."""

    weight: Tensor
    scheme: WeightScheme
    counts: Tensor


def _first_look(
    units: Sequence[_Unit], identity: _Candidate, others: Sequence[_Candidate], dtype: torch.dtype
) -> tuple[float, list[float]]:
    """The exact error of the identity, and those of the others as a sample of the rows tells them."""
    num_sampled = _SCREENED_ROWS if len(units) == 1 else max(_GROUP_ROWS[0], _GROUP_ROWS[1] // len(units))
    error_before, estimates = 0.0, [0.0] * len(others)
    for unit in units:
        with unit.group.statistics.hold():
            for stack in unit.stacks():
                row_errors = _row_errors(stack, identity.scales, unit.group.statistics, dtype)
                error_before += float(row_errors.sum())
                if not others:
                    continue
                sample = _sample(stack, row_errors, num_sampled)
                for i, candidate in enumerate(others):
                    estimates[i] += _rough_error(sample, candidate, unit.group.statistics, dtype)
    return error_before, estimates


def _errors(
    units: Sequence[_Unit], candidates: Sequence[_Candidate], dtype: torch.dtype, *, rough: bool = False
) -> list[float]:
    """The error of each candidate over all rows."""
    errors = [0.0] * len(candidates)
    for unit in units:
        statistics = unit.group.statistics
        with statistics.hold():
            for stack in unit.stacks():
                for i, candidate in enumerate(candidates):
                    if rough:
                        whole = _Sample(
                            *stack, torch.ones(stack[0].shape[0], dtype=torch.float64, device=stack[0].device)
                        )
                        errors[i] += _rough_error(whole, candidate, statistics, dtype)
                    else:
                        errors[i] += float(_row_errors(stack, candidate.scales, statistics, dtype).sum())
    return errors


def _ranked(candidates: Sequence[_Candidate], errors: Sequence[float]) -> list[_Candidate]:
    """The candidates with a finite error, the best first."""
    return [candidates[i] for _, i in sorted((e, i) for i, e in enumerate(errors) if math.isfinite(e))]


def _sample(stack: Stack, errors: Tensor, num_rows: int) -> _Sample:
    """About `num_rows` rows of a stack. errors: (O,), of its rows under the identity."""
    weight, scheme = stack
    half = num_rows // 2
    order = torch.argsort(errors, descending=True, stable=True)
    worst, others = order[:half], order[half:]
    step = max(1, others.shape[0] // half)
    rows = torch.cat([worst, others[::step]])
    counts = torch.ones(rows.shape[0], dtype=torch.float64, device=weight.device)
    counts[worst.shape[0] :] = step
    return _Sample(weight[rows], scheme, counts)


def _rough_error(sample: _Sample, candidate: _Candidate, statistics: Statistics, dtype: torch.dtype) -> float:
    difference = rounding_difference(sample.weight, candidate.scales, sample.scheme, dtype)
    return float((statistics.rough_row_errors(difference) * sample.counts).sum())


def _row_errors(stack: Stack, scales: Tensor, statistics: Statistics, dtype: torch.dtype) -> Tensor:
    """(O,) float64."""
    weight, scheme = stack
    return statistics.row_errors(rounding_difference(weight, scales, scheme, dtype))
