"""The arithmetic of one layer, counted: floating-point operations of its matrix products, values that pass through elementwise operations,
and operations that are started. From shapes alone; what is counted follows the code of quant/ and run/ step by step.

Letters: T calibration tokens, O out-features, I in-features. Tokens are taken to spread evenly over experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from math import ceil, prod

from awqdist.layer.mlp_refit import num_kept_rows, refitted_sites
from awqdist.layer.plan import LayerPlan, Linear, Site
from awqdist.layer.quantize import TRIAL_TOKENS
from awqdist.plan.estimate_layer import chunk_tokens, compute_bytes, routed_tokens
from awqdist.plan.work_units import STAGES, Stage, Unit, Work, attention_width
from awqdist.quant.gptq import SUB_BLOCK, num_side_by_side, output_block_size
from awqdist.quant.moments import EXPERT_SKETCH_ROWS, SKETCH_ROWS, is_sketched, max_rows
from awqdist.recipe import WeightScheme
from awqdist.run.job import Job

_GRID_PASSES = 10  # rounding_difference: values read or written for each weight
_GRID_OPERATIONS = 30
_COLUMN_PASSES = 18  # GPTQ: the same for each weight, one column at a time
_COLUMN_OPERATIONS = 12
_SCREENED_ROWS = 512  # from which a mapping is screened
_RANKED = (256, 8192), (2048, 16384), (128, 512)  # rows of the search's samples: of one group, of several, of an expert
_DECIDING = (256, 512), (2048, 8192), (64, 256)  # the same where no other rows are looked at
_LEAST_ROWS = 8
_NUM_FINALISTS, _NUM_DECIDED = 3, 7
_JUDGED_ROWS = 64  # of a linear whose input is known by a sketch
_FACTOR_COLUMNS = 3000  # at so many columns factorising and inverting reach half the rate of a product
_LINEAR_OPERATIONS = 300  # around the rounding of a site, and of each of its linears
_SHRINKS = 11  # of a clip
_BLOCK = 256  # columns per block of a Gram matrix, of which those above the diagonal are left out


class LayerWork:
    """The work of one layer under a job's recipe and settings, by stage."""

    def __init__(self, job: Job, task: LayerPlan) -> None:
        self._job, self._task = job, task
        settings = job.settings
        self._tokens = settings.num_samples * settings.sequence_length
        self._chunks = ceil(self._tokens / chunk_tokens(job))
        self._routed = {linear.path for site in task.sites if site.expert for linear in site.linears}
        self._experts = max((site.expert.number for site in task.sites if site.expert), default=-1) + 1
        self.stages: dict[Stage, Work] = {stage: Work() for stage in STAGES}
        self._forward(self.stages["forward"])
        self._statistics(self.stages["statistics"])
        for mapping in task.mappings:
            self._search(self.stages["search"], task.sites_of(mapping))
        if task.mappings:
            self._check(self.stages["check"])
        for unit in self._units(task.sites):
            self._round(self.stages["round"], unit)
        if job.compensates_outputs:
            for unit in self._units(site for site in task.sites if site.to_residual):
                self._compensate(self.stages["round"], unit)
        for site in refitted_sites(task, job.recipe, self._tokens):
            self._refit(self.stages["round"], site)

    def _share(self, linear: Linear) -> float:
        """Share of the tokens that a linear is given."""
        is_routed = linear.path in self._routed
        return routed_tokens(self._job, self._tokens) / self._tokens / self._experts if is_routed else 1.0

    def _linear_values(self) -> float:
        """Weights that a token goes through."""
        return sum(prod(linear.shape) * self._share(linear) for linear in self._task.linears)

    def _forward(self, work: Work) -> None:
        length = self._job.settings.sequence_length
        work.add(product="layer", flops=2 * self._tokens * self._linear_values())
        work.add(
            product="attention", flops=self._tokens * length * attention_width(self._job, self._task)
        )  # causal: half of all pairs
        widths = sum(sum(linear.shape) * self._share(linear) for linear in self._task.linears)
        width = compute_bytes(self._job) / 4
        work.add(values=9 * self._tokens * widths * width)
        weights = sum(prod(linear.shape) for linear in self._task.linears)
        work.add(values=3 * weights * width)  # checked, cast, experts fused
        work.add(operations=self._chunks * (60 + 16 * self._experts))

    def _statistics(self, work: Work) -> None:
        for unit in self._units(self._task.sites, whole_sites=True):
            work.add(values=10 * unit.count * unit.tokens * unit.columns)
            if unit.is_expert:
                continue
            if self._is_sketched(unit):
                work.add(values=3 * unit.tokens * unit.columns, operations=4 * self._chunks)
            elif self._tokens >= unit.columns:
                blocks = self._chunks * ceil(unit.columns / _BLOCK)
                gram = unit.tokens * unit.columns * (unit.columns + _BLOCK)  # on and below the diagonal
                work.add(product="statistics", flops=gram, operations=blocks + 6 * self._chunks)
                work.add(values=2 * self._chunks * unit.columns * (unit.columns + _BLOCK) / 2)

    def _is_sketched(self, unit: Unit) -> bool:
        exact = unit.is_expert or self._job.recipe.needs_gram
        return is_sketched(unit.columns, self._tokens, exact=exact)

    def _units(self, sites: Iterable[Site], *, whole_sites: bool = False) -> Iterator[Unit]:
        """Units of sites; with `whole_sites` also those without a quantized linear. Experts alike are one unit that counts many times."""
        counts: dict[Unit, int] = defaultdict(int)
        for site in sites:
            if site.quantized or whole_sites:
                rows = sum(linear.shape[0] for linear in site.quantized)
                tokens = round(self._tokens * self._share(site.linears[0]))
                is_expert = site.expert is not None
                counts[Unit(rows, site.num_inputs, len(site.quantized), tokens, is_expert)] += 1
        for unit, count in counts.items():
            yield Unit(unit.rows, unit.columns, unit.linears, unit.tokens, unit.is_expert, count)

    def _search(self, work: Work, sites: Iterable[Site]) -> None:
        smoothing = self._job.recipe.smoothing
        assert smoothing is not None
        units = list(self._units(sites))
        num_units = sum(unit.count for unit in units)
        screened = sum(unit.count * unit.rows for unit in units) >= _SCREENED_ROWS
        nearest = self._job.recipe.rounding.method == "nearest"
        decides = screened and nearest and any(unit.is_expert or self._is_sketched(unit) for unit in units)
        of_one, of_groups, of_expert = _DECIDING if decides else _RANKED
        first, second = (max(_LEAST_ROWS, rows // num_units) for rows in of_groups)
        if num_units == 1:
            first, second = of_expert if units[0].is_expert else of_one
        for unit in units:
            weights = unit.count * unit.rows * unit.columns
            work.add(values=7 * weights, operations=12 * unit.count)  # stacked, their means, scaled at the end
            if not decides:
                looks = 2 if screened else smoothing.n_grid
                rough = screened and unit.is_expert
                self._candidates(work, unit, looks * unit.count * unit.rows, looks * unit.count, rough=rough)
            finalists = _NUM_DECIDED if decides else _NUM_FINALISTS
            for tries, rows in ((smoothing.n_grid - 1, first), (finalists, second)) if screened else ():
                tried = tries * unit.count
                self._candidates(work, unit, tried * min(rows, unit.rows), tried, rough=True)
            if unit.is_expert and not decides:
                self._expert_gram(work, unit)

    def _candidates(
        self, work: Work, unit: Unit, rows: float, calls: float, *, rough: bool = False, sketched: bool = True
    ) -> None:
        """Rounds `rows` rows in `calls` pieces and asks what that changes."""
        work.add(values=_GRID_PASSES * rows * unit.columns, operations=_GRID_OPERATIONS * calls)
        self._form(work, unit, rows, calls, rough=rough, sketched=sketched)

    def _form(
        self, work: Work, unit: Unit, rows: float, calls: float, *, rough: bool = False, sketched: bool = False
    ) -> None:
        """d·G·dᵀ of rows d, or the same through the kept rows of the activations, or through a sketch of them."""
        is_sketch = self._is_sketched(unit)
        if not unit.is_expert and not is_sketch and self._tokens < unit.columns:
            work.add(flops=2 * rows * unit.columns * unit.tokens, values=2 * rows * unit.tokens, operations=4 * calls)
        elif rough or is_sketch:
            narrow = is_sketch or (sketched and unit.columns >= 2 * SKETCH_ROWS)
            width = EXPERT_SKETCH_ROWS if unit.is_expert else SKETCH_ROWS if narrow else unit.columns
            work.add(product="rough", flops=2 * rows * unit.columns * width)
            work.add(values=2 * rows * (unit.columns + width), operations=6 * calls)
        else:
            work.add(flops=rows * unit.columns * (unit.columns + _BLOCK))
            work.add(values=4 * rows * unit.columns, operations=8 * calls * ceil(unit.columns / _BLOCK))

    def _expert_gram(self, work: Work, unit: Unit) -> None:
        kept = min(unit.tokens, max_rows(self._experts, unit.columns, compute_bytes(self._job)))
        work.add(product="statistics", flops=2 * unit.count * kept * unit.columns**2)
        work.add(values=unit.count * (5 * unit.columns**2 + 2 * kept * unit.columns), operations=10 * unit.count)

    def _check(self, work: Work) -> None:
        values = sum(prod(linear.shape) for linear in self._task.linears)
        experts = sum(prod(linear.shape) for linear in self._task.linears if linear.path in self._routed)
        length = min(self._job.settings.sequence_length, TRIAL_TOKENS)
        work.add(flops=2 * 2 * length * self._linear_values(), values=2 * (2 * values + 2 * experts))
        work.add(operations=2 * (60 + 6 * self._experts))

    def _round(self, work: Work, unit: Unit) -> None:
        recipe, columns, sampled = self._job.recipe, unit.columns, unit.is_expert or self._is_sketched(unit)
        weights = unit.count * unit.rows * columns
        if recipe.needs_gram or not sampled:
            work.add(values=unit.count * (4 + 2 * unit.linears) * columns**2)
            if unit.is_expert:
                self._expert_gram(work, unit)
            elif self._tokens < columns:
                work.add(flops=2 * unit.tokens * columns**2)
        work.add(values=12 * weights, operations=_LINEAR_OPERATIONS * unit.count * (1 + unit.linears))
        if recipe.clip:
            group = _group_size(next(linear.scheme for linear in self._task.quantized if linear.scheme), columns)
            work.add(flops=_SHRINKS * 2 * group * weights, values=_SHRINKS * 14 * weights, operations=_SHRINKS * 20)
        if recipe.rounding.method == "gptq":
            work.add(flops=weights * columns)
            work.add(product="factor", flops=unit.count * 2 / 3 * columns**3 * (1 + _FACTOR_COLUMNS / columns))
            together = num_side_by_side(unit.rows, columns, self._job.device.type) if unit.is_expert else 1
            side_by_side = min(unit.count, together)
            pieces = ceil(unit.count / side_by_side) * columns
            work.add(values=(_COLUMN_PASSES + SUB_BLOCK / 2) * weights, operations=_COLUMN_OPERATIONS * pieces)
        linears = unit.count * unit.linears
        rows = min(unit.count * unit.rows, _JUDGED_ROWS * linears) if sampled else unit.count * unit.rows
        self._form(work, unit, rows, linears, rough=True)  # the signal; to nearest; what is written
        self._candidates(work, unit, rows, linears, rough=True, sketched=False)
        self._form(work, unit, rows, linears, rough=sampled)

    def _compensate(self, work: Work, unit: Unit) -> None:
        """What two-sided compensation adds: targets that are moved, and the way from the first block of outputs to the last."""
        blocks, block = ceil(unit.rows / output_block_size(unit.rows)), self._job.recipe.rounding.block_size
        work.add(flops=unit.count * unit.rows**2 * unit.columns, values=6 * unit.count * unit.rows * unit.columns)
        steps = unit.count * blocks * ceil(unit.columns / block)
        work.add(operations=_COLUMN_OPERATIONS * (steps + blocks * block))

    def _refit(self, work: Work, site: Site) -> None:
        """Fits an inner linear to what its module's rounded linears give: two passes of rows through the module."""
        rows, columns = site.linears[0].shape
        tokens = num_kept_rows(columns, self._tokens)
        own = [linear for linear in self._task.linears if linear.path.rpartition(".")[0] == site.refit_in]
        weights = sum(prod(linear.shape) for linear in own)
        work.add(product="layer", flops=2 * 2 * tokens * weights, values=2 * 9 * tokens * 3 * columns)
        work.add(product="statistics", flops=tokens * columns * (columns + _BLOCK + 2 * rows))
        work.add(product="factor", flops=columns**3 / 3 * (1 + _FACTOR_COLUMNS / columns))
        work.add(flops=2 * columns**2 * rows)


def _group_size(scheme: WeightScheme, columns: int) -> int:
    return scheme.group_size if scheme.group_size > 0 else columns
