"""Rounds the linears of a layer, input site by input site.

Linears of one site under one scheme go through stacked: their rows are independent. Sites of experts go through side by side, as many
as their matrices fit the memory meant for it: hundreds of small problems are one problem of batched products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.quant.absorb import correction
from awqdist.quant.clip import clipped_range
from awqdist.quant.experts import ExpertStatistics
from awqdist.quant.grid import QuantizedWeight, grid_parameters, group_range, round_to_nearest, rounding_difference
from awqdist.quant.rounding import Columns, round_in_order
from awqdist.quant.rounding_experts import num_side_by_side, round_gptq_side_by_side
from awqdist.quant.stats import quadratic_form_rows, rough_form
from awqdist.quant.two_sided import OutputOrder, Problem, round_two_sided
from awqdist.recipe import Recipe, WeightScheme
from awqdist.run.device import release_host_memory
from awqdist.run.gather import SiteStatistics
from awqdist.run.inner import InnerStatistics
from awqdist.run.plan import LayerTask
from awqdist.run.records import LinearRecord

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
class _Site:
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
class _Draft:
    """Stacked linears on a fixed grid, to be rounded. weight: (ΣO, I) float32, smoothed; target: what is to be rounded, the same or
    corrected; weight_scale, zero_point: (ΣO, G)."""

    paths: list[str]
    weight: Tensor
    target: Tensor
    scheme: WeightScheme
    site: _Site
    weight_scale: Tensor
    zero_point: Tensor
    clipped: float


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
    drafts = [draft for paths in batch for draft in _drafts(paths, state)]
    for draft, result in zip(drafts, _rounded(drafts, state.recipe), strict=True):
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


def _site(paths: tuple[str, ...], state: _State) -> _Site:
    """Takes the Gram matrix out of the statistics, to hold only one. An expert's is made only if its linears are fitted to it."""
    statistics, recipe = state.sites.statistics[paths[0]], state.recipe
    scales = state.scales(paths[0])
    fitted = recipe.clip or recipe.rounding.method == "gptq" or not isinstance(statistics, ExpertStatistics)
    gram, corrected = None, None
    if isinstance(statistics, InnerStatistics):
        gram, corrected = _refitted(statistics, state)
    elif fitted:
        gram = statistics.take_smoothed_gram(scales)
    return _Site(
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
    return gram, correction(gram, found.lost, state.recipe.rounding.dampening_frac)


def _drafts(paths: tuple[str, ...], state: _State) -> Iterator[_Draft]:
    """Fixes the grid of the linears of one site, stacked by scheme."""
    site, schemes = _site(paths, state), state.task.schemes
    for scheme in dict.fromkeys(schemes[path] for path in paths if path in schemes):
        stacked = [path for path in paths if schemes.get(path) == scheme]
        weight = torch.cat([state.smoothed[f"{path}.weight"].float() for path in stacked])
        target = weight if site.correction is None else weight + site.correction
        clipped = 0.0
        if state.recipe.clip:
            assert site.gram is not None
            low, high, clipped = clipped_range(target, site.gram, scheme)
            low, high = low.to(site.grid_dtype), high.to(site.grid_dtype)
        else:
            low, high = group_range(target.to(site.grid_dtype), scheme)  # what compressed-tensors' observer would see
        weight_scale, zero_point = grid_parameters(low, high, scheme)
        yield _Draft(stacked, weight, target, scheme, site, weight_scale, zero_point, clipped)


def _rounded(drafts: Sequence[_Draft], recipe: Recipe) -> Iterator[QuantizedWeight]:
    """The drafts of a batch on their grids; all of one shape and scheme where they are of several sites."""
    grams = [draft.site.gram for draft in drafts if draft.site.gram is not None]
    if recipe.rounding.method == "nearest":
        for d in drafts:
            yield round_to_nearest(d.target.to(d.site.grid_dtype), d.weight_scale, d.zero_point, d.scheme)
    elif (outputs := drafts[0].site.outputs) is not None:
        columns = [Columns.of(gram, recipe.rounding) for gram in grams]
        problems = [Problem(d.target, c, (d.weight_scale, d.zero_point)) for d, c in zip(drafts, columns, strict=True)]
        yield from round_two_sided(problems, drafts[0].scheme, outputs)
    elif len({id(d.site) for d in drafts}) == 1:
        shared = Columns.of(grams[0], recipe.rounding)
        for d in drafts:
            yield round_in_order(d.target, shared, (d.weight_scale, d.zero_point), d.scheme)
    else:
        grids = [(d.weight_scale, d.zero_point) for d in drafts]
        weights = [d.target for d in drafts]
        yield from round_gptq_side_by_side(weights, grams, grids, drafts[0].scheme, recipe.rounding)


def _row_errors(draft: _Draft, result: QuantizedWeight) -> Tensor:
    """Of every row its output, its output error if it were not smoothed and rounded to nearest, and that of the result to its target,
    squared and summed over the tokens: (3, ΣO) float64."""
    site, weight = draft.site, draft.weight
    if isinstance(site.statistics, ExpertStatistics):
        difference = result.dequantize().sub_(draft.target).div_(site.scales)
        stacked = torch.cat([weight / site.scales, _nearest(draft), difference])
        return site.statistics.rough_row_errors(stacked).view(3, -1)
    assert site.gram is not None
    signal = rough_form(weight, site.gram), rough_form(_nearest(draft).mul_(site.scales), site.gram)
    return torch.stack([*signal, quadratic_form_rows(result.dequantize().sub_(draft.target), site.gram)])


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
