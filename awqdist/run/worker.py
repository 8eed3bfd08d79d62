"""A worker: holds one layer at a time, takes chunks of activations through it, quantizes it, writes it.

The steps of a layer are `begin`, `forward` for every chunk in order, and `finish`. Who calls them, where the chunks come from and where
they go is a backend's business. A worker emits events, never prints, and keeps no journal.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from awqdist.checkpoint.reader import check_finite, read_tensors
from awqdist.checkpoint.writer import write_safetensors
from awqdist.errors import NumericalError
from awqdist.model.forward import LayerCall, forward_layer, head_inputs, record_calls, with_buffers
from awqdist.quant.stats import InputStatistics
from awqdist.run.device import compute_dtype, peak_memory_bytes, release_host_memory
from awqdist.run.events import ChunkForwarded, Emit, MappingSearched
from awqdist.run.job import Job
from awqdist.run.plan import LayerTask
from awqdist.run.quantize_layer import LayerResult, Method, Trial, quantize_layer
from awqdist.run.records import LayerRecord
from awqdist.run.stopwatch import Stopwatch


@dataclass(slots=True)
class _Layer:
    """The layer under way. parameters: as on disk, by their names in the layer; working: what it is run with."""

    task: LayerTask
    watch: Stopwatch
    parameters: dict[str, Tensor]
    source_crc32: int
    working: dict[str, Tensor]
    statistics: dict[str, InputStatistics]
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
        self._layer: _Layer | None = None

    def embed(self, samples: Tensor) -> list[Tensor]:
        """Takes in the calibration samples (N, L) int64. Returns the inputs of the first layer, chunks of (B, L, H) on the CPU."""
        outside = self._read_outside()
        chunks = []
        distinct: list[list[LayerCall]] = []  # calls are equal for chunks of equal shape; they are kept once
        self._token_chunks = list(samples.split(max(1, self._job.settings.chunk_tokens // samples.shape[1])))
        for tokens in self._token_chunks:
            hidden, calls = record_calls(self._job.skeleton, outside, tokens.to(self._job.device))
            known = next((d for d in distinct if all(a.equals(b) for a, b in zip(d, calls, strict=True))), None)
            if known is None:
                distinct.append(calls)
            self._calls.append(known or calls)
            chunks.append(hidden.to("cpu", self._job.skeleton.dtype))
        return chunks

    def begin(self, task: LayerTask, *, forward_only: bool = False) -> None:
        """Reads a layer. With `forward_only` no statistics are gathered, and it cannot be finished."""
        release_host_memory()
        watch = Stopwatch(task.layer, self._job.device, self._emit)
        with watch.stage("read"):
            head = task.layer == self._job.skeleton.num_layers
            parameters, checksum = self._read(task.disk_names, "lm_head" if head else f"layer {task.layer}")
            if head:
                working = self._read_outside()
            else:
                converted = {name: tensor.to(self._dtype) for name, tensor in parameters.items()}
                working = with_buffers(self._job.skeleton.layers[task.layer], converted, self._job.device)
        num_tokens = sum(tokens.numel() for tokens in self._token_chunks)
        widths = {} if forward_only else {site[0]: task.shapes[site[0]][1] for site in task.sites}
        statistics = {path: InputStatistics(width, num_tokens, self._job.device) for path, width in widths.items()}
        self._layer = _Layer(task, watch, parameters, checksum, working, statistics)

    def forward(self, index: int, chunk: Tensor) -> Tensor:
        """Takes chunk number `index`, (B, L, H), through the layer. Returns its output on the CPU, in the checkpoint's dtype."""
        layer, job = self._under_way(), self._job
        with layer.watch.stage("forward"):
            hidden = chunk.to(job.device, self._dtype)
            if layer.task.layer == job.skeleton.num_layers:
                tokens = self._token_chunks[index].to(job.device)
                layer.statistics[layer.task.sites[0][0]].add(head_inputs(job.skeleton, layer.working, tokens, hidden))
                output = hidden
            else:
                module, call = job.skeleton.layers[layer.task.layer], self._calls[index][layer.task.layer]
                if layer.trial is None:
                    layer.trial = Trial(module, chunk[:1].to(job.device), call)
                watches = {path: statistics.add for path, statistics in layer.statistics.items()}
                output = forward_layer(module, layer.working, hidden, call.cast(job.device, self._dtype), watches)
            output = output.to("cpu", job.skeleton.dtype)
        self._emit(ChunkForwarded(layer.task.layer, index, len(self._token_chunks), chunk[..., 0].numel()))
        return output

    def finish(self) -> LayerRecord:
        """Quantizes the layer and writes its file, after all chunks; the caller journals it. Raises NumericalError, OutputError."""
        layer = self._under_way()
        layer.working = {}
        release_host_memory()
        for site, statistics in layer.statistics.items():
            if not statistics.is_finite():
                raise NumericalError(
                    f"layer {layer.task.layer}: the input of {site} is not finite on the calibration text; check the weights, or"
                    " convert the model to a wider dtype; the layers before it are kept"
                )
        result = quantize_layer(layer.task, layer.parameters, layer.statistics, self._method, layer.trial, layer.watch)
        with layer.watch.stage("write"):
            record = self._write(layer, result)
        self._layer = None
        for mapping in record.mappings:
            self._emit(MappingSearched(record.layer, mapping))
        return record

    def leave(self) -> int:
        """Ends a layer that was only forwarded. Returns the checksum of the weights that it was run with."""
        checksum = self._under_way().source_crc32
        self._layer = None
        return checksum

    def _write(self, layer: _Layer, result: LayerResult) -> LayerRecord:
        task = layer.task
        tensors = {task.disk_names[name]: tensor for name, tensor in result.parameters.items()}
        for path, weight in result.weights.items():
            for kind, tensor in self._job.format.pack(weight).items():
                tensors[f"{task.disk_module(path)}.{kind}"] = tensor
        written = write_safetensors(self._job.settings.output / layer_file(task.layer), tensors)
        return LayerRecord(
            layer=task.layer,
            file=written.name,
            num_bytes=written.num_bytes,
            sha256=written.sha256,
            source_crc32=layer.source_crc32,
            smoothing_error=result.smoothing_error,
            mappings=result.mappings,
            linears=result.linears,
            sites=result.sites,
            skipped=task.skipped,
            seconds=layer.watch.seconds,
            peak_memory_bytes=peak_memory_bytes(self._job.device),
            source_sample=self._job.source_sample(task.disk_names.values()),
        )

    def _read(self, names: dict[str, str], where: str) -> tuple[dict[str, Tensor], int]:
        """Tensors by their names in the layer, on the device, checked for NaN; and the checksum of their bytes."""
        entries = [self._job.index.entries[disk] for disk in names.values()]
        tensors, checksum = read_tensors(sorted(entries, key=lambda e: (e.file.name, e.start)))
        check_finite(tensors, where)
        return {name: tensors[disk].to(self._job.device) for name, disk in names.items()}, checksum

    def _read_outside(self) -> dict[str, Tensor]:
        """Parameters and buffers of the decoder that are in no layer."""
        tensors, _ = self._read(self._job.skeleton.outside_names(), "the tensors outside the decoder layers")
        parameters = {name: tensor.to(self._dtype) for name, tensor in tensors.items()}
        return with_buffers(self._job.skeleton.decoder, parameters, self._job.device)

    def _under_way(self) -> _Layer:
        assert self._layer is not None, "begin() comes first"
        return self._layer


def layer_file(layer: int) -> str:
    """Name of the output file of a layer."""
    return f"model-layer-{layer:05d}.safetensors"
