"""What a worker reads and writes: the tensors of a layer, those outside the layers, and the file of a layer. No arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.checkpoint.index import TensorEntry
from awqdist.checkpoint.reader import Reading, check_finite, read_tensors
from awqdist.checkpoint.writer import write_safetensors
from awqdist.layer.plan import LayerPlan
from awqdist.layer.quantize import LayerResult
from awqdist.layer.records import LayerRecord
from awqdist.model.forward import with_buffers
from awqdist.run.events import Emit, LayerFinished, SourceRead
from awqdist.run.job import Job
from awqdist.run.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True)
class SourceChecksums:
    """Of the bytes on disk that a layer was made from: all of them, and a few of each tensor."""

    crc32: int
    sample: int


@dataclass(frozen=True, slots=True)
class LoadedLayer:
    """A layer's tensors, not yet changed, in host memory, by their names in the layer."""

    task: LayerPlan
    watch: Stopwatch
    parameters: dict[str, Tensor]
    source: SourceChecksums


@dataclass(frozen=True, slots=True)
class SearchedLayer:
    """What is to be written of a layer, in host memory, by on-disk names; and what was found about it."""

    task: LayerPlan
    watch: Stopwatch
    tensors: dict[str, Tensor]
    result: LayerResult
    source: SourceChecksums
    peak_memory_bytes: int


def read_layer(job: Job, task: LayerPlan, emit: Emit, check: Callable[[], None]) -> LoadedLayer:
    """Reads the tensors of a layer. `check` is called before each of them, and ends the reading by raising. Raises CheckpointError."""
    watch = Stopwatch(task.index, job.device, emit)
    with watch.stage("read"):
        parameters, reading = read_named(job, task.tensors, check)
    emit(SourceRead(task.index, reading.num_bytes))
    return LoadedLayer(task, watch, parameters, SourceChecksums(reading.crc32, reading.sample_checksum()))


def write_layer(job: Job, searched: SearchedLayer, emit: Emit) -> None:
    """Writes the file of a layer durably and tells so, which is when the leader may journal it. Raises OutputError."""
    task, result, watch = searched.task, searched.result, searched.watch
    with watch.stage("write"):
        written = write_safetensors(job.settings.output / layer_file(task.index), searched.tensors)
    record = LayerRecord(
        layer=task.index,
        file=written.name,
        num_bytes=written.num_bytes,
        sha256=written.sha256,
        source_crc32=searched.source.crc32,
        smoothing_error=result.smoothing_error,
        mappings=result.mappings,
        linears=result.linears,
        sites=result.sites,
        skipped=task.skipped,
        seconds=watch.seconds,
        peak_memory_bytes=searched.peak_memory_bytes,
        source_sample=searched.source.sample,
    )
    emit(LayerFinished(task.index, record))


def layer_file(layer: int) -> str:
    """Name of the output file of a layer."""
    return f"model-layer-{layer:05d}.safetensors"


def read_outside(job: Job, dtype: torch.dtype, emit: Emit) -> dict[str, Tensor]:
    """Parameters and buffers of the decoder that are in no layer, on the device, in `dtype`. Raises CheckpointError."""
    names = job.skeleton.outside_names()
    tensors, reading = read_named(job, names, lambda: None)
    emit(SourceRead(None, reading.num_bytes))
    check_named(tensors, names, "the tensors outside the decoder layers")
    parameters = {name: tensor.to(job.device, dtype) for name, tensor in tensors.items()}
    return with_buffers(job.skeleton.decoder, parameters, job.device)


def check_named(tensors: dict[str, Tensor], disk_names: dict[str, str], where: str) -> None:
    """Raises CheckpointError naming the tensor as it is called on disk."""
    check_finite({disk_names[name]: tensor for name, tensor in tensors.items()}, where)


def read_named(job: Job, names: dict[str, str], check: Callable[[], None]) -> tuple[dict[str, Tensor], Reading]:
    """Tensors by their names in the layer, in host memory; and what was read, in the order of the files."""
    entries = sorted((job.index.entries[disk] for disk in names.values()), key=lambda e: (e.file.name, e.start))

    def checked() -> Iterator[TensorEntry]:
        for entry in entries:
            check()
            yield entry

    reading = read_tensors(checked())
    return {name: reading.tensors[disk] for name, disk in names.items()}, reading
