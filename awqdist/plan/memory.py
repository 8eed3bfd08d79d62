"""Estimates what a run reads, holds and writes, from its plan and the measured memory of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from awqdist.quant.offload import OnHost
from awqdist.run.job import Job
from awqdist.run.memory import (
    LayerMemory,
    activation_bytes,
    chunk_budget,
    chunks_in_all,
    embedding_peak,
    host_bytes,
    layer_memories,
)
from awqdist.run.schedule import Schedule


@dataclass(frozen=True, slots=True)
class ChunkEstimate:
    """Where boundary chunks lie, in bytes. moved_bytes: written to the offload folder in the whole run, and read again."""

    memory_bytes: int
    offloaded_bytes: int
    moved_bytes: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """A whole run on one worker."""

    layers: tuple[LayerMemory, ...]
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
    layers = layer_memories(job)
    outside_bytes = sum(job.index.entries[name].num_bytes for name in job.plan.outside)
    embedding_read = sum(job.index.entries[name].stored_bytes for name in job.shared_names())
    copied = sum(job.index.entries[name].stored_bytes for name in job.plan.outside)
    activations = activation_bytes(job)
    num_snapshots = (len(layers) - 1) // job.settings.snapshot_every
    chunks = _chunks(job, layers)
    on_device = job.device.type == "cuda"
    peak_device = max(embedding_peak(job), *(layer.device_bytes for layer in layers))
    return Estimate(
        layers=layers,
        read_bytes=sum(layer.read_bytes for layer in layers) + copied + embedding_read,
        written_bytes=sum(layer.written_bytes for layer in layers) + outside_bytes,
        peak_device_bytes=peak_device if on_device else 0,
        peak_host_bytes=host_bytes(job, layers) + chunks.memory_bytes,
        activation_bytes=activations,
        embedding_bytes=embedding_read,
        chunks=chunks,
        snapshot_bytes=num_snapshots * activations,
    )


def _chunks(job: Job, layers: Sequence[LayerMemory]) -> ChunkEstimate:
    budget, needed = chunk_budget(job, layers), chunks_in_all(job)
    memory = needed if budget is None else min(budget, needed)
    moved = max(0, activation_bytes(job) - memory) * len(layers)
    return ChunkEstimate(memory, needed - memory, moved)


def assign(job: Job, expected: Estimate, schedule: Schedule) -> tuple[WorkerEstimate, ...]:
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
            host_bytes=host_bytes(job, own) + expected.chunks.memory_bytes,
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
        *_on_host(layers),
        Placement("next layer, read ahead", "host", _most(layers, "loaded_bytes")),
        Placement("layer before, being written", "host", _most(layers, "written_bytes")),
        Placement("activations", "host", chunks.memory_bytes),
        Placement("activations", job.settings.offload, chunks.offloaded_bytes),
        Placement("snapshots of activations", "output folder", expected.snapshot_bytes),
    ]
    return tuple(place for place in kept if place.num_bytes)


def _on_host(layers: Sequence[LayerMemory]) -> list[Placement]:
    """Returns what of the layer at work lies in host memory, since the device has no room for it."""
    moved = [layer for layer in layers if layer.on_host != OnHost()]
    if not moved:
        return []
    most = max(moved, key=lambda layer: layer.host_bytes)
    return [Placement(f"of the layer at work: {most.on_host}", "host", most.host_bytes)]


def _most(layers: Sequence[LayerMemory], name: str) -> int:
    return max(int(getattr(layer, name)) for layer in layers)
