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
from awqdist.quant.grid import QuantizedWeight, grid_parameters, group_range, round_to_nearest, rounding_difference
from awqdist.quant.rounding import round_gptq
from awqdist.quant.rounding_experts import num_side_by_side, round_gptq_side_by_side
from awqdist.quant.stats import quadratic_form_rows, rough_form
from awqdist.recipe import Recipe, WeightScheme
from awqdist.run.device import release_host_memory
from awqdist.run.gather import SiteStatistics
from awqdist.run.plan import LayerTask
from awqdist.run.records import LinearRecord

Parameters = Mapping[str, Tensor]


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
    drafts = [d for paths in batch for d in _drafts(task, paths, smoothed, _site(task, paths, sites, recipe), recipe)]
    for draft, result in zip(drafts, _rounded(drafts, recipe), strict=True):
        errors = _row_errors(draft, result)
        first = 0
        for path in draft.paths:
            rows = slice(first, first + task.shapes[path][0])
            first = rows.stop
            weight = QuantizedWeight(
                result.codes[rows], result.weight_scale[rows], result.zero_point[rows], draft.scheme
            )
            yield path, weight, _linear_record(task.disk_module(path), draft, task.shapes[path], errors[:, rows].sum(1))


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
    """Takes the Gram matrix out of the statistics, to hold only one. None is made if no linear is fitted to it."""
    statistics = sites.statistics[paths[0]]
    scales = sites.scales.get(paths[0])
    if scales is None:
        scales = torch.ones_like(statistics.mean_abs)
    num_dead_inputs = int((statistics.mean_abs == 0).sum())
    grid_dtype = next(sites.grid_dtypes[path] for path in paths if path in task.schemes)
    gram = statistics.take_smoothed_gram(scales) if recipe.needs_gram else None
    return _Site(statistics, gram, scales, num_dead_inputs, grid_dtype)


def _drafts(
    task: LayerTask, paths: tuple[str, ...], smoothed: Parameters, site: _Site, recipe: Recipe
) -> Iterator[_Draft]:
    """Fixes the grid of the linears of one site, stacked by scheme."""
    quantized = [path for path in paths if path in task.schemes]
    for scheme in dict.fromkeys(task.schemes[path] for path in quantized):
        stacked = [path for path in quantized if task.schemes[path] == scheme]
        weight = torch.cat([smoothed[f"{path}.weight"].float() for path in stacked])
        clipped = 0.0
        if recipe.clip:
            assert site.gram is not None
            low, high, clipped = clipped_range(weight, site.gram, scheme)
            low, high = low.to(site.grid_dtype), high.to(site.grid_dtype)
        else:
            low, high = group_range(weight.to(site.grid_dtype), scheme)  # what compressed-tensors' observer would see
        weight_scale, zero_point = grid_parameters(low, high, scheme)
        yield _Draft(stacked, weight, scheme, site, weight_scale, zero_point, clipped)


def _rounded(drafts: Sequence[_Draft], recipe: Recipe) -> Iterator[QuantizedWeight]:
    """The drafts of a batch on their grids; all of one shape and scheme where they are of several sites."""
    grams = [draft.site.gram for draft in drafts if draft.site.gram is not None]
    if recipe.rounding.method == "nearest":
        for d in drafts:
            yield round_to_nearest(d.weight.to(d.site.grid_dtype), d.weight_scale, d.zero_point, d.scheme)
    elif len({id(d.site) for d in drafts}) == 1:
        for d, gram in zip(drafts, grams, strict=True):
            yield round_gptq(d.weight, gram, d.weight_scale, d.zero_point, d.scheme, recipe.rounding)
    else:
        grids = [(d.weight_scale, d.zero_point) for d in drafts]
        weights = [d.weight for d in drafts]
        yield from round_gptq_side_by_side(weights, grams, grids, drafts[0].scheme, recipe.rounding)


def _row_errors(draft: _Draft, result: QuantizedWeight) -> Tensor:
    """Of every row its output, its output error if it were not smoothed and rounded to nearest, and that of the result, squared and summed
    over the tokens: (3, ΣO) float64."""
    site, weight = draft.site, draft.weight
    if site.gram is None or isinstance(site.statistics, ExpertStatistics):
        difference = result.dequantize().sub_(weight).div_(site.scales)
        stacked = torch.cat([weight / site.scales, _nearest(draft), difference])
        return site.statistics.rough_row_errors(stacked).view(3, -1)
    signal = rough_form(weight, site.gram), rough_form(_nearest(draft).mul_(site.scales), site.gram)
    return torch.stack([*signal, quadratic_form_rows(result.dequantize().sub_(weight), site.gram)])


def _nearest(draft: _Draft) -> Tensor:
    """(ΣO, I): what rounding to nearest without smoothing would change."""
    scales = draft.site.scales
    return rounding_difference(draft.weight / scales, torch.ones_like(scales), draft.scheme, draft.site.grid_dtype)


def _linear_record(name: str, draft: _Draft, shape: tuple[int, int], errors: Tensor) -> LinearRecord:
    """errors: (3,), see `_row_errors`."""
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
