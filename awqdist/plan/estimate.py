"""What a run will read, hold and write, from its plan: arithmetic on shapes, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from awqdist.errors import OffloadError
from awqdist.layer.residency import Residency
from awqdist.plan.estimate_layer import LayerEstimate, chunk_tokens, compute_bytes, estimate_layer, token_bytes
from awqdist.run.job import Job
from awqdist.run.schedule import Schedule

_PROCESS_BYTES = 450_000_000  # Python, torch and transformers themselves, resident
_DEEPSPEED_BYTES = 30_000_000  # what DeepNVMe adds to that
_CHUNKS_UNDER_WAY = 4  # of an offloading worker: the one it forwards, the next one, and two that wait to be written


@dataclass(frozen=True, slots=True)
class ChunkEstimate:
    """Where boundary chunks lie, in bytes. moved_bytes: written to the offload folder in the whole run, and read again."""

    memory_bytes: int
    offloaded_bytes: int
    moved_bytes: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """A whole run on one worker."""

    layers: tuple[LayerEstimate, ...]
    read_bytes: int  # of the source
    written_bytes: int  # of the result
    peak_device_bytes: int
    peak_host_bytes: int
    activation_bytes: int  # boundary chunks, wherever they lie
    embedding_bytes: int  # read by every worker; lm_head among them if it is
    chunks: ChunkEstimate
    snapshot_bytes: int  # written in the whole run

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class WorkerEstimate:
    """One of several workers.

    held_bytes: the peak of its layers, host and device together, while it works on one of them, reads the next one and writes the one
    before; host_bytes: the peak of the process, activations included; offloaded_bytes: the most that lies in the offload folder;
    disk_bytes: read and written in the whole run, offloaded activations included; sent_bytes: to the worker behind it.
    """

    worker: int
    layers: tuple[int, ...]
    read_bytes: int
    written_bytes: int
    held_bytes: int
    device_bytes: int
    host_bytes: int
    offloaded_bytes: int
    disk_bytes: int
    sent_bytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Something that a worker holds, and on which level: "gpu", "host", an offload level, or "output folder"."""

    what: str
    level: str
    num_bytes: int


def estimate(job: Job) -> Estimate:
    """The estimate of a prepared job, for one worker. Raises OffloadError if its memory is too small."""
    layers = _layers(job)
    outside_bytes = sum(job.index.entries[name].num_bytes for name in job.plan.outside)
    embedding_read = sum(job.index.entries[name].stored_bytes for name in job.shared_names())
    copied = sum(job.index.entries[name].stored_bytes for name in job.plan.outside)
    activations = _activation_bytes(job)
    num_snapshots = (len(layers) - 1) // job.settings.snapshot_every
    chunks = _chunks(job, layers)
    on_device = job.device.type == "cuda"
    peak_device = max(_embedding_peak(job), *(layer.device_bytes for layer in layers))
    return Estimate(
        layers=layers,
        read_bytes=sum(layer.read_bytes for layer in layers) + copied + embedding_read,
        written_bytes=sum(layer.written_bytes for layer in layers) + outside_bytes,
        peak_device_bytes=peak_device if on_device else 0,
        peak_host_bytes=_host_bytes(job, layers) + chunks.memory_bytes,
        activation_bytes=activations,
        embedding_bytes=embedding_read,
        chunks=chunks,
        snapshot_bytes=num_snapshots * activations,
    )


def chunk_budget(job: Job) -> int | None:
    """Bytes of host memory that a worker has for waiting chunks; None for as many as there are.

    Raises OffloadError if --gpu-memory or --cpu-memory is too small for one layer, or the latter, without a disk to offload to, for all
    chunks.
    """
    return _budget(job, _layers(job))


def _layers(job: Job) -> tuple[LayerEstimate, ...]:
    layers = tuple(estimate_layer(job, task) for task in job.plan.tasks)
    given = job.settings.gpu_memory
    needed = max(_embedding_bytes(job), *(layer.device_bytes for layer in layers))
    if given is not None and given < needed:
        raise OffloadError(
            f"--gpu-memory {given / 1e6:.1f} MB is too little: with all in host memory that can lie there, one layer needs about"
            f" {needed / 1e6:.1f} MB of the device; a smaller --chunk-tokens may take less"
        )
    return layers


def _budget(job: Job, layers: Sequence[LayerEstimate]) -> int | None:
    given, level = job.settings.cpu_memory, job.settings.offload
    if given is None:
        return None if level == "cpu" else 0
    least = _host_bytes(job, layers)
    needed = least + (_chunks_in_all(job) if level == "cpu" else 0)
    if given < needed:
        fits = given >= least
        what = "all activations" if fits else "one layer"
        remedy = "use --offload disk, or fewer calibration samples" if fits else "a smaller --chunk-tokens takes less"
        raise OffloadError(
            f"--cpu-memory {given / 1e6:.1f} MB is too little: a worker needs about {needed / 1e6:.1f} MB to hold {what}; {remedy}"
        )
    return given - least


