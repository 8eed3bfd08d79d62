"""The AWQ scale search (arXiv 2306.00978, section 3.2) on statistics instead of activations.

Per mapping the candidates are the identity and s = mean_abs^r / (w_mean^(1-r) + 1e-4) over a grid of ratios r, normalised by
s /= sqrt(max·min). The one whose rounded weights change the outputs of the balance layers least is chosen. Nothing of the model
is run again and nothing is mutated.

Large layers are screened first: errors of all candidates on a sample of the rows, then of the best few on all rows, both in rough products;
the exact errors of the winner and of the identity decide. The sample takes the rows with the largest error under the identity, and every
n-th of the others, counted n times. (An evenly spaced sample chose scales up to 28 % worse on a model with outliers: few rows carry most
of the error.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.quant.grid import grouped, rounding_difference
from awqdist.quant.stats import InputStatistics
from awqdist.recipe import Smoothing, WeightScheme

_SCREENED_ROWS = (
    256  # rows that rank the candidates, half of them the worst; used where a mapping has at least twice as many
)
_NUM_FINALISTS = 3


@dataclass(frozen=True, slots=True)
class BalanceWeight:
    """A linear that reads the smoothed tensor. weight: (O, I) float32; scheme: None where the recipe leaves it unquantized."""

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


def search_scales(
    balance: Sequence[BalanceWeight],
    statistics: InputStatistics,
    source: Tensor,
    settings: Smoothing,
    dtype: torch.dtype,
) -> ScaleChoice:
    """Chooses the smoothing scales of one mapping.

    balance: all linears that read the smoothed tensor; source: (I,) int64, the smooth layer's output channel that each input
    channel comes from (arange, or repeated under grouped-query attention): inputs of one source share a scale; dtype: what the
    group scales are stored in.
    """
    stacks = _stack_by_scheme(balance)
    candidates = _candidates(stacks, statistics.mean_abs, source, settings)
    finite = [c for c in candidates if bool(torch.isfinite(c.scales).all())]
    identity, others = finite[0], finite[1:]
    row_errors = [_row_errors(stack, identity.scales, statistics, dtype) for stack in stacks]
    num_nonfinite = len(candidates) - len(finite)
    if sum(errors.shape[0] for errors in row_errors) >= 2 * _SCREENED_ROWS:
        others, num_dropped = _screened(stacks, row_errors, others, statistics, dtype)
        num_nonfinite += num_dropped
    finalists = [identity, *others]
    errors = [sum(float(e.sum()) for e in row_errors), *(_error(stacks, c.scales, statistics, dtype) for c in others)]
    usable = [(error, i) for i, error in enumerate(errors) if math.isfinite(error)]
    num_nonfinite += len(errors) - len(usable)
    best_error, best = min(usable, default=(errors[0], 0))
    chosen = finalists[best]
    return ScaleChoice(chosen.scales, chosen.ratio, chosen.duo_scaling, errors[0], best_error, num_nonfinite)


def weight_mean(stacks: Sequence[Stack]) -> Tensor:
    """(I,) float32: mean over all rows of |W| / (max |W| of its group + 1e-6)."""
    total = torch.zeros_like(stacks[0][0][0])
    for weight, scheme in stacks:
        magnitude = grouped(weight.abs(), scheme)  # (O, G, g)
        total += (magnitude / (magnitude.amax(-1, keepdim=True) + 1e-6)).flatten(1).sum(0)
    return total / sum(weight.shape[0] for weight, _ in stacks)


def _stack_by_scheme(balance: Sequence[BalanceWeight]) -> list[Stack]:
    """Quantized linears under one scheme as one (ΣO, I) matrix: their rows are independent of each other."""
    schemes = dict.fromkeys(b.scheme for b in balance if b.scheme is not None)
    return [(torch.cat([b.weight for b in balance if b.scheme == scheme]), scheme) for scheme in schemes]


def _candidates(stacks: Sequence[Stack], mean_abs: Tensor, source: Tensor, settings: Smoothing) -> list[_Candidate]:
    """The identity first, then the grid of DESIGN: n_grid candidates in all (with duo "both": half of them each way)."""
    x_mean, w_mean = _tie(mean_abs, source), _tie(weight_mean(stacks), source)
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


def _screened(
    stacks: Sequence[Stack],
    row_errors: Sequence[Tensor],
    candidates: list[_Candidate],
    statistics: InputStatistics,
    dtype: torch.dtype,
) -> tuple[list[_Candidate], int]:
    """The candidate worth an exact evaluation, and how many gave no finite error. row_errors: (O,) of every stack under the identity."""
    samples = [_sample(stack, errors) for stack, errors in zip(stacks, row_errors, strict=True)]
    whole = [
        _Sample(weight, scheme, torch.ones_like(e)) for (weight, scheme), e in zip(stacks, row_errors, strict=True)
    ]
    usable = _ranked(samples, candidates, statistics, dtype)
    return _ranked(whole, usable[:_NUM_FINALISTS], statistics, dtype)[:1], len(candidates) - len(usable)


def _ranked(
    samples: Sequence[_Sample], candidates: Sequence[_Candidate], statistics: InputStatistics, dtype: torch.dtype
) -> list[_Candidate]:
    """The candidates with a finite error, the best first."""
    estimates = []
    for candidate in candidates:
        differences = [rounding_difference(s.weight, candidate.scales, s.scheme, dtype) for s in samples]
        parts = [statistics.rough_row_errors(d) * s.counts for d, s in zip(differences, samples, strict=True)]
        estimates.append(sum(float(part.sum()) for part in parts))
    order = sorted((estimate, i) for i, estimate in enumerate(estimates) if math.isfinite(estimate))
    return [candidates[i] for _, i in order]


def _sample(stack: Stack, errors: Tensor) -> _Sample:
    weight, scheme = stack
    half = _SCREENED_ROWS // 2
    order = torch.argsort(errors, descending=True, stable=True)
    worst, others = order[:half], order[half:]
    step = max(1, others.shape[0] // half)
    rows = torch.cat([worst, others[::step]])
    counts = torch.ones(rows.shape[0], dtype=torch.float64, device=weight.device)
    counts[worst.shape[0] :] = step
    return _Sample(weight[rows], scheme, counts)


def _row_errors(stack: Stack, scales: Tensor, statistics: InputStatistics, dtype: torch.dtype) -> Tensor:
    """(O,) float64."""
    weight, scheme = stack
    return statistics.row_errors(rounding_difference(weight, scales, scheme, dtype))


def _error(stacks: Sequence[Stack], scales: Tensor, statistics: InputStatistics, dtype: torch.dtype) -> float:
    return sum(float(_row_errors(stack, scales, statistics, dtype).sum()) for stack in stacks)
