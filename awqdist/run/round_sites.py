"""Rounds the linears of a layer, input site by input site.

Linears of one site under one scheme go through stacked: their rows are independent. Sites of experts go through side by side, as many
as their matrices fit the memory meant for it: hundreds of small problems are one problem of batched products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.quant.clip import clipped_range
from awqdist.quant.experts import ExpertStatistics
from awqdist.quant.grid import (
    QuantizedWeight,
    grid_parameters,
    group_range,
    grouped,
    round_to_nearest,
    rounding_difference,
)
from awqdist.quant.rounding import round_gptq
from awqdist.quant.rounding_experts import num_side_by_side, round_gptq_side_by_side
from awqdist.quant.samples import sampled_rows
from awqdist.quant.stats import quadratic_form_rows, rough_form
from awqdist.recipe import Recipe, WeightScheme
from awqdist.run.device import release_host_memory
from awqdist.run.gather import SiteStatistics
from awqdist.run.plan import LayerTask
from awqdist.run.records import LinearRecord

Parameters = Mapping[str, Tensor]

_JUDGED_ROWS = 64  # of a linear whose input is known by a sketch, that its record is made of


@dataclass(frozen=True, slots=True)
class SmoothedSites:
    """statistics: by the first linear of a site; scales (I,), the dtype of the group scales to store, and where the codes are to lie: by
    linear."""

    statistics: Mapping[str, SiteStatistics]
    scales: Mapping[str, Tensor]
    grid_dtypes: Mapping[str, torch.dtype]
    homes: Mapping[str, torch.device]


@dataclass(frozen=True, slots=True)
class _Site:
    """An input site after smoothing. gram: (I, I) of the input divided by scales (I,), if it is of use; grid_dtype: of the group scales to
    store."""

    statistics: SiteStatistics
    gram: Tensor | None
    scales: Tensor
    num_dead_inputs: int
    grid_dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Draft:
    """Stacked linears on a fixed grid, to be rounded. weight: (ΣO, I) float32, smoothed; weight_scale, zero_point: (ΣO, G)."""

    paths: list[str]
    weight: Tensor
    scheme: WeightScheme
    site: _Site
    weight_scale: Tensor
    zero_point: Tensor
    clipped: float


def round_sites(
    task: LayerTask, smoothed: Parameters, sites: SmoothedSites, recipe: Recipe
) -> tuple[dict[str, QuantizedWeight], list[LinearRecord]]:
    """All quantized linears of a layer by path, and their records. The Gram matrices are taken out of the statistics."""
    weights: dict[str, QuantizedWeight] = {}
    records: list[LinearRecord] = []
    for batch in _batches(task, sites):
        release_host_memory()
        for path, weight, record in _round_batch(task, batch, smoothed, sites, recipe):
            weights[path] = weight.to(sites.homes[path])
            records.append(record)
    return weights, records


def _round_batch(
    task: LayerTask, batch: Sequence[tuple[str, ...]], smoothed: Parameters, sites: SmoothedSites, recipe: Recipe
) -> Iterator[tuple[str, QuantizedWeight, LinearRecord]]:
    """The linears of sites that are rounded together. Their matrices live no longer than this."""
    for draft, result in _rounded(task, batch, smoothed, sites, recipe):
        first = 0
        sizes = [task.shapes[path][0] for path in draft.paths]
        for path, errors in zip(draft.paths, _errors(draft, result, sizes), strict=True):
            rows = slice(first, first + task.shapes[path][0])
            first = rows.stop
            weight = QuantizedWeight(
                result.codes[rows], result.weight_scale[rows], result.zero_point[rows], draft.scheme
            )
            yield path, weight, _linear_record(task.disk_module(path), draft, task.shapes[path], errors)


def _batches(task: LayerTask, sites: SmoothedSites) -> Iterator[list[tuple[str, ...]]]:
    """Sites with quantized linears; those of experts of one kind together, up to a bound."""
    batch: list[tuple[str, ...]] = []
    for paths in (site for site in task.sites if any(path in task.schemes for path in site)):
        num_outputs, num_inputs = sum(task.shapes[path][0] for path in paths), task.shapes[paths[0]][1]
        device = sites.statistics[paths[0]].mean_abs.device.type  # the weights may lie elsewhere
        full = len(batch) >= num_side_by_side(num_outputs, num_inputs, device)
        if batch and (full or not _alike(task, batch[0], paths)):
            yield batch
            batch = []
        batch.append(paths)
    if batch:
        yield batch


def _alike(task: LayerTask, one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether two sites are of experts of one kind, quantized in one way."""
    routed = [task.routed.get(paths[0]) for paths in (one, other)]
    schemes = [task.schemes.get(path) for path in (*one, *other)]
    return (
        routed[0] is not None and routed[1] is not None and routed[0].fused == routed[1].fused and len({*schemes}) == 1
    )


def _site(task: LayerTask, paths: tuple[str, ...], sites: SmoothedSites, recipe: Recipe) -> _Site:
    """Takes the Gram matrix out of the statistics, to hold only one. None is made of a sketch, unless linears are fitted to it."""
    statistics = sites.statistics[paths[0]]
    scales = sites.scales.get(paths[0])
    if scales is None:
        scales = torch.ones_like(statistics.mean_abs)
    num_dead_inputs = int((statistics.mean_abs == 0).sum())
    grid_dtype = next(sites.grid_dtypes[path] for path in paths if path in task.schemes)
    needed = recipe.fits_weights or not statistics.is_sketch
    gram = statistics.take_smoothed_gram(scales) if needed else None
    return _Site(statistics, gram, scales, num_dead_inputs, grid_dtype)


