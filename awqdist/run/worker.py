"""A worker: holds one layer at a time, takes chunks of activations through it, quantizes it, writes it.

The steps of a layer are `read_layer`, `begin`, `forward` for every chunk in order, `search` and `write_layer`. Who calls them, where the
chunks come from and where they go is not its business. The first and the last may run in threads of their own: they move bytes and do
no arithmetic. A worker emits events, never prints, and keeps no journal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.errors import NumericalError
from awqdist.layer.calibrate import Calibration
from awqdist.layer.plan import LayerPlan
from awqdist.layer.quantize import TRIAL_TOKENS, LayerResult, Method, Trial, quantize_layer
from awqdist.layer.residency import Bench, release_host_memory
from awqdist.model.experts import FusedParameter, fuse_experts, made_experts
from awqdist.model.forward import (
    LayerCall,
    forward_layer,
    head_inputs,
    record_calls,
    with_buffers,
    without_embeddings,
)
from awqdist.plan.estimate_layer import estimate_layer
from awqdist.quant.lending import LentTensors
from awqdist.run.device import compute_dtype, peak_memory_bytes
from awqdist.run.events import ChunkForwarded, Emit, MappingSearched, StageStarted
from awqdist.run.job import Job, token_chunks
from awqdist.run.layer_io import LoadedLayer, SearchedLayer, SourceChecksums, check_named, read_outside
from awqdist.run.logit_weighting import output_order
from awqdist.run.stopwatch import Stopwatch


@dataclass(slots=True)
class _Layer:
    """The layer under way. parameters: in the checkpoint's dtype, on the device or lent to it; working: what it is run with, without
    experts that are lent."""

    task: LayerPlan
    watch: Stopwatch
    on: Bench
    parameters: LentTensors
    source: SourceChecksums
    working: dict[str, Tensor]
    calibration: Calibration | None  # None: the layer is only forwarded
    trial: Trial | None = None


class Worker:
    """Does the layers that it is given, on the device of its job."""

    def __init__(self, job: Job, emit: Emit) -> None:
        self._job = job
        self._emit = emit
        self._dtype = compute_dtype(job.device, job.skeleton.dtype)
        self._method = Method(job.recipe, job.format)
        self._token_chunks: list[Tensor] = []
        self._calls: list[list[LayerCall]] = []  # by chunk, then by layer
        self._trial_calls: list[LayerCall] = []  # by layer
        self._final: dict[str, Tensor] = {}  # what the inputs of lm_head are made with
        self._layer: _Layer | None = None

    def embed(self, samples: Tensor) -> Iterator[Tensor]:
        """Takes in the calibration samples (N, L) int64. Gives the inputs of the first layer, chunks of (B, L, H) on the CPU, one after
        the other; to be gone through to its end."""
        outside = read_outside(self._job, self._dtype, self._emit)
        outputs = output_order(self._job, samples, outside, self._emit)
        self._method = Method(self._job.recipe, self._job.format, outputs)
        distinct: list[list[LayerCall]] = []  # calls are equal for chunks of equal shape; they are kept once
        self._token_chunks = token_chunks(self._job.settings, samples)
        beginning = samples[:1, :TRIAL_TOKENS].to(self._job.device)
        self._trial_calls = record_calls(self._job.skeleton, outside, beginning)[1]
        for tokens in self._token_chunks:
            hidden, calls = record_calls(self._job.skeleton, outside, tokens.to(self._job.device))
            known = next((d for d in distinct if all(a.equals(b) for a, b in zip(d, calls, strict=True))), None)
            if known is None:
                distinct.append(calls)
            self._calls.append(known or calls)
            yield hidden.to("cpu", self._job.skeleton.dtype)
        if self._job.plan.head is not None:
            self._final = without_embeddings(self._job.skeleton, outside)

    def begin(self, loaded: LoadedLayer, *, forward_only: bool = False) -> None:
        """Takes up a layer that was read. With `forward_only` no statistics are gathered, and it cannot be searched."""
        release_host_memory()
        task, job = loaded.task, self._job
        self._emit(StageStarted(task.index, "forward"))
        with loaded.watch.piece("forward"):
            check_named(loaded.parameters, task.tensors, task.label)
            on = Bench(job.device, self._dtype, estimate_layer(job, task).residency)
            parameters = _placed(loaded.parameters, task.experts, on)
            working = self._final if task.kind == "head" else self._working(task, parameters, on)
        calibration = None if forward_only else self._calibration(task, on)
        self._layer = _Layer(task, loaded.watch, on, parameters, loaded.source, working, calibration)

    def forward(self, index: int, chunk: Tensor) -> Tensor:
        """Takes chunk number `index`, (B, L, H), through the layer. Returns its output on the CPU, in the checkpoint's dtype."""
        layer, job = self._under_way(), self._job
        before = layer.watch.seconds["forward"] if index else 0.0  # the first chunk answers for `begin` as well
        with layer.watch.piece("forward"):
            hidden = chunk.to(job.device, self._dtype)
            watches = layer.calibration.watches() if layer.calibration else {}
            if layer.task.kind == "head":
                tokens = self._token_chunks[index].to(job.device)
                watches[layer.task.sites[0].path](head_inputs(job.skeleton, layer.working, tokens, hidden))
                output = hidden
            else:
                module, call = job.skeleton.layers[layer.task.index], self._calls[index][layer.task.index]
                if layer.trial is None:
                    first = chunk[:1, :TRIAL_TOKENS].to(job.device)
                    layer.trial = Trial(module, first, self._trial_calls[layer.task.index])
                routed = layer.calibration.expert_watches() if layer.calibration else {}
                call = call.cast(job.device, self._dtype)
                with self._complete(layer) as working:
                    output = forward_layer(module, working, hidden, call, watches, routed)
            output = output.to("cpu", job.skeleton.dtype)
        seconds, num_tokens = layer.watch.seconds["forward"] - before, chunk[..., 0].numel()
        self._emit(ChunkForwarded(layer.task.index, index, len(self._token_chunks), num_tokens, seconds))
        return output

    def search(self) -> SearchedLayer:
        """Quantizes the layer, after all chunks. Raises NumericalError."""
        layer = self._under_way()
        assert layer.calibration is not None, "a layer that was only forwarded has no statistics"
        moments = layer.calibration.moments
        for site, found in moments.items():
            if not found.is_finite():
                raise NumericalError(
                    f"{layer.task.label}: the input of {site.path} is not finite on the calibration text; check the weights, or"
                    " convert the model to a wider dtype; the layers before it are kept"
                )
        if layer.task.experts:
            with self._complete(layer) as working:
                layer.calibration.finish(self._job.skeleton.layers[layer.task.index], working)
        layer.working = {}
        release_host_memory()
        result = quantize_layer(layer.task, layer.parameters, moments, self._method, layer.trial, layer.watch.stage)
        for mapping in result.mappings:
            self._emit(MappingSearched(layer.task.index, mapping))
        with layer.watch.stage("round"):
            tensors = self._packed(layer.task, result)
        self._layer = None
        peak = peak_memory_bytes(self._job.device)
        return SearchedLayer(layer.task, layer.watch, tensors, result, layer.source, peak)

    def leave(self) -> int:
        """Ends a layer that was only forwarded. Returns the checksum of the weights that it was run with."""
        checksum = self._under_way().source.crc32
        self._layer = None
        return checksum

    def _packed(self, task: LayerPlan, result: LayerResult) -> dict[str, Tensor]:
        tensors = {task.tensors[name]: tensor for name, tensor in result.parameters.items()}
        for path, weight in result.weights.items():
            for kind, tensor in self._job.format.pack(weight.to(self._job.device)).items():
                tensors[f"{task.disk_module(path)}.{kind}"] = tensor
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    def _calibration(self, task: LayerPlan, on: Bench) -> Calibration:
        num_tokens = sum(tokens.numel() for tokens in self._token_chunks)
        module = self._job.skeleton.layers[task.index] if task.kind == "decoder" else None
        return Calibration(task, module, self._job.recipe, num_tokens, on)

    def _working(self, task: LayerPlan, parameters: LentTensors, on: Bench) -> dict[str, Tensor]:
        """Parameters in the dtype that they are computed with, experts fused, and buffers; without experts that are lent."""
        skeleton, prefix = self._job.skeleton, f"{self._job.skeleton.prefix}.{task.index}."
        converted = {
            name: parameters[name].to(torch.float32 if prefix + name in skeleton.float32 else self._dtype)
            for name in parameters
            if parameters.lend_of(name) is None
        }
        fused = fuse_experts(() if on.residency.experts else task.experts, converted)
        return with_buffers(skeleton.layers[task.index], fused, self._job.device)

    @contextmanager
    def _complete(self, layer: _Layer) -> Iterator[dict[str, Tensor]]:
        """What the layer is run with. Experts that are lent come to the device when tokens come to them."""
        if not layer.on.residency.experts:
            yield layer.working
            return

        def make(fused: FusedParameter, expert: int) -> Tensor:
            parts = [layer.parameters[f"{path}.weight"] for path in fused.parts[expert]]
            return torch.cat(parts).to(self._dtype)  # (R, I)

        with made_experts(layer.task.experts, make, self._job.device) as stand_ins:
            yield {**layer.working, **stand_ins}

    def _under_way(self) -> _Layer:
        assert self._layer is not None, "begin() comes first"
        return self._layer


def _placed(loaded: Mapping[str, Tensor], experts: Sequence[FusedParameter], on: Bench) -> LentTensors:
    """Tensors of a layer on the device, but for those of experts that are to lie in host memory."""
    of_experts = {f"{path}.weight" for fused in experts for parts in fused.parts for path in parts}
    resting = of_experts if on.residency.experts else set()
    placed = {name: tensor if name in resting else tensor.to(on.device) for name, tensor in loaded.items()}
    return LentTensors(placed, resting, on.lend)
