"""Rounds the linears of a layer, input site by input site.

Linears of one site under one scheme go through stacked: their rows are independent. Sites of experts go through side by side, as many
as their matrices fit the memory meant for it: hundreds of small problems are one problem of batched products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.layer.calibrate import SiteStatistics
from awqdist.layer.drafts import Draft, Site
from awqdist.layer.linear_records import linear_errors, linear_record
from awqdist.layer.mlp_refit import InnerStatistics
from awqdist.layer.plan import LayerTask
from awqdist.layer.records import LinearRecord
from awqdist.quant.factor import refit_correction
from awqdist.quant.gptq import OutputOrder, gptq, num_side_by_side
from awqdist.quant.grid import Grid, QuantizedWeight, clipped_range, group_range, make_grid, round_to_nearest
from awqdist.recipe import Recipe
from awqdist.run.device import release_host_memory

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class SmoothedSites:
    """statistics: by the first linear of a site; scales (I,), the dtype of the group scales to store, and where the codes are to lie: by
    linear; outputs: how what is written to the residual stream is compensated over."""

    statistics: Mapping[str, SiteStatistics]
    scales: Mapping[str, Tensor]
    grid_dtypes: Mapping[str, torch.dtype]
    homes: Mapping[str, torch.device]
    outputs: OutputOrder | None = None


@dataclass(frozen=True, slots=True)
class _State:
    """What is known when a site's turn comes. rounded: the linears of the sites before it, by path."""

    task: LayerTask
    smoothed: Parameters
    rounded: Mapping[str, QuantizedWeight]
    sites: SmoothedSites
    recipe: Recipe

    def scales(self, path: str) -> Tensor:
        """(I,), what the input of linear `path` is divided by."""
        first = next(site[0] for site in self.task.sites if path in site)
        scales = self.sites.scales.get(path)
        return torch.ones_like(self.sites.statistics[first].mean_abs) if scales is None else scales


def round_sites(
    task: LayerTask, smoothed: Parameters, sites: SmoothedSites, recipe: Recipe
) -> tuple[dict[str, QuantizedWeight], list[LinearRecord]]:
    """All quantized linears of a layer by path, and their records. The Gram matrices are taken out of the statistics."""
    weights: dict[str, QuantizedWeight] = {}
    records: list[LinearRecord] = []
    for batch in _batches(task, sites):
        release_host_memory()
        for path, weight, record in _round_batch(batch, _State(task, smoothed, weights, sites, recipe)):
            weights[path] = weight.to(sites.homes[path])
            records.append(record)
    return weights, records


def _round_batch(
    batch: Sequence[tuple[str, ...]], state: _State
) -> Iterator[tuple[str, QuantizedWeight, LinearRecord]]:
    """The linears of sites that are rounded together. Their matrices live no longer than this."""
    task = state.task
    for draft, result in _rounded(batch, state):
        first = 0
        sizes = [task.shapes[path][0] for path in draft.paths]
        for path, errors in zip(draft.paths, linear_errors(draft, result, sizes), strict=True):
            rows = slice(first, first + task.shapes[path][0])
            first = rows.stop
            weight = QuantizedWeight(
                result.codes[rows], result.weight_scale[rows], result.zero_point[rows], draft.scheme
            )
            yield path, weight, linear_record(task.disk_module(path), draft, task.shapes[path], errors)


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


def _site(paths: tuple[str, ...], state: _State) -> Site:
    """Takes the Gram matrix out of the statistics, to hold only one. None is made of a sketch, unless linears are fitted to it."""
    statistics, recipe = state.sites.statistics[paths[0]], state.recipe
    scales = state.scales(paths[0])
    needed = recipe.needs_gram or not statistics.is_sketch
    gram, corrected = None, None
    if isinstance(statistics, InnerStatistics):
        gram, corrected = _refitted(statistics, state)
    elif needed:
        gram = statistics.take_smoothed_gram(scales)
    return Site(
        statistics,
        gram,
        scales,
        num_dead_inputs=int((statistics.mean_abs == 0).sum()),
        grid_dtype=next(state.sites.grid_dtypes[path] for path in paths if path in state.task.schemes),
        correction=corrected,
        outputs=state.sites.outputs if len(paths) == 1 and paths[0] in state.task.writers else None,
    )


def _refitted(statistics: InnerStatistics, state: _State) -> tuple[Tensor, Tensor]:
    """The Gram matrix (I, I) of an inner linear's input as it comes from rounded linears, and what the linear makes up for (O, I)."""
    prefix = f"{statistics.owner.path}."
    before = {name.removeprefix(prefix): state.smoothed[name] for name in state.smoothed if name.startswith(prefix)}
    rounded = [path for path in state.rounded if path.startswith(prefix)]
    after = before | {f"{path.removeprefix(prefix)}.weight": state.rounded[path].dequantize() for path in rounded}
    outer = next(path for site in state.task.sites for path in site if path.startswith(prefix))
    found = statistics.refitting(before, after, state.scales(outer))
    gram = found.statistics.take_smoothed_gram(torch.ones_like(statistics.mean_abs))  # it is of smoothed inputs
    return gram, refit_correction(gram, found.lost, state.recipe.rounding.dampening_frac)


def _drafts(paths: tuple[str, ...], state: _State) -> Iterator[Draft]:
    """Fixes the grid of the linears of one site, stacked by scheme."""
    site, schemes = _site(paths, state), state.task.schemes
    for scheme in dict.fromkeys(schemes[path] for path in paths if path in schemes):
        stacked = [path for path in paths if schemes.get(path) == scheme]
        weights = [state.smoothed[f"{path}.weight"].float() for path in stacked]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        del weights
        target = weight if site.correction is None else weight + site.correction
        clipped = 0.0
        if state.recipe.clip:
            assert site.gram is not None
            low, high, clipped = clipped_range(target, site.gram, scheme)
        else:
            low, high = group_range(target, scheme)
        # in the dtype of the grid, as compressed-tensors' observer sees them: rounding keeps the order of numbers
        grid = make_grid(low.to(site.grid_dtype), high.to(site.grid_dtype), scheme)
        yield Draft(stacked, weight, target, scheme, site, grid.weight_scale, grid.zero_point, clipped)


def _rounded(batch: Sequence[tuple[str, ...]], state: _State) -> Iterator[tuple[Draft, QuantizedWeight]]:
    """The linears of a batch of sites on their grids: to nearest one draft at a time, else together."""
    every, rounding = (draft for paths in batch for draft in _drafts(paths, state)), state.recipe.rounding
    if rounding.method == "nearest":
        for d in every:
            yield d, round_to_nearest(d.target, Grid(d.weight_scale, d.zero_point, d.scheme), d.site.grid_dtype)
        return
    drafts = list(every)
    grams = [draft.site.gram for draft in drafts if draft.site.gram is not None]
    grids = [Grid(d.weight_scale, d.zero_point, d.scheme) for d in drafts]
    results = gptq([d.target for d in drafts], grams, grids, rounding, drafts[0].site.outputs)
    yield from zip(drafts, results, strict=True)
