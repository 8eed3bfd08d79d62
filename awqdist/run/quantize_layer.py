"""The algorithm, for one decoder layer: search scales, smooth, check, fix the grid, round.

A pure function of (weights, input statistics, recipe): the same layer gives the same bytes on any worker, in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from awqdist.errors import NumericalError
from awqdist.model.forward import LayerCall
from awqdist.model.mapping import ResolvedMapping
from awqdist.model.preserve import TOLERANCE, apply_scales, change_of_output
from awqdist.quant.clip import clipped_range
from awqdist.quant.grid import QuantizedWeight, grid_parameters, group_range, round_to_nearest, rounding_difference
from awqdist.quant.rounding import round_gptq
from awqdist.quant.search import BalanceWeight, ScaleChoice, search_scales
from awqdist.quant.stats import InputStatistics, quadratic_form
from awqdist.recipe import Recipe, WeightScheme
from awqdist.run.plan import LayerTask
from awqdist.run.records import LinearRecord, MappingRecord, SiteRecord
from awqdist.run.stopwatch import Stopwatch

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Trial:
    """What the function check runs: the layer, one sequence of its inputs (1, L, H), and its other arguments."""

    layer: nn.Module
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
class _SmoothedInput:
    """An input site after smoothing: its channels divided by `scales` (I,). grid_dtype: of the group scales to store."""

    statistics: InputStatistics
    scales: Tensor
    grid_dtype: torch.dtype

    def gram(self) -> Tensor:
        """(I, I) float32."""
        return self.statistics.gram() / self.scales.unsqueeze(0) / self.scales.unsqueeze(1)


def quantize_layer(
    task: LayerTask,
    parameters: Parameters,
    statistics: Mapping[str, InputStatistics],
    recipe: Recipe,
    trial: Trial | None,
    watch: Stopwatch,
) -> LayerResult:
    """Quantizes one layer.

    parameters: the layer's tensors by their names in it, in the checkpoint's dtype, on the device; statistics: of every input site,
    by its first linear. Raises NumericalError where smoothing would change the layer's function.
    """
    with watch.stage("search"):
        choices = {m.balance[0]: _search(task, m, parameters, statistics[m.balance[0]], recipe) for m in task.mappings}
        smoothed = dict(parameters)
        scales = {}
        for mapping in task.mappings:
            site = mapping.balance[0]
            changed, scales[site] = apply_scales(smoothed, mapping, choices[site].scales)
            smoothed.update(changed)
    with watch.stage("check"):
        smoothing_error = _check_function(task, parameters, smoothed, choices, trial)
    weights: dict[str, QuantizedWeight] = {}
    linears: list[LinearRecord] = []
    with watch.stage("round"):
        for paths in task.sites:
            first = parameters[f"{paths[0]}.weight"]
            site_scales = scales.get(paths[0], torch.ones(first.shape[1], device=first.device))
            site_weights, records = _round_site(
                task, paths, smoothed, _SmoothedInput(statistics[paths[0]], site_scales, first.dtype), recipe
            )
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
    task: LayerTask, mapping: ResolvedMapping, parameters: Parameters, statistics: InputStatistics, recipe: Recipe
) -> ScaleChoice:
    assert recipe.smoothing is not None
    weights = [parameters[f"{path}.weight"] for path in mapping.balance]
    balance = [BalanceWeight(w.float(), task.schemes.get(p)) for w, p in zip(weights, mapping.balance, strict=True)]
    source = mapping.source_channels(weights[0].shape[1]).to(weights[0].device)
    choice = search_scales(balance, statistics, source, recipe.smoothing, weights[0].dtype)
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
    change = change_of_output(trial.layer, parameters, smoothed, trial.hidden, trial.call)
    if not change <= TOLERANCE:
        mappings = "; ".join(f"{m.smooth} -> {', '.join(m.balance)}" for m in task.mappings)
        raise NumericalError(
            f"layer {task.layer}: smoothing changed its output by {change:.2e} (at most {TOLERANCE:.0e} is expected), so one of the"
            f" mappings misses a consumer or does not fit this architecture: {mappings}; nothing of this layer was written"
        )
    return change


def _round_site(
    task: LayerTask, paths: tuple[str, ...], smoothed: Parameters, inputs: _SmoothedInput, recipe: Recipe
) -> tuple[dict[str, QuantizedWeight], list[LinearRecord]]:
    """Rounds the linears of one input site. Those under one scheme go through stacked: their rows are independent."""
    quantized = [path for path in paths if path in task.schemes]
    gram = inputs.gram()
    weights: dict[str, QuantizedWeight] = {}
    records = []
    for scheme in dict.fromkeys(task.schemes[path] for path in quantized):
        stacked = [path for path in quantized if task.schemes[path] == scheme]
        parts = [smoothed[f"{path}.weight"].float() for path in stacked]
        result, clipped = _round(torch.cat(parts), gram, scheme, recipe, inputs.grid_dtype)
        first = 0
        for path, part in zip(stacked, parts, strict=True):
            rows = slice(first, first + part.shape[0])
            first += part.shape[0]
            weights[path] = QuantizedWeight(
                result.codes[rows], result.weight_scale[rows], result.zero_point[rows], scheme
            )
            records.append(_linear_record(task.disk_module(path), part, weights[path], gram, inputs, clipped))
    return weights, records


def _round(
    weight: Tensor, gram: Tensor, scheme: WeightScheme, recipe: Recipe, grid_dtype: torch.dtype
) -> tuple[QuantizedWeight, float]:
    """Fixes the grid, then rounds. weight: (O, I) float32, smoothed. Also returns the share of clipped groups."""
    stored = weight.to(grid_dtype)  # what compressed-tensors' observer would see
    clipped = 0.0
    if recipe.clip:
        low, high, clipped = clipped_range(weight, gram, scheme)
        low, high = low.to(grid_dtype), high.to(grid_dtype)
    else:
        low, high = group_range(stored, scheme)
    weight_scale, zero_point = grid_parameters(low, high, scheme)
    if recipe.rounding.method == "nearest":
        return round_to_nearest(stored, weight_scale, zero_point, scheme), clipped
    return round_gptq(weight, gram, weight_scale, zero_point, scheme, recipe.rounding), clipped


def _linear_record(
    name: str, weight: Tensor, result: QuantizedWeight, gram: Tensor, inputs: _SmoothedInput, clipped: float
) -> LinearRecord:
    signal = max(quadratic_form(weight, gram), 1e-30)
    unsmoothed = weight / inputs.scales
    ones = torch.ones_like(inputs.scales)
    nearest = inputs.statistics.output_error(rounding_difference(unsmoothed, ones, result.scheme, inputs.grid_dtype))
    return LinearRecord(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        num_bits=result.scheme.num_bits,
        group_size=result.scheme.group_size,
        symmetric=result.scheme.symmetric,
        relative_error_nearest=nearest / signal,
        relative_error=quadratic_form(result.dequantize() - weight, gram) / signal,
        clipped_share=clipped,
        num_dead_inputs=int((inputs.statistics.mean_abs == 0).sum()),
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


def _site_record(task: LayerTask, paths: tuple[str, ...], statistics: InputStatistics) -> SiteRecord:
    mean_abs = statistics.mean_abs
    median = float(mean_abs.median())
    return SiteRecord(
        linears=tuple(task.disk_module(path) for path in paths),
        num_tokens=statistics.num_tokens,
        max_over_median=float(mean_abs.max()) / median if median > 0 else float("inf"),
    )