def _chunks(job: Job, layers: Sequence[LayerEstimate]) -> ChunkEstimate:
    budget, needed = _budget(job, layers), _chunks_in_all(job)
    memory = needed if budget is None else min(budget, needed)
    moved = max(0, _activation_bytes(job) - memory) * len(layers)
    return ChunkEstimate(memory, needed - memory, moved)


def _chunks_in_all(job: Job) -> int:
    """Bytes of the chunks that are kept at a time: twice all of them where a layer's inputs wait to be stored as a snapshot."""
    has_snapshots = len(job.plan.tasks) > job.settings.snapshot_every
    return _activation_bytes(job) * (2 if has_snapshots else 1)


def _host_bytes(job: Job, layers: Sequence[LayerEstimate]) -> int:
    """The peak of host memory but for waiting chunks: a layer at work, the next one read, the one before being written."""
    on_device = job.device.type == "cuda"
    held = [0]
    for i, layer in enumerate(layers):
        following = layers[i + 1].loaded_bytes if i + 1 < len(layers) else 0
        before = layers[i - 1].written_bytes if i else 0
        held.append(
            (layer.loaded_bytes if on_device else layer.device_bytes) + layer.resting_bytes + following + before
        )
    largest_outside = max((job.index.entries[name].num_bytes for name in job.plan.outside), default=0)
    under_way = 0
    if job.settings.offload != "cpu":
        under_way = min(_CHUNKS_UNDER_WAY * chunk_tokens(job) * token_bytes(job), _activation_bytes(job))
    process = _PROCESS_BYTES + (_DEEPSPEED_BYTES if job.settings.offload == "nvme" else 0)
    return process + under_way + max(*held, _embedding_peak(job), largest_outside)


def _embedding_bytes(job: Job) -> int:
    return sum(job.index.entries[name].num_bytes for name in job.shared_names())


def _embedding_peak(job: Job) -> int:
    """The embeddings as they are on disk and, if that is another, in the dtype that they are run in."""
    stored, width, compute = _embedding_bytes(job), job.skeleton.dtype.itemsize, compute_bytes(job)
    return stored + (stored * compute // width if compute != width else 0)


def _activation_bytes(job: Job) -> int:
    return job.settings.num_samples * job.settings.sequence_length * token_bytes(job)


def deal(job: Job, expected: Estimate, schedule: Schedule) -> tuple[WorkerEstimate, ...]:
    """What each worker does of a run: its layers, and the embeddings. The rest of the source is copied by the leader."""
    by_layer = {layer.layer: layer for layer in expected.layers}
    on_device = job.device.type == "cuda"

    def worker(number: int) -> WorkerEstimate:
        own = [by_layer[layer] for layer in schedule.layers_of(number)]
        held = [layer.device_bytes for layer in own]
        for i in range(1, len(own)):
            held[i - 1] += own[i].loaded_bytes
            held[i] += own[i - 1].written_bytes
        moved = expected.chunks.moved_bytes // len(expected.layers) * len(own)
        return WorkerEstimate(
            worker=number,
            layers=tuple(layer.layer for layer in own),
            read_bytes=sum(layer.read_bytes for layer in own) + (expected.embedding_bytes if own else 0),
            written_bytes=sum(layer.written_bytes for layer in own),
            held_bytes=max(held, default=0),
            device_bytes=max((layer.device_bytes for layer in own), default=0) if on_device else 0,
            host_bytes=_host_bytes(job, own) + expected.chunks.memory_bytes,
            offloaded_bytes=expected.chunks.offloaded_bytes if own else 0,
            disk_bytes=sum(layer.read_bytes + layer.written_bytes for layer in own) + 2 * moved,
            sent_bytes=sum(expected.activation_bytes for layer in own if schedule.is_sent(layer.layer)),
        )

    return tuple(worker(number) for number in range(schedule.num_workers))


def placement(job: Job, expected: Estimate) -> tuple[Placement, ...]:
    """Where the things lie that a worker of a run holds: the most that each takes at a time."""
    chunks, layers = expected.chunks, expected.layers
    kept = [
        Placement(
            "layer at work and its statistics",
            "gpu" if job.device.type == "cuda" else "host",
            _most(layers, "device_bytes"),
        ),
        *_resting(layers),
        Placement("next layer, read ahead", "host", _most(layers, "loaded_bytes")),
        Placement("layer before, being written", "host", _most(layers, "written_bytes")),
        Placement("activations", "host", chunks.memory_bytes),
        Placement("activations", job.settings.offload, chunks.offloaded_bytes),
        Placement("snapshots of activations", "output folder", expected.snapshot_bytes),
    ]
    return tuple(place for place in kept if place.num_bytes)


def _resting(layers: Sequence[LayerEstimate]) -> list[Placement]:
    """What of the layer at work lies in host memory, since the device has no room for it."""
    moved = [layer for layer in layers if layer.residency != Residency()]
    if not moved:
        return []
    most = max(moved, key=lambda layer: layer.resting_bytes)
    return [Placement(f"of the layer at work: {most.residency}", "host", most.resting_bytes)]


def _most(layers: Sequence[LayerEstimate], name: str) -> int:
    return max(int(getattr(layer, name)) for layer in layers)
