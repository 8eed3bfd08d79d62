"""What one layer takes: bytes that are read, held and written while it is worked on. Arithmetic on shapes, no tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil, prod

from awqdist.layer.mlp_refit import num_kept_rows, refitted_sites
from awqdist.layer.plan import LayerPlan, Site
from awqdist.layer.residency import LEVELS, Residency
from awqdist.model.experts import takes_rows_by_expert
from awqdist.quant.gptq import num_side_by_side
from awqdist.quant.moments import EXPERT_SKETCH_ROWS, is_sketched, max_rows, num_held_rows
from awqdist.quant.search import BATCH_BYTES
from awqdist.recipe import WeightScheme
from awqdist.run.device import compute_dtype
from awqdist.run.job import Job

_TILE_COLUMNS = 512  # of a Gram matrix or its factor that are lent at a time
_FORWARD_COPIES = 5  # of a chunk at the widest place of a layer


@dataclass(frozen=True, slots=True)
class LayerEstimate:
    """Bytes of one layer. `device_bytes` is the peak while it is worked on; on a CPU that is host memory. residency: what lies in host
    memory all the same, for want of room on the device; it takes `resting_bytes` there beside the loaded tensors."""

    layer: int
    read_bytes: int
    loaded_bytes: int  # its tensors in memory: more than was read where the source is quantized
    written_bytes: int
    device_bytes: int
    residency: Residency
    resting_bytes: int


def packed_bytes(shape: tuple[int, int], scheme: WeightScheme, scale_bytes: int) -> int:
    """Bytes of a quantized linear in the pack-quantized format."""
    rows, columns = shape
    groups = columns // scheme.group_size if scheme.group_size > 0 else 1
    zero_points = 0 if scheme.symmetric else 4 * ceil(rows * scheme.num_bits / 32) * groups
    return 4 * rows * ceil(columns * scheme.num_bits / 32) + scale_bytes * rows * groups + zero_points + 16


def estimate_layer(job: Job, task: LayerPlan) -> LayerEstimate:
    entries = {name: job.index.entries[disk] for name, disk in task.tensors.items()}
    loaded = sum(entry.num_bytes for entry in entries.values())
    read = sum(entry.stored_bytes for entry in entries.values())
    width = job.skeleton.dtype.itemsize
    packed = {q.weight: packed_bytes(q.shape, q.scheme, width) for q in task.quantized if q.scheme}
    written = sum(packed.get(name, entry.num_bytes) for name, entry in entries.items())
    budget = job.settings.gpu_memory
    for residency in [level for level in LEVELS if not level.experts or _can_be_lent(task)] or LEVELS:
        device, resting = _held_bytes(job, task, residency)
        if budget is None or device <= budget:
            break
    return LayerEstimate(task.index, read, loaded, written, device, residency, resting)


def _held_bytes(job: Job, task: LayerPlan, residency: Residency) -> tuple[int, int]:
    """The peak on the device, and what rests in host memory beside the loaded tensors."""
    entries = {name: job.index.entries[disk] for name, disk in task.tensors.items()}
    experts = {path for fused in task.experts for part in fused.parts for path in part}  # held twice: fused as well
    sizes = {linear.path: prod(linear.shape) for linear in task.linears}
    of_experts = sum(sizes[path] for path in experts)
    largest = max((sizes[path] for path in experts), default=0)
    num_values = sum(prod(e.shape) for e in entries.values())
    num_tokens, compute, width = _num_tokens(job), compute_bytes(job), job.skeleton.dtype.itemsize
    shared = [site.num_inputs for site in task.sites if site.expert is None]
    sketches, matrices = (_kept_bytes(job, shared, num_tokens, sketched=sketched) for sketched in (True, False))
    rows = _expert_statistics(job, task, num_tokens)
    loaded = sum(e.num_bytes for e in entries.values())
    at_hand = 4 * 3 * largest  # an expert's slice, its parts, and these in float32
    working = (num_values if compute != width else of_experts) * compute
    if residency.experts:
        loaded -= of_experts * width
        working = ((num_values - of_experts) * compute if compute != width else 0) + at_hand
    widest = max((sum(linear.shape) for linear in task.linears), default=0)
    per_token = max(_FORWARD_COPIES * widest, _experts_per_token(job, task))
    forward = working + chunk_tokens(job) * per_token * compute
    alike = Counter(site.expert.fused for site in task.sites if site.expert)
    batch = BATCH_BYTES[job.device.type] // 4
    search = max((_search_bytes(site, alike, batch) for site in task.sites), default=0) + _sketches(job, task)
    check = 4 * (num_values - of_experts) + at_hand if task.mappings else 0
    codes = sum(sizes[q.path] for q in task.quantized if not (residency.experts and q.path in experts))
    rounding = codes + max((_rounding_bytes(site, alike, residency, job.device.type) for site in task.sites), default=0)
    rounding = max(rounding, codes + _refitting_bytes(job, task))
    device = loaded + sketches + max(forward, search, check, rounding)
    tiles = max((4 * width_in * min(width_in, _TILE_COLUMNS) for width_in in shared), default=0)
    device += tiles if residency.matrices else matrices
    device += 0 if residency.experts else rows
    device += 4 * hidden_size(job) ** 2 if job.compensates_outputs else 0  # how much outputs count, from lm_head
    resting = (matrices if residency.matrices else 0) + _module_rows_bytes(job, task)
    if residency.experts:
        resting += rows + sum(sizes[q.path] for q in task.quantized if q.path in experts)
    if residency.factors:
        resting += 6 * max(shared, default=0) ** 2  # a factor, and room for inverting it
    return device, resting


def _kept_bytes(job: Job, widths: Iterable[int], num_tokens: int, *, sketched: bool) -> int:
    """Bytes of what is kept of inputs that are, or are not, kept as sketches."""
    exact = job.recipe.needs_gram
    return sum(
        4 * width * num_held_rows(width, num_tokens, exact=exact)
        for width in widths
        if is_sketched(width, num_tokens, exact=exact) == sketched
    )


def _num_tokens(job: Job) -> int:
    return job.settings.num_samples * job.settings.sequence_length


def _expert_statistics(job: Job, task: LayerPlan, num_tokens: int) -> int:
    """Bytes of what is kept of the inputs of experts."""
    return _expert_rows(job, task, num_tokens) * compute_bytes(job) + _sketches(job, task)


def _sketches(job: Job, task: LayerPlan) -> int:
    """Bytes of the sketches of what experts read, which a search holds that decides by them."""
    if job.recipe.smoothing is None or job.recipe.rounding.method == "gptq":
        return 0
    return sum(EXPERT_SKETCH_ROWS * site.num_inputs for site in task.sites if site.expert) * compute_bytes(job)


def _can_be_lent(task: LayerPlan) -> bool:
    """Whether there are experts, all of which can come to the device one at a time."""
    return bool(task.experts) and all(fused.is_sliced for fused in task.experts)


def _experts_per_token(job: Job, task: LayerPlan) -> int:
    """Elements that a token takes in experts that are each given every token (Llama-4)."""
    if task.kind == "head":
        return 0
    layer = job.skeleton.layers[task.index]
    batched = [fused for fused in task.experts if takes_rows_by_expert(layer.get_submodule(fused.module))]
    return sum(sum(task.by_path[path].shape) for fused in batched for part in fused.parts for path in part)


def _expert_rows(job: Job, task: LayerPlan, num_tokens: int) -> int:
    """Elements of the rows that are kept of all experts: each token goes to a few of them, and of each no more than a cap are kept."""
    widths: dict[str, list[int]] = {}
    for site in task.sites:
        if site.expert is not None:
            widths.setdefault(site.expert.fused, []).append(site.num_inputs)
    itemsize = compute_dtype(job.device, job.skeleton.dtype).itemsize
    return sum(
        w[0] * min(routed_tokens(job, num_tokens), len(w) * min(num_tokens, max_rows(len(w), w[0], itemsize)))
        for w in widths.values()
    )


def routed_tokens(job: Job, num_tokens: int) -> int:
    """How many rows `num_tokens` tokens are to the experts of one block together."""
    config = job.skeleton.model.config.get_text_config(decoder=True)
    counts = (getattr(config, name, None) for name in ("num_experts_per_tok", "moe_k", "moe_topk"))
    return num_tokens * next((count for count in counts if isinstance(count, int)), 1)


def _search_bytes(site: Site, alike: Mapping[str, int], batch: int) -> int:
    """The weights stacked, and two matrices of their size: of a site, or of a batch of experts; and a factor of the Gram matrix.
    batch: weights of experts that are searched at a time, or those of one."""
    values = sum(prod(linear.shape) for linear in site.quantized)
    if site.expert is not None:
        values = min(alike[site.expert.fused] * values, max(values, batch))
    return 4 * 3 * values + 4 * 2 * site.num_inputs**2


def _rounding_bytes(site: Site, alike: Mapping[str, int], residency: Residency, device: str) -> int:
    """GPTQ's peak: the weights, by input, and what their record takes; the Gram matrix, its factor, and room for inverting. Of what is
    written to the residual stream the errors are kept, and its targets. alike: sites of each fused parameter."""
    columns = site.num_inputs
    rows = sum(linear.shape[0] for linear in site.quantized)
    errors = 5 * rows * columns if site.to_residual else 0
    if site.expert is not None:  # side by side: stacks, and what they are made of
        side_by_side = min(alike[site.expert.fused], num_side_by_side(rows, columns, device))
        return side_by_side * (errors + 20 * rows * columns + 16 * columns * columns)
    if residency.factors:
        return errors + 17 * rows * columns + 4 * min(columns, _TILE_COLUMNS) * columns
    return errors + max(9 * rows * columns + 10 * columns * columns, 17 * rows * columns + 6 * columns * columns)


def _inner(job: Job, task: LayerPlan) -> list[tuple[int, int]]:
    """Shapes of the inner linears that are fitted again once those before them are rounded."""
    return [site.linears[0].shape for site in refitted_sites(task, job.recipe, _num_tokens(job))]


def _module_rows_bytes(job: Job, task: LayerPlan) -> int:
    """Of the rows that are kept, in host memory, of what the modules of inner linears read."""
    rows = (num_kept_rows(width, _num_tokens(job)) * height for height, width in _inner(job, task))
    return compute_bytes(job) * sum(rows)


def _refitting_bytes(job: Job, task: LayerPlan) -> int:
    """The peak of fitting an inner linear: the module's linears as they were and rounded, a Gram matrix and its factor, what is lost and
    what is made up for."""
    return max((24 * height * width + 8 * width**2 for height, width in _inner(job, task)), default=0)


def chunk_tokens(job: Job) -> int:
    """Tokens of a chunk: whole sequences, at least one."""
    length = job.settings.sequence_length
    return min(max(1, job.settings.chunk_tokens // length), job.settings.num_samples) * length


def compute_bytes(job: Job) -> int:
    return compute_dtype(job.device, job.skeleton.dtype).itemsize


def token_bytes(job: Job) -> int:
    """Of one token's hidden state, as it is kept between layers."""
    return hidden_size(job) * job.skeleton.dtype.itemsize


def hidden_size(job: Job) -> int:
    return int(job.skeleton.model.config.get_text_config(decoder=True).hidden_size)
