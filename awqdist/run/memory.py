"""Decides what a worker keeps on its device and in host memory, from what its layers are measured to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from awqdist.checkpoint.index import DTYPES
from awqdist.errors import OffloadError
from awqdist.layer.measure import Cost, MeasuredLayer, measure
from awqdist.layer.plan import LayerPlan
from awqdist.layer.quantize import Method
from awqdist.model.forward import LayerCall, record_calls, with_buffers
from awqdist.quant.gptq import OutputOrder
from awqdist.quant.offload import OFFLOAD_LEVELS, LayerDevice, OnHost
from awqdist.run.device import compute_dtype
from awqdist.run.job import Job

_PROCESS_BYTES = 450_000_000  # Python, torch and transformers themselves, resident
_DEEPSPEED_BYTES = 30_000_000  # what DeepNVMe adds to that
_CHUNKS_UNDER_WAY = 4  # of an offloading worker: the one it forwards, the next one, and two that wait to be written
_known: WeakKeyDictionary[object, dict[object, Cost]] = WeakKeyDictionary()  # by model, then by kind of layer


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """What one layer reads, holds and writes, in bytes.

    loaded_bytes: its tensors in memory, more than read_bytes where the source is quantized; device_bytes and host_bytes: the
    most that is held of each while it is worked on (on a CPU device_bytes is all there is); on_host: what lies in host memory
    for want of room on the device.
    """

    layer: int
    read_bytes: int
    loaded_bytes: int
    written_bytes: int
    device_bytes: int
    host_bytes: int
    on_host: OnHost


def layer_memory(job: Job, plan: LayerPlan) -> LayerMemory:
    """Measures one layer, with as much in host memory as --gpu-memory asks for."""
    on_host, cost = _fitting(job, plan)
    read_bytes = sum(job.index.entries[disk].stored_bytes for disk in plan.tensors.values())
    return LayerMemory(
        plan.index, read_bytes, cost.loaded_bytes, cost.written_bytes, cost.device_bytes, cost.host_bytes, on_host
    )


def on_host_of(job: Job, plan: LayerPlan) -> OnHost:
    """Returns what of a layer lies in host memory while it is worked on: nothing, unless --gpu-memory is too small for all."""
    return OnHost() if job.settings.gpu_memory is None else _fitting(job, plan)[0]


def _fitting(job: Job, plan: LayerPlan) -> tuple[OnHost, Cost]:
    budget = job.settings.gpu_memory
    can_offload_experts = bool(plan.experts) and all(fused.is_sliced for fused in plan.experts)
    for on_host in (level for level in OFFLOAD_LEVELS if can_offload_experts or not level.experts):
        cost = layer_cost(job, plan, on_host)
        if budget is None or cost.device_bytes <= budget:
            break
    return on_host, cost


def layer_memories(job: Job) -> tuple[LayerMemory, ...]:
    """Measures all layers.

    Raises:
        OffloadError: --gpu-memory is too small for one of them.
    """
    layers = tuple(layer_memory(job, plan) for plan in job.plan.tasks)
    given = job.settings.gpu_memory
    needed = max(embedding_bytes(job), *(layer.device_bytes for layer in layers))
    if given is not None and given < needed:
        raise OffloadError(
            f"--gpu-memory {given / 1e6:.1f} MB is too little: with all in host memory that can lie there, one layer needs about"
            f" {needed / 1e6:.1f} MB of the device; a smaller --chunk-tokens may take less"
        )
    return layers


def chunk_budget(job: Job, layers: Sequence[LayerMemory] | None = None) -> int | None:
    """Returns the bytes of host memory that a worker has for waiting chunks; None where they are not limited.

    Raises:
        OffloadError: --gpu-memory or --cpu-memory is too small for one layer, or the latter, without a disk to offload to,
            for all chunks.
    """
    given, level = job.settings.cpu_memory, job.settings.offload
    if layers is None and (given is not None or job.settings.gpu_memory is not None):
        layers = layer_memories(job)
    if given is None:
        return None if level == "cpu" else 0
    assert layers is not None
    least = host_bytes(job, layers)
    needed = least + (chunks_in_all(job) if level == "cpu" else 0)
    if given < needed:
        fits = given >= least
        what = "all activations" if fits else "one layer"
        remedy = "use --offload disk, or fewer calibration samples" if fits else "a smaller --chunk-tokens takes less"
        raise OffloadError(
            f"--cpu-memory {given / 1e6:.1f} MB is too little: a worker needs about {needed / 1e6:.1f} MB to hold {what}; {remedy}"
        )
    return given - least


def host_bytes(job: Job, layers: Sequence[LayerMemory]) -> int:
    """Returns the peak of host memory but for waiting chunks: a layer at work, the next one read, the one before being written."""
    held = [0]
    for i, layer in enumerate(layers):
        following = layers[i + 1].loaded_bytes if i + 1 < len(layers) else 0
        before = layers[i - 1].written_bytes if i else 0
        held.append(layer.host_bytes + following + before)
    largest_outside = max((job.index.entries[name].num_bytes for name in job.plan.outside), default=0)
    under_way = 0
    if job.settings.offload != "cpu":
        under_way = min(_CHUNKS_UNDER_WAY * chunk_tokens(job) * token_bytes(job), activation_bytes(job))
    process = _PROCESS_BYTES + (_DEEPSPEED_BYTES if job.settings.offload == "nvme" else 0)
    return process + under_way + max(*held, embedding_peak(job), largest_outside)


def embedding_bytes(job: Job) -> int:
    """Returns the bytes of what every worker reads: what is in no layer of the decoder, and lm_head if it is needed."""
    return sum(job.index.entries[name].num_bytes for name in job.shared_names())


def embedding_peak(job: Job) -> int:
    """Returns the bytes of the embeddings as they are on disk and, if that is another dtype, as they are run."""
    stored, width = embedding_bytes(job), job.skeleton.dtype.itemsize
    compute = compute_dtype(job.device, job.skeleton.dtype).itemsize
    return stored + (stored * compute // width if compute != width else 0)


def chunks_in_all(job: Job) -> int:
    """Returns the bytes of chunks kept at a time: twice all of them where a layer's inputs wait to be stored as a snapshot."""
    has_snapshots = len(job.plan.tasks) > job.settings.snapshot_every
    return activation_bytes(job) * (2 if has_snapshots else 1)