def _drafts(
    task: LayerTask, paths: tuple[str, ...], smoothed: Parameters, site: _Site, recipe: Recipe
) -> Iterator[_Draft]:
    """Fixes the grid of the linears of one site, stacked by scheme."""
    quantized = [path for path in paths if path in task.schemes]
    for scheme in dict.fromkeys(task.schemes[path] for path in quantized):
        stacked = [path for path in quantized if task.schemes[path] == scheme]
        weights = [smoothed[f"{path}.weight"].float() for path in stacked]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        del weights
        clipped = 0.0
        if recipe.clip:
            assert site.gram is not None
            low, high, clipped = clipped_range(weight, site.gram, scheme)
        else:
            low, high = group_range(weight, scheme)
        # in the dtype of the grid, as compressed-tensors' observer sees them: rounding keeps the order of numbers
        weight_scale, zero_point = grid_parameters(low.to(site.grid_dtype), high.to(site.grid_dtype), scheme)
        yield _Draft(stacked, weight, scheme, site, weight_scale, zero_point, clipped)


def _rounded(
    task: LayerTask, batch: Sequence[tuple[str, ...]], smoothed: Parameters, sites: SmoothedSites, recipe: Recipe
) -> Iterator[tuple[_Draft, QuantizedWeight]]:
    """The linears of a batch of sites on their grids: to nearest one draft at a time, else together, and then all of one shape and scheme
    where they are of several sites."""
    every = (d for paths in batch for d in _drafts(task, paths, smoothed, _site(task, paths, sites, recipe), recipe))
    if recipe.rounding.method == "nearest":
        for d in every:
            yield d, round_to_nearest(d.weight, d.weight_scale, d.zero_point, d.scheme, d.site.grid_dtype)
        return
    drafts = list(every)
    grams = [draft.site.gram for draft in drafts if draft.site.gram is not None]
    if len({id(d.site) for d in drafts}) == 1:
        for d, gram in zip(drafts, grams, strict=True):
            yield d, round_gptq(d.weight, gram, d.weight_scale, d.zero_point, d.scheme, recipe.rounding)
    else:
        grids = [(d.weight_scale, d.zero_point) for d in drafts]
        weights = [d.weight for d in drafts]
        results = round_gptq_side_by_side(weights, grams, grids, drafts[0].scheme, recipe.rounding)
        yield from zip(drafts, results, strict=True)


def _errors(draft: _Draft, result: QuantizedWeight, sizes: Sequence[int]) -> Tensor:
    """Of every linear its output, its output error if it were not smoothed and rounded to nearest, and that of the result, squared and
    summed over the tokens: (n, 3) float64. sizes: rows of the n linears."""
    gram = draft.site.gram
    if gram is None or isinstance(draft.site.statistics, ExpertStatistics):
        return _sampled_errors(draft, result, sizes)
    nearest = _nearest(draft, draft.weight / draft.site.scales)
    signal = rough_form(draft.weight, gram), rough_form(nearest.mul_(draft.site.scales), gram)
    found = torch.stack([*signal, quadratic_form_rows(result.dequantize().sub_(draft.weight), gram)])  # (3, ΣO)
    return torch.stack([errors.sum(1) for errors in found.split(list(sizes), 1)])


def _sampled_errors(draft: _Draft, result: QuantizedWeight, sizes: Sequence[int]) -> Tensor:
    """The same as some rows of every linear tell it."""
    judged = list(_judged_rows(draft, sizes))
    found = _sampled_row_errors(draft, result, torch.cat([rows for rows, _ in judged]))
    each = found.split([rows.shape[0] for rows, _ in judged], 1)
    return torch.stack([errors @ counts for errors, (_, counts) in zip(each, judged, strict=True)])


def _judged_rows(draft: _Draft, sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of each linear that its record is made of, (r,) int64, and how many rows each stands for, (r,) float64."""
    energy = (draft.site.statistics.mean_abs / draft.site.scales).square()
    carried = grouped(energy, draft.scheme).sum(-1)  # (G,)
    importance = draft.weight_scale.float().square() @ carried  # (ΣO,)
    first = 0
    for size in sizes:
        rows, counts = sampled_rows(importance[first : first + size].unsqueeze(0), _JUDGED_ROWS)
        yield rows[0] + first, counts
        first += size


def _sampled_row_errors(draft: _Draft, result: QuantizedWeight, rows: Tensor) -> Tensor:
    """(3, r) float64 of some rows (r,), as a sketch tells them."""
    scales, weight = draft.site.scales, draft.weight[rows]
    written = QuantizedWeight(result.codes[rows], result.weight_scale[rows], result.zero_point[rows], result.scheme)
    difference = written.dequantize().sub_(weight).div_(scales)
    original = weight.div_(scales)
    stacked = torch.cat([original, _nearest(draft, original), difference])
    return draft.site.statistics.rough_row_errors(stacked).view(3, -1)


def _nearest(draft: _Draft, original: Tensor) -> Tensor:
    """What rounding to nearest would change of weights that are not smoothed, (r, I)."""
    return rounding_difference(original, torch.ones_like(draft.site.scales), draft.scheme, draft.site.grid_dtype)


def _linear_record(name: str, draft: _Draft, shape: tuple[int, int], errors: Tensor) -> LinearRecord:
    """errors: (3,), see `_errors`."""
    signal, nearest, found = errors.tolist()
    signal = max(signal, 1e-30)
    return LinearRecord(
        name=name,
        shape=shape,
        num_bits=draft.scheme.num_bits,
        group_size=draft.scheme.group_size,
        symmetric=draft.scheme.symmetric,
        relative_error_nearest=nearest / signal,
        relative_error=found / signal,
        clipped_share=draft.clipped,
        num_dead_inputs=draft.site.num_dead_inputs,
    )
