"""Makes the scales that the search tries: the identity, and a grid of ratios r between activations and weights.

    s = mean_abs^r / (w_mean^(1-r) + 1e-4)      s /= sqrt(max·min)

All functions take leading dimensions: K mappings at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.quant.grid import cached_elements, grouped
from awqdist.quant.precision import repeatable
from awqdist.recipe import Smoothing, WeightScheme


@dataclass(frozen=True, slots=True)
class Candidate:
    """One try for each of K mappings. scales: (K, I) float32; ratio: None for the identity."""

    scales: Tensor
    ratio: float | None
    duo_scaling: bool


@dataclass(frozen=True, slots=True)
class ScaleChoice:
    """The outcome of a search. scales: (I,) float32, equal for the inputs that come from one output of the smooth layer."""

    scales: Tensor
    ratio: float | None  # None: the identity
    duo_scaling: bool
    error_before: float
    error_after: float
    num_nonfinite: int


@repeatable
def sums_and_peaks(weight: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """Sums |W| / (max |W| of its group + 1e-6) over the rows. On a CPU they are worked through in blocks that stay in the cache.

    Args:
        weight: (..., O, I), any float dtype.
        scheme: Says what a group is.

    Returns:
        The sums, (..., I), and the maxima, (..., O, G); both float32.
    """
    sums = weight.new_zeros(*weight.shape[:-2], weight.shape[-1], dtype=torch.float32)
    peaks = []
    num_rows = weight.shape[-2] if weight.is_cuda else max(1, cached_elements(weight) // sums.numel())
    for block in weight.split(num_rows, -2):
        magnitude = grouped(block.abs().float(), scheme)  # (..., rows, G, g)
        peak = magnitude.amax(-1)
        peaks.append(peak)
        sums += magnitude.div_((peak + 1e-6).unsqueeze(-1)).flatten(-2).sum(-2)
    return sums, torch.cat(peaks, -2)


def candidates(
    w_mean: Tensor, mean_abs: Tensor, source: Tensor, num_sources: int, settings: Smoothing
) -> list[Candidate]:
    """Returns the identity, then the grid: n_grid candidates in all (with duo "both" half of them each way).

    Args:
        w_mean: (K, I) float32.
        mean_abs: (K, I) float32.
        source: (I,) int64, the channel that each input comes from; inputs of one channel share a scale.
        num_sources: How many channels there are.
        settings: Which grid.
    """
    x_mean, w_mean = _tie(mean_abs, source, num_sources), _tie(w_mean, source, num_sources)
    num = settings.n_grid
    if settings.duo_scaling == "both":
        half = max(num // 2, 2)
        grid = [(k / (half - 1), duo) for duo in (False, True) for k in range(half) if k or duo]
    elif settings.duo_scaling:
        grid = [(k / max(num - 2, 1), True) for k in range(num - 1)]
    else:
        grid = [(k / max(num - 1, 1), False) for k in range(1, num)]
    identity = Candidate(torch.ones_like(x_mean), None, False)
    return [identity, *(Candidate(_scales(x_mean, w_mean, ratio, duo), ratio, duo) for ratio, duo in grid)]


def _scales(x_mean: Tensor, w_mean: Tensor, ratio: float, duo_scaling: bool) -> Tensor:
    divisor = w_mean.pow(1 - ratio) + 1e-4 if duo_scaling else 1.0
    scales = (x_mean.pow(ratio) / divisor).clamp(min=1e-4)
    scales = scales / (scales.amax(-1, keepdim=True) * scales.amin(-1, keepdim=True)).sqrt()
    return torch.where(torch.isfinite(scales), scales, torch.ones_like(scales))


def _tie(per_input: Tensor, source: Tensor, num_sources: int) -> Tensor:
    """Mean over the inputs that share a source channel, spread back over them: (..., I) -> (..., I)."""
    sums = per_input.new_zeros(*per_input.shape[:-1], num_sources).index_add_(-1, source, per_input)
    counts = per_input.new_zeros(num_sources).index_add_(0, source, per_input.new_ones(source.shape))
    return (sums / counts.clamp(min=1))[..., source]
