"""The algorithm, for one decoder layer: search scales, smooth, check, fix the grid, round.

A pure function of (weights, input statistics, method): the same layer gives the same bytes on any worker, in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from awqdist.errors import NumericalError
from awqdist.export.formats import Format
from awqdist.model.conversion import FusedParameter
from awqdist.model.forward import LayerCall
from awqdist.model.mapping import ResolvedMapping
from awqdist.model.preserve import TOLERANCE, apply_scales, change_of_output
from awqdist.quant.clip import clipped_range
from awqdist.quant.grid import QuantizedWeight, grid_parameters, group_range, round_to_nearest, rounding_difference
from awqdist.quant.rounding import round_gptq
from awqdist.quant.search import BalanceWeight, ScaleChoice, SearchGroup, search_groups
from awqdist.quant.stats import quadratic_form, rough_quadratic_form
from awqdist.recipe import Recipe, WeightScheme
from awqdist.run.device import release_host_memory
from awqdist.run.gather import SiteStatistics
from awqdist.run.plan import LayerTask
from awqdist.run.records import LinearRecord, MappingRecord, SiteRecord
from awqdist.run.stopwatch import Stopwatch

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Method:
    """How every layer is quantized. layout: the format to be written, which decides the dtype that a grid is fixed in."""

    recipe: Recipe
    layout: Format


@dataclass(frozen=True, slots=True)
class Trial:
    """What the function check runs: the layer and its fused experts, one sequence of its inputs (1, L, H), and its other arguments."""

    layer: nn.Module
    experts: tuple[FusedParameter, ...]
    hidden: Tensor
    call: LayerCall


@dataclass(frozen=True, slots=True)
class LayerResult:
    """weights: quantized linears by path; parameters: everything else of the layer, smoothed, in the checkpoint's dtype."""

    weights: dict[str, QuantizedWeight]
    parameters: dict[str, Tensor]
    mappings: tuple[MappingRecord, ...]
    linears: tuple[LinearRecord, ...]
    sites: tuple[SiteRecord, ...]
    smoothing_error: float


@dataclass(frozen=True, slots=True)
class _Site:
    """An input site after smoothing. gram: (I, I) of the input divided by scales (I,); grid_dtype: of the group scales to store."""

    gram: Tensor
    scales: Tensor
    num_dead_inputs: int
    grid_dtype: torch.dtype


def quantize_layer(
    task: LayerTask,
    parameters: Parameters,
    statistics: Mapping[str, SiteStatistics],
    method: Method,
    trial: Trial | None,
    watch: Stopwatch,
) -> LayerResult:
    """Quantizes one layer.

    parameters: the layer's tensors by their names in it, in the checkpoint's dtype, on the device; statistics: of every input site,
    by its first linear. Raises NumericalError where smoothing would change the layer's function.
    """
    with watch.stage("search"):
        choices = {m.balance[0]: _search(task, m, parameters, statistics, method) for m in task.mappings}
        smoothed = dict(parameters)
        scales: dict[str, Tensor] = {}  # by every linear that is balanced
        for mapping in task.mappings:
            changed, applied = apply_scales(smoothed, mapping, choices[mapping.balance[0]].scales)
            smoothed.update(changed)
            scales.update(dict.fromkeys(mapping.balance, applied))
    with watch.stage("check"):
        smoothing_error = _check_function(task, parameters, smoothed, choices, trial)
    weights: dict[str, QuantizedWeight] = {}
    linears: list[LinearRecord] = []
    with watch.stage("round"):
        for paths in task.sites:
            if not any(path in task.schemes for path in paths):
                continue
            release_host_memory()
            grid_dtype = method.layout.grid_dtype(parameters[f"{paths[0]}.weight"].dtype)
            site = _site(statistics[paths[0]], scales.get(paths[0]), grid_dtype)
            site_weights, records = _round_site(task, paths, smoothed, site, method.recipe)
            weights.update(site_weights)
            linears += records
    return LayerResult(
        weights=weights,
        parameters={
            name: smoothed[name].to(tensor.dtype)
            for name, tensor in parameters.items()
            if name.removesuffix(".weight") not in weights
        },
        mappings=tuple(_mapping_record(task, m, choices[m.balance[0]]) for m in task.mappings),
        linears=tuple(linears),
        sites=tuple(_site_record(task, paths, statistics[paths[0]]) for paths in task.sites),
        smoothing_error=smoothing_error,
    )


def _search(
    task: LayerTask,
    mapping: ResolvedMapping,
    parameters: Parameters,
    statistics: Mapping[str, SiteStatistics],
    method: Method,
) -> ScaleChoice:
    smoothing = method.recipe.smoothing
    assert smoothing is not None
    site_of = {path: site[0] for site in task.sites for path in site}
    balance: dict[str, list[BalanceWeight]] = {}
    for path in mapping.balance:
        weight = BalanceWeight(parameters[f"{path}.weight"], task.schemes.get(path))
        balance.setdefault(site_of[path], []).append(weight)
    groups = [SearchGroup(weights, statistics[site]) for site, weights in balance.items()]
    first = parameters[f"{mapping.balance[0]}.weight"]
    source = mapping.source_channels(first.shape[1]).to(first.device)
    mean_abs = statistics[site_of[mapping.balance[0]]].mean_abs
    choice = search_groups(groups, mean_abs, source, smoothing, method.layout.grid_dtype(first.dtype))
    if choice.error_after != choice.error_after:
        raise NumericalError(
            f"layer {task.layer}, mapping {mapping.smooth} -> {', '.join(mapping.balance)}: no candidate gives a finite error;"
            " check the weights and the calibration text of this layer"
        )
    return choice


