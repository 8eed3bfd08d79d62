"""Reads and writes the tensors of a layer, and times its stages. Moves and hashes bytes only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.checkpoint.index import TensorEntry
from awqdist.checkpoint.reader import Reading, check_finite, read_tensors
from awqdist.checkpoint.writer import write_safetensors
from awqdist.layer.plan import LayerPlan
from awqdist.layer.quantize import LayerResult
from awqdist.layer.records import STAGES, LayerRecord
from awqdist.model.forward import with_buffers
from awqdist.run.events import Emit, LayerFinished, SourceRead, StageEnded, StageStarted
from awqdist.run.job import Job


class Stopwatch:
    """Times the stages of one layer, in seconds, and tells when they begin and end."""

    def __init__(self, layer: int, device: torch.device, emit: Emit) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._layer, self._device, self._emit = layer, device, emit

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a whole stage, and emits its begin and end."""
        self._emit(StageStarted(self._layer, name))
        before = self.seconds[name]
        with self.piece(name):
            yield
        self._emit(StageEnded(self._layer, name, self.seconds[name] - before))

    @contextmanager
    def piece(self, name: str) -> Iterator[None]:
        """Times a piece of a stage, without events."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds[name] += time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class SourceChecksums:
    """Checksums of a layer's bytes in the source: of all of them, and of a few of each tensor."""

    crc32: int
    sample: int


@dataclass(frozen=True, slots=True)
class LoadedLayer:
    """Holds a layer's tensors as they were read, in host memory, by their names in the layer."""

    task: LayerPlan
    watch: Stopwatch
    parameters: dict[str, Tensor]
    source: SourceChecksums


@dataclass(frozen=True, slots=True)
class SearchedLayer:
    """Holds a quantized layer: its tensors in host memory, by on-disk names, and the results for its record."""

    task: LayerPlan
    watch: Stopwatch
    tensors: dict[str, Tensor]
    result: LayerResult
    source: SourceChecksums
    peak_memory_bytes: int


def read_layer(job: Job, task: LayerPlan, emit: Emit, check: Callable[[], None]) -> LoadedLayer:
    """Reads the tensors of a layer. `check` is called before each of them, and may end the reading by raising."""
    watch = Stopwatch(task.index, job.device, emit)
    with watch.stage("read"):
        parameters, reading = read_named(job, task.tensors, check)
    emit(SourceRead(task.index, reading.num_bytes))
    return LoadedLayer(task, watch, parameters, SourceChecksums(reading.crc32, reading.sample_checksum()))


def write_layer(job: Job, searched: SearchedLayer, emit: Emit) -> None:
    """Writes the file of a layer durably, then emits LayerFinished. Raises OutputError."""
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
    """Returns the name of a layer's file in the output folder."""
    return f"model-layer-{layer:05d}.safetensors"


def read_outside(job: Job, dtype: torch.dtype, emit: Emit) -> dict[str, Tensor]:
    """Reads the decoder's parameters and buffers that are in no layer, onto the device, in `dtype`. Raises CheckpointError."""
    names = job.skeleton.outside_names()
    tensors, reading = read_named(job, names, lambda: None)
    emit(SourceRead(None, reading.num_bytes))
    check_named(tensors, names, "the tensors outside the decoder layers")
    parameters = {name: tensor.to(job.device, dtype) for name, tensor in tensors.items()}
    return with_buffers(job.skeleton.decoder, parameters, job.device)


def check_named(tensors: dict[str, Tensor], disk_names: dict[str, str], where: str) -> None:
    """Raises CheckpointError, with the on-disk name, for a tensor that holds NaN or infinity."""
    check_finite({disk_names[name]: tensor for name, tensor in tensors.items()}, where)


def read_named(job: Job, names: dict[str, str], check: Callable[[], None]) -> tuple[dict[str, Tensor], Reading]:
    """Returns tensors in host memory by their names in the layer, and what was read. Reads in the order of the files."""
    entries = sorted((job.index.entries[disk] for disk in names.values()), key=lambda e: (e.file.name, e.start))

    def checked() -> Iterator[TensorEntry]:
        for entry in entries:
            check()
            yield entry

    reading = read_tensors(checked())
    return {name: reading.tensors[disk] for name, disk in names.items()}, reading
