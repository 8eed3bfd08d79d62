"""Linears on a fixed grid, about to be rounded, and what their rounding does to their outputs.

Where an input is known by a sketch, errors are estimates anyway, and some rows of a linear tell as much of them as all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.quant.experts import ExpertStatistics
from awqdist.quant.grid import QuantizedWeight, grouped, rounding_difference
from awqdist.quant.samples import sampled_rows
from awqdist.quant.stats import quadratic_form_rows, rough_form
from awqdist.quant.two_sided import OutputOrder
from awqdist.recipe import WeightScheme
from awqdist.run.gather import SiteStatistics

_JUDGED_ROWS = 64  # of a linear whose input is known by a sketch, that its record is made of


@dataclass(frozen=True, slots=True)
class Site:
    """An input site after smoothing. gram: (I, I) of the input divided by scales (I,), if it is of use; grid_dtype: of the group scales to
    store; correction: (O, I), what its linear makes up for of those before it; outputs: what its linears' errors count by."""

    statistics: SiteStatistics
    gram: Tensor | None
    scales: Tensor
    num_dead_inputs: int
    grid_dtype: torch.dtype
    correction: Tensor | None = None
    outputs: OutputOrder | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """Stacked linears on a fixed grid, to be rounded. weight: (ΣO, I) float32, smoothed; target: what is to be rounded, the same or
    corrected; weight_scale, zero_point: (ΣO, G)."""

    paths: list[str]
    weight: Tensor
    target: Tensor
    scheme: WeightScheme
    site: Site
    weight_scale: Tensor
    zero_point: Tensor
    clipped: float


def output_errors(draft: Draft, result: QuantizedWeight, sizes: Sequence[int]) -> Tensor:
    """Of every linear its output, its output error if it were not smoothed and rounded to nearest, and that of the result to its target,
    squared and summed over the tokens: (n, 3) float64. sizes: rows of the n linears."""
    gram = draft.site.gram
    if gram is None or isinstance(draft.site.statistics, ExpertStatistics):
        return _sampled_errors(draft, result, sizes)
    nearest = _nearest(draft, draft.weight / draft.site.scales)
    signal = rough_form(draft.weight, gram), rough_form(nearest.mul_(draft.site.scales), gram)
    found = torch.stack([*signal, quadratic_form_rows(result.dequantize().sub_(draft.target), gram)])  # (3, ΣO)
    return torch.stack([errors.sum(1) for errors in found.split(list(sizes), 1)])


def _sampled_errors(draft: Draft, result: QuantizedWeight, sizes: Sequence[int]) -> Tensor:
    """The same as some rows of every linear tell it."""
    judged = list(_judged_rows(draft, sizes))
    found = _sampled_row_errors(draft, result, torch.cat([rows for rows, _ in judged]))
    each = found.split([rows.shape[0] for rows, _ in judged], 1)
    return torch.stack([errors @ counts for errors, (_, counts) in zip(each, judged, strict=True)])


def _judged_rows(draft: Draft, sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of each linear that its record is made of, (r,) int64, and how many rows each stands for, (r,) float64."""
    energy = (draft.site.statistics.mean_abs / draft.site.scales).square()
    carried = grouped(energy, draft.scheme).sum(-1)  # (G,)
    importance = draft.weight_scale.float().square() @ carried  # (ΣO,)
    first = 0
    for size in sizes:
        rows, counts = sampled_rows(importance[first : first + size].unsqueeze(0), _JUDGED_ROWS)
        yield rows[0] + first, counts
        first += size


def _sampled_row_errors(draft: Draft, result: QuantizedWeight, rows: Tensor) -> Tensor:
    """(3, r) float64 of some rows (r,), as a sketch tells them."""
    scales = draft.site.scales
    written = QuantizedWeight(result.codes[rows], result.weight_scale[rows], result.zero_point[rows], result.scheme)
    difference = written.dequantize().sub_(draft.target[rows]).div_(scales)
    original = draft.weight[rows].div_(scales)
    stacked = torch.cat([original, _nearest(draft, original), difference])
    return draft.site.statistics.rough_row_errors(stacked).view(3, -1)


def _nearest(draft: Draft, original: Tensor) -> Tensor:
    """What rounding to nearest would change of weights that are not smoothed, (r, I)."""
    return rounding_difference(original, torch.ones_like(draft.site.scales), draft.scheme, draft.site.grid_dtype)
