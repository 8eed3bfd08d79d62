"""The algorithm, for one decoder layer: search scales, smooth, check, fix the grid, round.

A pure function of (weights, input statistics, method): the same layer gives the same bytes on any worker, in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from awqdist.errors import NumericalError
from awqdist.export.formats import Format
from awqdist.layer.calibrate import SiteStatistics
from awqdist.layer.plan import LayerTask
from awqdist.layer.records import LinearRecord, MappingRecord, SiteRecord
from awqdist.layer.round_sites import SmoothedSites, round_sites
from awqdist.model.experts import FusedParameter
from awqdist.model.forward import LayerCall
from awqdist.model.mapping import TOLERANCE, ResolvedMapping, SmoothedParameters, change_of_output
from awqdist.quant.candidates import ScaleChoice
from awqdist.quant.compensated import CompensatedStatistics
from awqdist.quant.experts import SharedStatistics
from awqdist.quant.gptq import OutputOrder
from awqdist.quant.grid import QuantizedWeight
from awqdist.quant.lending import LentTensors
from awqdist.quant.search import search_groups, search_side_by_side
from awqdist.quant.stacks import BalanceWeight, SearchGroup
from awqdist.quant.stats import Statistics
from awqdist.recipe import Recipe
from awqdist.run.stopwatch import Stopwatch

Parameters = Mapping[str, Tensor]
TRIAL_TOKENS = 64  # that the function check is made with


@dataclass(frozen=True, slots=True)
class Method:
    """How every layer is quantized. layout: the format to be written, which decides the dtype that a grid is fixed in; outputs: how GPTQ
    compensates over what is written to the residual stream, if it is to."""

    recipe: Recipe
    layout: Format
    outputs: OutputOrder | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """What the function check runs: the layer and its fused experts, the beginning of a sequence of its inputs (1, L, H), and its other
    arguments."""

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


def quantize_layer(
    task: LayerTask,
    parameters: Parameters,
    statistics: Mapping[str, SiteStatistics],
    method: Method,
    trial: Trial | None,
    watch: Stopwatch,
) -> LayerResult:
    """Quantizes one layer.

    parameters: the layer's tensors by their names in it, in the checkpoint's dtype, on the device or lent to it; statistics: of every
    input site, by its first linear. Raises NumericalError where smoothing would change the layer's function.
    """
    tensors = parameters if isinstance(parameters, LentTensors) else LentTensors(parameters)
    with watch.stage("search"):
        choices = _search(task, tensors, statistics, method)
        smoothed = SmoothedParameters(tensors)
        scales: dict[str, Tensor] = {}  # by every linear that is balanced
        for mapping in task.mappings:
            applied = smoothed.apply(mapping, choices[mapping.balance[0]].scales)
            scales.update(dict.fromkeys(mapping.balance, applied))
    with watch.stage("check"):
        smoothing_error = _check_function(task, tensors, smoothed, choices, trial)
    with watch.stage("round"):
        grid_dtypes = {p: method.layout.grid_dtype(tensors.resting[f"{p}.weight"].dtype) for p in task.schemes}
        homes = {path: tensors.resting[f"{path}.weight"].device for path in task.schemes}
        sites = SmoothedSites(statistics, scales, grid_dtypes, homes, method.outputs)
        weights, linears = round_sites(task, smoothed, sites, method.recipe)
    return LayerResult(
        weights=weights,
        parameters={
            name: smoothed[name].to(tensor.device, tensor.dtype)
            for name, tensor in tensors.resting.items()
            if name.removesuffix(".weight") not in weights
        },
        mappings=tuple(_mapping_record(task, m, choices[m.balance[0]]) for m in task.mappings),
        linears=tuple(linears),
        sites=tuple(_site_record(task, paths, statistics[paths[0]]) for paths in task.sites),
        smoothing_error=smoothing_error,
    )


def _search(
    task: LayerTask, parameters: LentTensors, statistics: Mapping[str, SiteStatistics], method: Method
) -> dict[str, ScaleChoice]:
    """The choice of every mapping by its first balance layer; those within experts of one kind are made together."""
    smoothing = method.recipe.smoothing
    assert smoothing is not None or not task.mappings
    found: dict[str, ScaleChoice] = {}
    for mappings in _searched_together(task):
        groups = [_groups(task, mapping, parameters, statistics, method) for mapping in mappings]
        first = parameters[f"{mappings[0].balance[0]}.weight"]
        source = mappings[0].source_channels(first.shape[1]).to(first.device)
        dtype = method.layout.grid_dtype(first.dtype)
        assert smoothing is not None
        if len(mappings) > 1:
            choices = search_side_by_side([group for (group,) in groups], source, smoothing, dtype)
        else:
            choices = [search_groups(groups[0], groups[0][0].statistics.mean_abs, source, smoothing, dtype)]
        for mapping, choice in zip(mappings, choices, strict=True):
            if choice.error_after != choice.error_after:
                raise NumericalError(
                    f"layer {task.layer}, mapping {mapping.smooth} -> {', '.join(mapping.balance)}: no candidate gives a finite"
                    " error; check the weights and the calibration text of this layer"
                )
            found[mapping.balance[0]] = choice
    return found


def _searched_together(task: LayerTask) -> list[list[ResolvedMapping]]:
    """Mappings one by one, but those to one inner linear of every expert together."""
    together: dict[str, list[ResolvedMapping]] = {}
    for mapping in task.mappings:
        routed = task.routed.get(mapping.balance[0])
        alike = routed is not None and routed.inner and len(mapping.balance) == 1 and mapping.source is None
        together.setdefault(routed.fused if alike and routed else mapping.balance[0], []).append(mapping)
    return list(together.values())


def _groups(
    task: LayerTask,
    mapping: ResolvedMapping,
    parameters: LentTensors,
    statistics: Mapping[str, SiteStatistics],
    method: Method,
) -> list[SearchGroup]:
    """The balance layers of a mapping by the rows that they read; the first layer's come first."""
    rounding = method.recipe.rounding
    site_of = {path: site[0] for site in task.sites for path in site}
    balance: dict[str, list[BalanceWeight]] = {}
    for path in (path for path in mapping.balance if path in site_of):  # the others are experts that the recipe ignores
        name = f"{path}.weight"
        weight = BalanceWeight(parameters.resting[name], task.schemes.get(path), parameters.lend_of(name))
        balance.setdefault(site_of[path], []).append(weight)
    judged: dict[int, Statistics] = {}  # one for all experts that are given all tokens of their block
    groups = []
    for site, weights in balance.items():
        found = statistics[site]
        own = found.block if isinstance(found, SharedStatistics) else found
        if rounding.method == "gptq":
            groups.append(SearchGroup(weights, judged.setdefault(id(own), CompensatedStatistics(own, rounding))))
        else:
            groups.append(SearchGroup(weights, found))
    return groups


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


def _change_by(
    mapping: ResolvedMapping, parameters: Parameters, choices: Mapping[str, ScaleChoice], trial: Trial
) -> float:
    """The relative change of the layer's output by one mapping alone."""
    smoothed = SmoothedParameters(parameters)
    smoothed.apply(mapping, choices[mapping.balance[0]].scales)
    return change_of_output(trial.layer, parameters, smoothed, trial.hidden, trial.call, trial.experts)


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
