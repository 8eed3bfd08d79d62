"""Fixes the grids of a layer's linears and rounds them, input site by input site.

Linears of one site under one scheme are stacked, since their rows are independent. Sites of experts are rounded side
by side, as many as their matrices fit the memory meant for it. Each linear's record tells its output error, relative
to its output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.layer.mlp_refit import RefitMoments
from awqdist.layer.plan import LayerPlan, Linear, Site
from awqdist.layer.records import LinearRecord
from awqdist.quant.factor import refit_correction
from awqdist.quant.gptq import OutputOrder, gptq, num_side_by_side
from awqdist.quant.grid import (
    Grid,
    QuantizedWeight,
    clipped_range,
    group_range,
    grouped,
    make_grid,
    round_to_nearest,
    rounding_difference,
)
from awqdist.quant.moments import Moments, quadratic_form, rough_quadratic_form
from awqdist.quant.offload import release_host_memory
from awqdist.quant.precision import read_value, read_values
from awqdist.quant.search import sampled_rows
from awqdist.recipe import Recipe

_RECORDED_ROWS = 64  # of a linear whose input is known by a sketch, to estimate the errors in its record


@dataclass(frozen=True, slots=True)
class SmoothedLayer:
    """A layer after smoothing.

    parameters: by name; moments: by site; by the paths of linears: scales, (I,), what their inputs are divided by (none for 1),
    grid_dtypes, of the group scales to store, and code_devices, the devices that the codes are moved to.
    """

    parameters: Mapping[str, Tensor]
    moments: Mapping[Site, Moments]
    scales: Mapping[str, Tensor]
    grid_dtypes: Mapping[str, torch.dtype]
    code_devices: Mapping[str, torch.device]


@dataclass(frozen=True, slots=True)
class GridProblem:
    """Stacked linears of one site on a fixed grid, ready to be rounded.

    gram: (I, I) float32 of the smoothed input, if it is needed; scales: (I,), what the input is divided by; weight: (ΣO, I) float32,
    smoothed; target: what is rounded, the weight itself or corrected by the refit; outputs: what the errors of outputs are weighted by.
    """

    linears: tuple[Linear, ...]
    moments: Moments
    gram: Tensor | None
    scales: Tensor
    weight: Tensor
    target: Tensor
    grid: Grid
    clipped_share: float
    outputs: OutputOrder | None


def round_layer(
    plan: LayerPlan, layer: SmoothedLayer, recipe: Recipe, outputs: OutputOrder | None
) -> tuple[dict[str, QuantizedWeight], list[LinearRecord]]:
    """Rounds all linears of a layer that have a scheme. Gram matrices are taken out of the moments, to hold few at a time.

    Args:
        plan: the layer's sites and linears.
        layer: its smoothed weights, and the moments of its inputs.
        recipe: clipping and rounding.
        outputs: how linears that write to the residual stream are compensated over their outputs, if they are.

    Returns:
        The quantized linears by path, and their records in the same order.

    Raises:
        NumericalError: a Gram matrix is not positive definite even with dampening 1.
    """
    rounder = _Rounder(plan, layer, recipe, outputs)
    for batch in _batches(plan, layer):
        release_host_memory()
        rounder.round(batch)
    return rounder.weights, rounder.records


def _batches(plan: LayerPlan, layer: SmoothedLayer) -> Iterator[list[Site]]:
    """Yields the sites with quantized linears, those of experts of one kind together up to a bound."""
    batch: list[Site] = []
    for site in (site for site in plan.sites if site.quantized):
        num_outputs = sum(linear.shape[0] for linear in site.linears)
        device = layer.moments[site].mean_abs.device.type  # the weights may be in host memory
        full = len(batch) >= num_side_by_side(num_outputs, site.num_inputs, device)
        if batch and (full or not _are_alike(batch[0], site)):
            yield batch
            batch = []
        batch.append(site)
    if batch:
        yield batch


def _are_alike(one: Site, other: Site) -> bool:
    """Returns whether two sites are of experts of one kind, quantized in one way."""
    if one.expert is None or other.expert is None or one.expert.fused != other.expert.fused:
        return False
    return len({linear.scheme for linear in (*one.linears, *other.linears)}) == 1


class _Rounder:
    """Makes and solves the grid problems of a layer's sites, in the order of the plan."""

    def __init__(self, plan: LayerPlan, layer: SmoothedLayer, recipe: Recipe, outputs: OutputOrder | None) -> None:
        self._plan, self._layer, self._recipe, self._outputs = plan, layer, recipe, outputs
        self.weights: dict[str, QuantizedWeight] = {}
        self.records: list[LinearRecord] = []

    def round(self, batch: Sequence[Site]) -> None:
        """Rounds and records the linears of sites that are solved together. Their matrices are given up at the end."""
        for problem, result in self._rounded(batch):
            first = 0
            for linear, errors in zip(problem.linears, _output_errors(problem, result), strict=True):
                rows = slice(first, first + linear.shape[0])
                first = rows.stop
                self.weights[linear.path] = result.rows(rows).to(self._layer.code_devices[linear.path])
                self.records.append(_record(linear, problem, errors))

    def _rounded(self, batch: Sequence[Site]) -> Iterator[tuple[GridProblem, QuantizedWeight]]:
        """Yields the problems of a batch with their solutions: to nearest one at a time, by GPTQ all together."""
        every = (problem for site in batch for problem in self._problems(site))
        if self._recipe.rounding.method == "nearest":
            for p in every:
                yield p, round_to_nearest(p.target, p.grid, self._layer.grid_dtypes[p.linears[0].path])
            return
        problems = list(every)
        grams = [p.gram for p in problems if p.gram is not None]
        targets, grids = [p.target for p in problems], [p.grid for p in problems]
        yield from zip(problems, gptq(targets, grams, grids, self._recipe.rounding, problems[0].outputs), strict=True)

    def _problems(self, site: Site) -> Iterator[GridProblem]:
        """Fixes the grids of one site's linears, stacked by scheme."""
        moments, scales = self._layer.moments[site], self._scales(site.path)
        gram, correction = self._gram(site)
        dtype = self._layer.grid_dtypes[site.quantized[0].path]
        for scheme in dict.fromkeys(linear.scheme for linear in site.quantized if linear.scheme):
            linears = tuple(linear for linear in site.linears if linear.scheme == scheme)
            weights = [self._layer.parameters[linear.weight].float() for linear in linears]
            weight = torch.cat(weights) if len(weights) > 1 else weights[0]
            del weights
            target = weight if correction is None else weight + correction
            if self._recipe.clip:
                assert gram is not None
                low, high, clipped = clipped_range(target, gram, scheme)
            else:
                (low, high), clipped = group_range(target, scheme), 0.0
            # in the dtype of the grid, as compressed-tensors' observer sees them: rounding keeps the order of numbers
            grid = make_grid(low.to(dtype), high.to(dtype), scheme)
            outputs = self._outputs if site.to_residual else None
            yield GridProblem(linears, moments, gram, scales, weight, target, grid, clipped, outputs)

    def _gram(self, site: Site) -> tuple[Tensor | None, Tensor | None]:
        """Returns the Gram matrix (I, I) of a smoothed input, and the refit's correction (O, I) of the linear that reads it, if any.

        No matrix is made of a sketch, unless rounding or clipping needs one.
        """
        moments = self._layer.moments[site]
        if isinstance(moments, RefitMoments):
            return self._refitted(moments)
        if self._recipe.needs_gram or not moments.is_sketch:
            return moments.take_smoothed_gram(self._scales(site.path)), None
        return None, None

    def _refitted(self, moments: RefitMoments) -> tuple[Tensor, Tensor]:
        """Returns the Gram matrix (I, I) of an MLP's intermediate as rounded linears compute it, and down_proj's correction (O, I)."""
        prefix, parameters = f"{moments.module.path}.", self._layer.parameters
        before = {name.removeprefix(prefix): parameters[name] for name in parameters if name.startswith(prefix)}
        rounded = [path for path in self.weights if path.startswith(prefix)]
        after = before | {f"{path.removeprefix(prefix)}.weight": self.weights[path].dequantize() for path in rounded}
        outer = next(path for path in self._plan.site_of if path.startswith(prefix))
        refit = moments.refit(before, after, self._scales(outer))
        gram = refit.moments.take_smoothed_gram(torch.ones_like(moments.mean_abs))  # it is of smoothed inputs
        return gram, refit_correction(gram, refit.lost, self._recipe.rounding.dampening_frac)

    def _scales(self, path: str) -> Tensor:
        """Returns what the input of a linear is divided by, (I,)."""
        scales = self._layer.scales.get(path)
        return torch.ones_like(self._layer.moments[self._plan.site_of[path]].mean_abs) if scales is None else scales