def activation_bytes(job: Job) -> int:
    """Returns the bytes of the hidden states of all calibration tokens."""
    return job.settings.num_samples * job.settings.sequence_length * token_bytes(job)


def chunk_tokens(job: Job) -> int:
    """Returns the tokens of a chunk: whole sequences, at least one."""
    length = job.settings.sequence_length
    return min(max(1, job.settings.chunk_tokens // length), job.settings.num_samples) * length


def token_bytes(job: Job) -> int:
    """Returns the bytes of one token's hidden state, as it is kept between layers."""
    hidden_size: int = job.skeleton.model.config.get_text_config(decoder=True).hidden_size
    return hidden_size * job.skeleton.dtype.itemsize


def layer_cost(job: Job, plan: LayerPlan, on_host: OnHost = OFFLOAD_LEVELS[0]) -> Cost:
    """Measures one layer of a run; layers that are alike once. Nothing is computed, and the device need not be there."""
    dtypes = tuple(job.index.entries[disk].dtype for disk in plan.tensors.values())
    settings = replace(job.settings, gpu_memory=None, cpu_memory=None)
    kind = (plan.linears, plan.sites, plan.mappings, plan.experts, dtypes, on_host, job.device, settings, job.recipe)
    known = _known.setdefault(job.skeleton.model, {})
    if repr(kind) not in known:
        known[repr(kind)] = _measured(job, plan, on_host)
    return known[repr(kind)]


def _measured(job: Job, plan: LayerPlan, on_host: OnHost) -> Cost:
    settings, skeleton = job.settings, job.skeleton
    device = torch.device("cuda", 0) if job.device.type == "cuda" else job.device  # one with a number need not be there
    dtype = compute_dtype(job.device, skeleton.dtype)
    config = skeleton.model.config.get_text_config(decoder=True)

    def make_method() -> Method:
        size = int(config.hidden_size)
        is_weighted = job.compensates_outputs
        outputs = OutputOrder.from_weighting(torch.empty(size, size, device=device)) if is_weighted else None
        return Method(job.recipe, job.format, outputs)

    def record(tokens: Tensor) -> tuple[Tensor, LayerCall]:
        names = skeleton.outside_names().items()
        outside = {name: torch.empty(job.index.entries[disk].shape, dtype=dtype, device=device) for name, disk in names}
        buffers = with_buffers(skeleton.decoder, outside, device)
        hidden, calls = record_calls(skeleton, buffers, tokens.to(device))
        return hidden, calls[min(plan.index, len(calls) - 1)]

    entries = {name: job.index.entries[disk] for name, disk in plan.tensors.items()}
    per_chunk = max(1, settings.chunk_tokens // settings.sequence_length)
    num_chunks = ceil(settings.num_samples / per_chunk)
    sequences = [min(per_chunk, settings.num_samples - per_chunk * chunk) for chunk in range(num_chunks)]
    counts = (getattr(config, name, None) for name in ("num_experts_per_tok", "moe_k", "moe_topk"))
    return measure(
        MeasuredLayer(
            plan=plan,
            module=skeleton.layers[plan.index] if plan.kind == "decoder" else None,
            tensors={name: (tuple(entry.shape), DTYPES[entry.dtype]) for name, entry in entries.items()},
            on=LayerDevice(device, dtype, on_host),
            make_method=make_method,
            record=record,
            sequences=sequences,
            length=settings.sequence_length,
            dtype=skeleton.dtype,
            float32=skeleton.layer_float32(plan.index),
            experts_per_token=next((count for count in counts if isinstance(count, int)), 1),
        )
    )
