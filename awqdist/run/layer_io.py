"""Reads and writes the tensors of a layer, and times its stages; reads once per worker what is in no layer.

Layers are read and written in the background: that moves and hashes bytes only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from awqdist.checkpoint.index import TensorEntry
from awqdist.checkpoint.reader import Reading, check_finite, read_tensors
from awqdist.checkpoint.writer import write_safetensors
from awqdist.layer.plan import LayerPlan
from awqdist.layer.records import STAGES, LayerRecord
from awqdist.model.forward import with_buffers
from awqdist.model.structure import final_norm
from awqdist.quant.gptq import OutputOrder, logit_weighting
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
class LoadedLayer:
    """Holds a layer's tensors as they were read, in host memory, by their names in the layer.

    crc32, sample: checksums of its bytes in the source, of all of them, and of a few of each tensor.
    """

    task: LayerPlan
    watch: Stopwatch
    parameters: dict[str, Tensor]
    crc32: int
    sample: int


def read_layer(job: Job, task: LayerPlan, emit: Emit, check: Callable[[], None]) -> LoadedLayer:
    """Reads the tensors of a layer. `check` is called before each of them, and may end the reading by raising."""
    watch = Stopwatch(task.index, job.device, emit)
    with watch.stage("read"):
        parameters, reading = _read_named(job, task.tensors, check)
    emit(SourceRead(task.index, reading.num_bytes))
    return LoadedLayer(task, watch, parameters, reading.crc32, reading.sample_checksum())


def write_layer(job: Job, record: LayerRecord, tensors: dict[str, Tensor], watch: Stopwatch, emit: Emit) -> None:
    """Writes the file of a layer durably, then emits LayerFinished. Raises OutputError.

    Args:
        job: what is done.
        record: the layer's record, still without its file.
        tensors: what is written, in host memory, by on-disk names.
        watch: times the writing.
        emit: is told once the file is synced.
    """
    with watch.stage("write"):
        written = write_safetensors(job.settings.output / f"model-layer-{record.layer:05d}.safetensors", tensors)
    name, num_bytes, sha256 = written.name, written.num_bytes, written.sha256
    record = replace(record, file=name, num_bytes=num_bytes, sha256=sha256, seconds=watch.seconds)
    emit(LayerFinished(record.layer, record))


def read_outside(job: Job, dtype: torch.dtype, emit: Emit) -> dict[str, Tensor]:
    """Reads the decoder's parameters and buffers that are in no layer, onto the device, in `dtype`. Raises CheckpointError."""
    names = job.skeleton.outside_names()
    tensors = _read_shared(job, names, "the tensors outside the decoder layers", emit)
    parameters = {name: tensor.to(job.device, dtype) for name, tensor in tensors.items()}
    return with_buffers(job.skeleton.decoder, parameters, job.device)


def output_order(job: Job, samples: Tensor, outside: Mapping[str, Tensor], emit: Emit) -> OutputOrder | None:
    """Returns how GPTQ compensates over outputs that are written to the residual stream, or None where it does not.

    Args:
        job: what is quantized.
        samples: (N, L) int64, the calibration tokens.
        outside: parameters of the decoder that are in no layer, by name.
        emit: is told how much was read.

    Raises:
        CheckpointError: lm_head is missing or damaged.
    """
    if not job.compensates_outputs:
        return None
    names = job.head_names()
    if names:
        head = next(iter(_read_shared(job, names, "lm_head", emit).values())).to(job.device)
    else:
        start = job.skeleton.prefix.rpartition(".")[0]
        tied = job.skeleton.model.all_tied_weights_keys.get(job.skeleton.head_weight, "")
        head = outside.get(tied.removeprefix(f"{start}."), torch.empty(0, 0))
    norm, unit_offset = final_norm(job.skeleton.decoder)
    weight = outside.get(f"{norm}.weight")
    if weight is not None and unit_offset:
        weight = weight.float() + 1
    if head.shape[1] != job.skeleton.model.config.get_text_config(decoder=True).hidden_size:
        return None  # a projection stands between the residual stream and the logits, or there are none
    counts = torch.bincount(samples.flatten(), minlength=head.shape[0]).to(head.device)
    return OutputOrder.from_weighting(logit_weighting(head, counts, weight))


def check_named(tensors: dict[str, Tensor], disk_names: dict[str, str], where: str) -> None:
    """Raises CheckpointError, with the on-disk name, for a tensor that holds NaN or infinity."""
    check_finite({disk_names[name]: tensor for name, tensor in tensors.items()}, where)


def _read_shared(job: Job, names: dict[str, str], where: str, emit: Emit) -> dict[str, Tensor]:
    """Reads what every worker reads. Raises CheckpointError if it is not finite."""
    tensors, reading = _read_named(job, names, lambda: None)
    emit(SourceRead(None, reading.num_bytes))
    check_named(tensors, names, where)
    return tensors


def _read_named(job: Job, names: dict[str, str], check: Callable[[], None]) -> tuple[dict[str, Tensor], Reading]:
    """Returns tensors in host memory by their names in the layer, and what was read. Reads in the order of the files."""
    entries = sorted((job.index.entries[disk] for disk in names.values()), key=lambda e: (e.file.name, e.start))

    def checked() -> Iterator[TensorEntry]:
        for entry in entries:
            check()
            yield entry

    reading = read_tensors(checked())
    return {name: reading.tensors[disk] for name, disk in names.items()}, reading