def _check_function(
    task: LayerTask,
    parameters: Parameters,
    smoothed: Parameters,
    choices: Mapping[str, ScaleChoice],
    trial: Trial | None,
) -> float:
    """The relative change of the layer's output by smoothing alone. Raises NumericalError above the tolerance."""
    if trial is None or all(choice.ratio is None for choice in choices.values()):
        return 0.0
    change = change_of_output(trial.layer, parameters, smoothed, trial.hidden, trial.call, trial.experts)
    if not change <= TOLERANCE:
        guilty = [
            m for m in task.mappings if not _change_by(m, parameters, choices, trial) <= TOLERANCE
        ] or task.mappings
        mappings = "; ".join(f"{m.smooth} -> {', '.join(m.balance)}" for m in guilty)
        raise NumericalError(
            f"layer {task.layer}: smoothing changed its output by {change:.2e} (at most {TOLERANCE:.0e} is expected), so one of the"
            f" mappings misses a consumer or does not fit this architecture: {mappings}; nothing of this layer was written"
        )
    return change


def _site(statistics: SiteStatistics, scales: Tensor | None, grid_dtype: torch.dtype) -> _Site:
    """Takes the Gram matrix out of `statistics`, to hold only one."""
    if scales is None:
        scales = torch.ones_like(statistics.mean_abs)
    num_dead_inputs = int((statistics.mean_abs == 0).sum())
    return _Site(statistics.take_smoothed_gram(scales), scales, num_dead_inputs, grid_dtype)


def _change_by(
    mapping: ResolvedMapping, parameters: Parameters, choices: Mapping[str, ScaleChoice], trial: Trial
) -> float:
    """The relative change of the layer's output by one mapping alone."""
    changed, _ = apply_scales(parameters, mapping, choices[mapping.balance[0]].scales)
    return change_of_output(trial.layer, parameters, {**parameters, **changed}, trial.hidden, trial.call, trial.experts)


def _round_site(
    task: LayerTask, paths: tuple[str, ...], smoothed: Parameters, site: _Site, recipe: Recipe
) -> tuple[dict[str, QuantizedWeight], list[LinearRecord]]:
    """Rounds the linears of one input site. Those under one scheme go through stacked: their rows are independent."""
    quantized = [path for path in paths if path in task.schemes]
    weights: dict[str, QuantizedWeight] = {}
    records = []
    for scheme in dict.fromkeys(task.schemes[path] for path in quantized):
        stacked = [path for path in quantized if task.schemes[path] == scheme]
        parts = [smoothed[f"{path}.weight"].float() for path in stacked]
        result, clipped = _round(torch.cat(parts), scheme, site, recipe)
        first = 0
        for path, part in zip(stacked, parts, strict=True):
            rows = slice(first, first + part.shape[0])
            first += part.shape[0]
            weights[path] = QuantizedWeight(
                result.codes[rows], result.weight_scale[rows], result.zero_point[rows], scheme
            )
            records.append(_linear_record(task.disk_module(path), part, weights[path], site, clipped))
    return weights, records


def _round(weight: Tensor, scheme: WeightScheme, site: _Site, recipe: Recipe) -> tuple[QuantizedWeight, float]:
    """Fixes the grid, then rounds. weight: (O, I) float32, smoothed. Also returns the share of clipped groups."""
    stored = weight.to(site.grid_dtype)  # what compressed-tensors' observer would see
    clipped = 0.0
    if recipe.clip:
        low, high, clipped = clipped_range(weight, site.gram, scheme)
        low, high = low.to(site.grid_dtype), high.to(site.grid_dtype)
    else:
        low, high = group_range(stored, scheme)
    weight_scale, zero_point = grid_parameters(low, high, scheme)
    if recipe.rounding.method == "nearest":
        return round_to_nearest(stored, weight_scale, zero_point, scheme), clipped
    return round_gptq(weight, site.gram, weight_scale, zero_point, scheme, recipe.rounding), clipped


def _linear_record(name: str, weight: Tensor, result: QuantizedWeight, site: _Site, clipped: float) -> LinearRecord:
    signal = max(rough_quadratic_form(weight, site.gram), 1e-30)
    ones = torch.ones_like(site.scales)
    nearest = rounding_difference(weight / site.scales, ones, result.scheme, site.grid_dtype).mul_(site.scales)
    return LinearRecord(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        num_bits=result.scheme.num_bits,
        group_size=result.scheme.group_size,
        symmetric=result.scheme.symmetric,
        relative_error_nearest=rough_quadratic_form(nearest, site.gram) / signal,
        relative_error=quadratic_form(result.dequantize().sub_(weight), site.gram) / signal,
        clipped_share=clipped,
        num_dead_inputs=site.num_dead_inputs,
    )


def _mapping_record(task: LayerTask, mapping: ResolvedMapping, choice: ScaleChoice) -> MappingRecord:
    return MappingRecord(
        smooth_layer=task.disk_module(mapping.smooth),
        balance_layers=tuple(task.disk_module(path) for path in mapping.balance),
        ratio=choice.ratio,
        duo_scaling=choice.duo_scaling,
        error_before=choice.error_before,
        error_after=choice.error_after,
        num_nonfinite_candidates=choice.num_nonfinite,
    )


def _site_record(task: LayerTask, paths: tuple[str, ...], statistics: SiteStatistics) -> SiteRecord:
    mean_abs = statistics.mean_abs
    median = float(mean_abs.median())
    return SiteRecord(
        linears=tuple(task.disk_module(path) for path in paths),
        num_tokens=statistics.num_tokens,
        max_over_median=float(mean_abs.max()) / median if median > 0 else float("inf"),
        expert=task.routed[paths[0]].expert if paths[0] in task.routed else None,
    )