def _output_errors(problem: GridProblem, result: QuantizedWeight) -> Tensor:
    """Returns per linear its output, its output error if rounded to nearest without smoothing, and that of the result to its target.

    They are squared and summed over the tokens: (n, 3) float64. Under compensation over outputs all three are
    weighted, but not those of experts. Where a sketch is all that is known of the input, they are estimated from some
    rows.
    """
    sizes = [linear.shape[0] for linear in problem.linears]
    if problem.gram is None or problem.moments.has_prior:
        sampled = list(_recorded_rows(problem, sizes))
        found = _sketched_errors(problem, result, torch.cat([rows for rows, _ in sampled]))
        each = found.split([rows.shape[0] for rows, _ in sampled], 1)
        return torch.stack([errors @ counts for errors, (_, counts) in zip(each, sampled, strict=True)])
    nearest = _nearest_difference(problem, problem.weight / problem.scales).mul_(problem.scales)
    signal = rough_quadratic_form(_weighted(problem, problem.weight), problem.gram)
    lost_by_nearest = rough_quadratic_form(_weighted(problem, nearest), problem.gram)
    difference = _weighted(problem, result.dequantize().sub_(problem.target))
    found = torch.stack([signal, lost_by_nearest, quadratic_form(difference, problem.gram)])  # (3, ΣO)
    return torch.stack([errors.sum(1) for errors in found.split(sizes, 1)])


