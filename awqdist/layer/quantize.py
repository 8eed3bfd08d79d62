"""Quantizes one layer, tensors to tensors: search -> smooth -> check -> grid -> round.

A pure function of (weights, moments of the inputs, method): the same layer gives the same bytes on any worker, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn

from awqdist.errors import NumericalError
from awqdist.export.formats import Format
from awqdist.layer.plan import LayerPlan, Site
from awqdist.layer.records import LinearRecord, MappingRecord, SiteRecord
from awqdist.layer.rounding import SmoothedLayer, round_layer
from awqdist.model.forward import LayerCall
from awqdist.model.mapping import TOLERANCE, ResolvedMapping, SmoothedParameters, change_of_output
from awqdist.quant.candidates import ScaleChoice
from awqdist.quant.gptq import OutputOrder
from awqdist.quant.grid import QuantizedWeight
from awqdist.quant.moments import Moments
from awqdist.quant.offload import OffloadedTensors
from awqdist.quant.search import BalanceWeight, Problem, SearchGroup, choose_scales
from awqdist.recipe import Recipe

Parameters = Mapping[str, Tensor]
Tell = Callable[[str], AbstractContextManager[None]]  # is entered around the stages "search", "check" and "round"
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
    """What the function check runs: the layer, the beginning of a sequence of its inputs (1, L, H), and its other arguments."""

    layer: nn.Module
    hidden: Tensor
    call: LayerCall


@dataclass(frozen=True, slots=True)
class LayerResult:
    """A quantized layer. weights: quantized linears by path; parameters: everything else, smoothed, in the checkpoint's dtype."""

    weights: dict[str, QuantizedWeight]
    parameters: dict[str, Tensor]
    mappings: tuple[MappingRecord, ...]
    linears: tuple[LinearRecord, ...]
    sites: tuple[SiteRecord, ...]
    smoothing_error: float


def quantize_layer(
    plan: LayerPlan,
    weights: Parameters,
    moments: Mapping[Site, Moments],
    method: Method,
    check: Trial | None,
    tell: Tell,
) -> LayerResult:
    """Quantizes one layer.

    Args:
        plan: What is done to the layer.
        weights: Its tensors by their names in the layer, in the checkpoint's dtype, on the device, or copied to it when asked for.
        moments: Of every site's input; they are used up.
        method: How every layer is quantized.
        check: What the function check runs; None for lm_head, which nothing is smoothed in.
        tell: Is entered around every stage, such as `Stopwatch.stage`.

    Returns:
        The quantized linears, the other tensors, and the records for the report.

    Raises:
        NumericalError: Smoothing would change the layer's function, or no candidate of a search gives a finite error.
    """
    tensors = weights if isinstance(weights, OffloadedTensors) else OffloadedTensors(weights)
    with tell("search"):
        choices = _search(plan, tensors, moments, method)
        smoothed = SmoothedParameters(tensors)
        scales: dict[str, Tensor] = {}  # by every linear that is balanced
        for mapping in plan.mappings:
            applied = smoothed.apply(mapping, choices[mapping].scales)
            scales.update(dict.fromkeys(mapping.balance, applied))
    with tell("check"):
        smoothing_error = _check_function(plan, tensors, smoothed, choices, check)
    with tell("round"):
        grid_dtypes = {q.path: method.layout.grid_dtype(tensors.kept[q.weight].dtype) for q in plan.quantized}
        code_devices = {q.path: tensors.kept[q.weight].device for q in plan.quantized}
        layer = SmoothedLayer(smoothed, moments, scales, grid_dtypes, code_devices)
        quantized, linears = round_layer(plan, layer, method.recipe, method.outputs)
    return LayerResult(
        weights=quantized,
        parameters={
            name: smoothed[name].to(tensor.device, tensor.dtype)
            for name, tensor in tensors.kept.items()
            if name.removesuffix(".weight") not in quantized
        },
        mappings=tuple(_mapping_record(plan, mapping, choices[mapping]) for mapping in plan.mappings),
        linears=tuple(linears),
        sites=tuple(_site_record(site, moments[site]) for site in plan.sites),
        smoothing_error=smoothing_error,
    )


