"""Rounds the linears of a layer, input site by input site.

Linears of one site under one scheme go through stacked: their rows are independent. Sites of experts go through side by side, as many
as their matrices fit the memory meant for it: hundreds of small problems are one problem of batched products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.layer.drafts import Draft, SmoothedSite
from awqdist.layer.linear_records import linear_errors, linear_record
from awqdist.layer.mlp_refit import InnerStatistics
from awqdist.layer.plan import LayerPlan, Site
from awqdist.layer.records import LinearRecord
from awqdist.layer.residency import release_host_memory
from awqdist.quant.factor import refit_correction
from awqdist.quant.gptq import OutputOrder, gptq, num_side_by_side
from awqdist.quant.grid import Grid, QuantizedWeight, clipped_range, group_range, make_grid, round_to_nearest
from awqdist.quant.moments import Moments
from awqdist.recipe import Recipe

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class SmoothedSites:
    """moments: by site; scales (I,), the dtype of the group scales to store, and where the codes are to lie: by the paths of linears;
    outputs: how what is written to the residual stream is compensated over."""

    moments: Mapping[Site, Moments]
    scales: Mapping[str, Tensor]
    grid_dtypes: Mapping[str, torch.dtype]
    homes: Mapping[str, torch.device]
    outputs: OutputOrder | None = None


@dataclass(frozen=True, slots=True)
class _State:
    """What is known when a site's turn comes. rounded: the linears of the sites before it, by path."""

    plan: LayerPlan
    smoothed: Parameters
    rounded: Mapping[str, QuantizedWeight]
    sites: SmoothedSites
    recipe: Recipe

    def scales(self, path: str) -> Tensor:
        """(I,), what the input of linear `path` is divided by."""
        scales = self.sites.scales.get(path)
        return torch.ones_like(self.sites.moments[self.plan.site_of[path]].mean_abs) if scales is None else scales


def round_sites(
    plan: LayerPlan, smoothed: Parameters, sites: SmoothedSites, recipe: Recipe
) -> tuple[dict[str, QuantizedWeight], list[LinearRecord]]:
    """All quantized linears of a layer by path, and their records. The Gram matrices are taken out of the statistics."""
    weights: dict[str, QuantizedWeight] = {}
    records: list[LinearRecord] = []
    for batch in _batches(plan, sites):
        release_host_memory()
        for path, weight, record in _round_batch(batch, _State(plan, smoothed, weights, sites, recipe)):
            weights[path] = weight.to(sites.homes[path])
            records.append(record)
    return weights, records


def _round_batch(batch: Sequence[Site], state: _State) -> Iterator[tuple[str, QuantizedWeight, LinearRecord]]:
    """The linears of sites that are rounded together. Their matrices live no longer than this."""
    for draft, result in _rounded(batch, state):
        first = 0
        sizes = [linear.shape[0] for linear in draft.linears]
        for linear, errors in zip(draft.linears, linear_errors(draft, result, sizes), strict=True):
            rows = slice(first, first + linear.shape[0])
            first = rows.stop
            weight = QuantizedWeight(
                result.codes[rows], result.weight_scale[rows], result.zero_point[rows], draft.scheme
            )
            yield linear.path, weight, linear_record(linear, draft, errors)


def _batches(plan: LayerPlan, sites: SmoothedSites) -> Iterator[list[Site]]:
    """Sites with quantized linears; those of experts of one kind together, up to a bound."""
    batch: list[Site] = []
    for site in (site for site in plan.sites if site.quantized):
        num_outputs = sum(linear.shape[0] for linear in site.linears)
        device = sites.moments[site].mean_abs.device.type  # the weights may lie elsewhere
        full = len(batch) >= num_side_by_side(num_outputs, site.num_inputs, device)
        if batch and (full or not _alike(batch[0], site)):
            yield batch
            batch = []
        batch.append(site)
    if batch:
        yield batch


def _alike(one: Site, other: Site) -> bool:
    """Whether two sites are of experts of one kind, quantized in one way."""
    if one.expert is None or other.expert is None or one.expert.fused != other.expert.fused:
        return False
    return len({linear.scheme for linear in (*one.linears, *other.linears)}) == 1


def _smoothed_site(site: Site, state: _State) -> SmoothedSite:
    """Takes the Gram matrix out of the statistics, to hold only one. None is made of a sketch, unless linears are fitted to it."""
    moments, recipe = state.sites.moments[site], state.recipe
    scales = state.scales(site.path)
    needed = recipe.needs_gram or not moments.is_sketch
    gram, corrected = None, None
    if isinstance(moments, InnerStatistics):
        gram, corrected = _refitted(moments, state)
    elif needed:
        gram = moments.take_smoothed_gram(scales)
    return SmoothedSite(
        moments,
        gram,
        scales,
        num_dead_inputs=int((moments.mean_abs == 0).sum()),
        grid_dtype=state.sites.grid_dtypes[site.quantized[0].path],
        correction=corrected,
        outputs=state.sites.outputs if site.to_residual else None,
    )


def _refitted(statistics: InnerStatistics, state: _State) -> tuple[Tensor, Tensor]:
    """The Gram matrix (I, I) of an inner linear's input as it comes from rounded linears, and what the linear makes up for (O, I)."""
    prefix = f"{statistics.owner.path}."
    before = {name.removeprefix(prefix): state.smoothed[name] for name in state.smoothed if name.startswith(prefix)}
    rounded = [path for path in state.rounded if path.startswith(prefix)]
    after = before | {f"{path.removeprefix(prefix)}.weight": state.rounded[path].dequantize() for path in rounded}
    outer = next(path for path in state.plan.site_of if path.startswith(prefix))
    found = statistics.refitting(before, after, state.scales(outer))
    gram = found.statistics.take_smoothed_gram(torch.ones_like(statistics.mean_abs))  # it is of smoothed inputs
    return gram, refit_correction(gram, found.lost, state.recipe.rounding.dampening_frac)


def _drafts(of: Site, state: _State) -> Iterator[Draft]:
    """Fixes the grid of the linears of one site, stacked by scheme."""
    site = _smoothed_site(of, state)
    for scheme in dict.fromkeys(linear.scheme for linear in of.quantized if linear.scheme):
        stacked = [linear for linear in of.linears if linear.scheme == scheme]
        weights = [state.smoothed[linear.weight].float() for linear in stacked]
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


def _rounded(batch: Sequence[Site], state: _State) -> Iterator[tuple[Draft, QuantizedWeight]]:
    """The linears of a batch of sites on their grids: to nearest one draft at a time, else together."""
    every, rounding = (draft for site in batch for draft in _drafts(site, state)), state.recipe.rounding
    if rounding.method == "nearest":
        for d in every:
            yield d, round_to_nearest(d.target, Grid(d.weight_scale, d.zero_point, d.scheme), d.site.grid_dtype)
        return
    drafts = list(every)
    grams = [draft.site.gram for draft in drafts if draft.site.gram is not None]
    grids = [Grid(d.weight_scale, d.zero_point, d.scheme) for d in drafts]
    results = gptq([d.target for d in drafts], grams, grids, rounding, drafts[0].site.outputs)
    yield from zip(drafts, results, strict=True)