def _weighted(problem: GridProblem, difference: Tensor) -> Tensor:
    return problem.outputs.weighted(difference) if problem.outputs else difference


def _recorded_rows(problem: GridProblem, sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the rows of each linear to estimate its errors from, (r,) int64, and how many rows each stands for, (r,) float64."""
    energy = (problem.moments.mean_abs / problem.scales).square()
    carried = grouped(energy, problem.grid.scheme).sum(-1)  # (G,)
    importance = problem.grid.weight_scale.float().square() @ carried  # (ΣO,)
    first = 0
    for size in sizes:
        rows, counts = sampled_rows(importance[first : first + size].unsqueeze(0), _RECORDED_ROWS)
        yield rows[0] + first, counts
        first += size


def _sketched_errors(problem: GridProblem, result: QuantizedWeight, rows: Tensor) -> Tensor:
    """Returns the three errors of `_output_errors` for some rows (r,), as a sketch of the input estimates them: (3, r) float64."""
    difference = result.rows(rows).dequantize().sub_(problem.target[rows]).div_(problem.scales)
    original = problem.weight[rows].div_(problem.scales)
    stacked = torch.cat([original, _nearest_difference(problem, original), difference])
    return problem.moments.form(rough=True).errors(stacked.unsqueeze(0)).view(3, -1)


def _nearest_difference(problem: GridProblem, original: Tensor) -> Tensor:
    """Returns the change (r, I) that rounding to nearest makes to weights that are not smoothed."""
    grid = problem.grid
    return rounding_difference(original, torch.ones_like(problem.scales), grid.scheme, grid.weight_scale.dtype)


def _record(linear: Linear, problem: GridProblem, errors: Tensor) -> LinearRecord:
    signal, nearest, found = read_values(errors, 1.0)
    signal, scheme = max(signal, 1e-30), problem.grid.scheme
    return LinearRecord(
        name=linear.disk_name,
        shape=linear.shape,
        num_bits=scheme.num_bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        relative_error_nearest=nearest / signal,
        relative_error=found / signal,
        clipped_share=problem.clipped_share,
        num_dead_inputs=int(read_value((problem.moments.mean_abs == 0).sum(), 0)),
    )