def _search(
    plan: LayerPlan, parameters: OffloadedTensors, moments: Mapping[Site, Moments], method: Method
) -> dict[ResolvedMapping, ScaleChoice]:
    """The choice of every mapping; those within experts of one kind are made together."""
    found: dict[ResolvedMapping, ScaleChoice] = {}
    for mappings in _searched_together(plan):
        problems = [_problem(plan, mapping, parameters, moments, method) for mapping in mappings]
        assert method.recipe.smoothing is not None
        for mapping, choice in zip(mappings, choose_scales(problems, method.recipe.smoothing), strict=True):
            if choice.error_after != choice.error_after:
                raise NumericalError(
                    f"{plan.label}, mapping {mapping.smooth} -> {', '.join(mapping.balance)}: no candidate gives a finite"
                    " error; check the weights and the calibration text of this layer"
                )
            found[mapping] = choice
    return found


def _searched_together(plan: LayerPlan) -> list[list[ResolvedMapping]]:
    """Mappings one by one, but those to one inner linear of every expert together."""
    together: dict[str, list[ResolvedMapping]] = {}
    for mapping in plan.mappings:
        site = plan.site_of.get(mapping.balance[0])
        expert = site.expert if site else None
        alike = expert and expert.is_inner and len(mapping.balance) == 1 and mapping.source is None
        together.setdefault(expert.fused if alike and expert else mapping.balance[0], []).append(mapping)
    return list(together.values())


def _problem(
    plan: LayerPlan,
    mapping: ResolvedMapping,
    parameters: OffloadedTensors,
    moments: Mapping[Site, Moments],
    method: Method,
) -> Problem:
    """The balance layers of a mapping by the rows that they read; the first layer's come first."""
    groups = []
    for site in plan.sites_of(mapping):
        balance = [
            BalanceWeight(parameters.kept[linear.weight], linear.scheme, parameters.to_device(linear.weight))
            for linear in site.linears
        ]
        groups.append(SearchGroup(balance, moments[site], method.recipe.rounding))
    first = parameters.kept[f"{mapping.balance[0]}.weight"]
    mean_abs, num_inputs = groups[0].moments.mean_abs, first.shape[1]
    return Problem(
        groups=groups,
        mean_abs=mean_abs,
        source=mapping.source_channels(num_inputs).to(mean_abs.device),
        num_sources=mapping.num_channels(num_inputs),
        grid_dtype=method.layout.grid_dtype(first.dtype),
    )


def _check_function(
    plan: LayerPlan,
    parameters: Parameters,
    smoothed: Parameters,
    choices: Mapping[ResolvedMapping, ScaleChoice],
    check: Trial | None,
) -> float:
    """The relative change of the layer's output by smoothing alone. Raises NumericalError above the tolerance."""
    if check is None or all(choice.ratio is None for choice in choices.values()):
        return 0.0

    def change_by(changed: Parameters) -> float:
        return change_of_output(check.layer, parameters, changed, check.hidden, check.call, plan.experts)

    change = change_by(smoothed)
    if change <= TOLERANCE:
        return change
    guilty = []
    for mapping, choice in choices.items():
        alone = SmoothedParameters(parameters)
        alone.apply(mapping, choice.scales)
        if not change_by(alone) <= TOLERANCE:
            guilty.append(mapping)
    mappings = "; ".join(f"{m.smooth} -> {', '.join(m.balance)}" for m in guilty or plan.mappings)
    raise NumericalError(
        f"{plan.label}: smoothing changed its output by {change:.2e} (at most {TOLERANCE:.0e} is expected), so one of the"
        f" mappings misses a consumer or does not fit this architecture: {mappings}; nothing of this layer was written"
    )


def _mapping_record(plan: LayerPlan, mapping: ResolvedMapping, choice: ScaleChoice) -> MappingRecord:
    return MappingRecord(
        smooth_layer=plan.disk_module(mapping.smooth),
        balance_layers=tuple(plan.disk_module(path) for path in mapping.balance),
        ratio=choice.ratio,
        duo_scaling=choice.duo_scaling,
        error_before=choice.error_before,
        error_after=choice.error_after,
        num_nonfinite_candidates=choice.num_nonfinite,
    )


def _site_record(site: Site, moments: Moments) -> SiteRecord:
    mean_abs = moments.mean_abs
    median = float(mean_abs.median())
    return SiteRecord(
        linears=tuple(linear.disk_name for linear in site.linears),
        num_tokens=moments.num_tokens,
        max_over_median=float(mean_abs.max()) / median if median > 0 else float("inf"),
        expert=site.expert.number if site.expert else None,
    )
