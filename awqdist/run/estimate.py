"""What a run will read, hold and write, from its plan: arithmetic on shapes, no tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil, prod
from typing import Any

from awqdist.quant.experts import max_rows
from awqdist.recipe import WeightScheme
from awqdist.run.device import compute_dtype
from awqdist.run.job import Job
from awqdist.run.plan import LayerTask
from awqdist.run.round_sites import SIDE_BY_SIDE_BYTES
from awqdist.run.schedule import Schedule

_PROCESS_BYTES = 450_000_000  # Python, torch and transformers themselves, resident


@dataclass(frozen=True, slots=True)
class LayerEstimate:
    """Bytes of one layer. `device_bytes` is the peak while it is worked on; on a CPU that is host memory."""

    layer: int
    read_bytes: int
    written_bytes: int
    device_bytes: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """A whole run on one worker."""

    layers: tuple[LayerEstimate, ...]
    read_bytes: int
    written_bytes: int
    peak_device_bytes: int
    peak_host_bytes: int
    activation_bytes: int  # boundary chunks, in host memory
    embedding_bytes: int  # read by every worker

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class WorkerEstimate:
    """One of several workers. held_bytes: the peak of its layers, host and device together, while it works on one of them, reads the
    next one and writes the one before."""

    worker: int
    layers: tuple[int, ...]
    read_bytes: int
    written_bytes: int
    held_bytes: int


def estimate(job: Job) -> Estimate:
    """The estimate of a prepared job, for one worker."""
    settings = job.settings
    hidden = job.skeleton.model.config.get_text_config(decoder=True).hidden_size
    width = job.skeleton.dtype.itemsize
    num_tokens = settings.num_samples * settings.sequence_length
    activations = num_tokens * hidden * width
    layers = tuple(_layer(job, task, num_tokens) for task in job.plan.tasks)
    outside = [job.index.entries[name] for name in job.plan.outside]
    outside_bytes = sum(entry.num_bytes for entry in outside)
    embedding = sum(job.index.entries[name].num_bytes for name in job.skeleton.outside_names().values())
    compute = compute_dtype(job.device, job.skeleton.dtype).itemsize
    embedding_bytes = embedding + (embedding * compute // width if compute != width else 0)
    largest_outside = max((entry.num_bytes for entry in outside), default=0)
    peak_layer = max(layer.device_bytes for layer in layers)
    on_device = job.device.type == "cuda"
    host_work = max(layer.read_bytes for layer in layers) if on_device else peak_layer
    return Estimate(
        layers=layers,
        read_bytes=sum(layer.read_bytes for layer in layers) + outside_bytes + embedding,
        written_bytes=sum(layer.written_bytes for layer in layers) + outside_bytes,
        peak_device_bytes=max(peak_layer, embedding_bytes) if on_device else 0,
        peak_host_bytes=_PROCESS_BYTES + activations + max(host_work, embedding_bytes, largest_outside),
        activation_bytes=activations,
        embedding_bytes=embedding,
    )


def deal(expected: Estimate, schedule: Schedule) -> tuple[WorkerEstimate, ...]:
    """What each worker does of a run: its layers, and the embeddings. The rest of the source is copied by the leader."""
    by_layer = {layer.layer: layer for layer in expected.layers}

    def worker(number: int) -> WorkerEstimate:
        own = [by_layer[layer] for layer in schedule.layers_of(number)]
        held = [layer.device_bytes for layer in own]
        for i in range(1, len(own)):
            held[i - 1] += own[i].read_bytes
            held[i] += own[i - 1].written_bytes
        return WorkerEstimate(
            worker=number,
            layers=tuple(layer.layer for layer in own),
            read_bytes=sum(layer.read_bytes for layer in own) + (expected.embedding_bytes if own else 0),
            written_bytes=sum(layer.written_bytes for layer in own),
            held_bytes=max(held, default=0),
        )

    return tuple(worker(number) for number in range(schedule.num_workers))


def packed_bytes(shape: tuple[int, int], scheme: WeightScheme, scale_bytes: int) -> int:
    """Bytes of a quantized linear in the pack-quantized format."""
    rows, columns = shape
    groups = columns // scheme.group_size if scheme.group_size > 0 else 1
    zero_points = 0 if scheme.symmetric else 4 * ceil(rows * scheme.num_bits / 32) * groups
    return 4 * rows * ceil(columns * scheme.num_bits / 32) + scale_bytes * rows * groups + zero_points + 16


def _layer(job: Job, task: LayerTask, num_tokens: int) -> LayerEstimate:
    entries = {name: job.index.entries[disk] for name, disk in task.disk_names.items()}
    read = sum(entry.num_bytes for entry in entries.values())
    width = job.skeleton.dtype.itemsize
    quantized = {f"{path}.weight": scheme for path, scheme in task.schemes.items()}
    written = sum(
        packed_bytes(task.shapes[name.removesuffix(".weight")], quantized[name], width)
        if name in quantized
        else e.num_bytes
        for name, e in entries.items()
    )
    compute = compute_dtype(job.device, job.skeleton.dtype)
    copied = entries if compute != job.skeleton.dtype else {f"{path}.weight": 0 for path in _experts(job, task)}
    working = sum(prod(e.shape) for name, e in entries.items() if name in copied) * compute.itemsize
    shared = [task.shapes[site[0]][1] for site in task.sites if site[0] not in task.routed]
    statistics = sum(4 * width_in * min(width_in, num_tokens) for width_in in shared)
    statistics += _expert_rows(job, task, num_tokens) * compute.itemsize
    forward = working + 6 * job.settings.chunk_tokens * max(sum(s) for s in task.shapes.values()) * compute.itemsize
    touched = [path for mapping in task.mappings for path in {mapping.smooth, *mapping.balance} if path in task.shapes]
    smoothed = 4 * sum(prod(task.shapes[path]) for path in touched)
    rounding = max((_rounding_bytes(task, site) for site in task.sites), default=0)
    checked = 8 * sum(prod(task.shapes[path]) for path in _experts(job, task))  # float32, apart and fused
    return LayerEstimate(task.layer, read, written, read + statistics + max(forward, smoothed + max(rounding, checked)))


def _experts(job: Job, task: LayerTask) -> list[str]:
    """Paths of the linears of which the forward pass holds a fused copy."""
    experts = job.skeleton.layer_experts(task.layer) if task.layer < job.skeleton.num_layers else ()
    return [path for fused in experts for part in fused.parts for path in part]


def _expert_rows(job: Job, task: LayerTask, num_tokens: int) -> int:
    """Elements of the rows that are kept of all experts: each token goes to a few of them, and of each no more than a cap are kept."""
    config = job.skeleton.model.config.get_text_config(decoder=True)
    counts = (getattr(config, name, None) for name in ("num_experts_per_tok", "moe_k", "moe_topk"))
    per_token = next((count for count in counts if isinstance(count, int)), 1)
    widths: dict[str, list[int]] = {}
    for first, routed in task.routed.items():
        widths.setdefault(routed.fused, []).append(task.shapes[first][1])
    itemsize = compute_dtype(job.device, job.skeleton.dtype).itemsize
    return sum(
        w[0] * min(num_tokens * per_token, len(w) * min(num_tokens, max_rows(len(w), w[0], itemsize)))
        for w in widths.values()
    )


def _rounding_bytes(task: LayerTask, site: tuple[str, ...]) -> int:
    """GPTQ's peak: the stacked weights, their working copy, steps, zeros and codes; the Gram matrix, its order and its factor."""
    columns = task.shapes[site[0]][1]
    rows = sum(task.shapes[path][0] for path in site if path in task.schemes)
    side_by_side = 1
    if site[0] in task.routed:
        alike = sum(routed.fused == task.routed[site[0]].fused for routed in task.routed.values())
        side_by_side = min(alike, ceil(SIDE_BY_SIDE_BYTES / (8 * columns * columns)))
    return 4 * side_by_side * (6 * rows * columns + 4 * columns * columns)
