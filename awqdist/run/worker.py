"""One worker: takes the steps of the schedule one after the other, with reading and writing in the background.

A worker does not know who launched it. `run_worker` is given an `Assignment`, a `Transport` to the neighbours and a function for
events. It is the same in one process, in a Ray actor and in a rank of torchrun. `WorkerLoop` moves chunks and begins what runs in
the background; `LayerSteps` does the arithmetic of a layer. Background threads move and hash bytes only. All arithmetic is done in
one thread, so that the bytes do not depend on what happens at the same time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import gethostname
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from awqdist.checkpoint.writer import LazyTensor
from awqdist.layer.calibrate import Calibration
from awqdist.layer.quantize import TRIAL_TOKENS, Method, Trial
from awqdist.layer.records import LayerRecord
from awqdist.layer.work import LayerWork
from awqdist.model.forward import (
    LayerCall,
    head_inputs,
    record_calls,
    without_embeddings,
)
from awqdist.quant.offload import LayerDevice, release_host_memory
from awqdist.run.chunks import Chunks, load_snapshot, open_chunk_store, save_snapshot, store_budget
from awqdist.run.device import compute_dtype, peak_memory_bytes, worker_status
from awqdist.run.events import (
    STATE_FOLDER,
    ChunkForwarded,
    Emit,
    LayerForwarded,
    MappingSearched,
    SnapshotSaved,
    StageStarted,
    Warned,
    WorkerStarted,
)
from awqdist.run.job import Job, other_weights, token_chunks
from awqdist.run.layer_io import (
    LoadedLayer,
    Stopwatch,
    check_named,
    output_order,
    read_layer,
    read_outside,
    write_layer,
)
from awqdist.run.memory import on_host_of
from awqdist.run.schedule import Schedule, Step

_STATUS_EVERY_S = 2.0
T = TypeVar("T")


class RingBroken(Exception):
    """No chunk will come any more: another worker is gone, or the run is to stop."""


class Transport(Protocol):
    """Carries chunks to and from the neighbours in the ring."""

    def send(self, layer: int, chunk: int, hidden: Tensor) -> None:
        """Sends an input of `layer`, (B, L, H) on the CPU, to its worker, without waiting for its arrival."""

    def receive(self, layer: int, chunk: int) -> Tensor:
        """Waits for an input of `layer`. Raises RingBroken if it will not come."""

    def check(self) -> None:
        """Raises RingBroken if the ring is broken."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """Tells one worker what to do.

    Attributes:
        worker: its number.
        schedule: the same for all workers.
        finished: checksums of the weights that finished layers were made from, by layer.
        snapshot: holds the inputs of the schedule's first layer; None: these are the embeddings.
    """

    worker: int
    schedule: Schedule
    finished: dict[int, int]
    snapshot: SnapshotSaved | None


def run_worker(job: Job, samples: Tensor, assignment: Assignment, transport: Transport, emit: Emit) -> None:
    """Takes all steps of one worker. A layer whose search has begun is finished and written even if the ring breaks.

    Args:
        job: what is to be done; equal for all workers but for the device.
        samples: the calibration tokens, (N, L) int64, the same for all workers.
        assignment: this worker's part.
        transport: carries chunks to and from the neighbours.
        emit: is given every event, from any thread.

    Raises:
        RingBroken: a neighbour is gone, or the run is to stop.
        AwqdistError: the source, the output or the arithmetic failed.
    """
    layers = assignment.schedule.layers_of(assignment.worker)
    emit(WorkerStarted(gethostname(), str(job.device), tuple(layers), os.getpid()))
    if not layers:
        return
    with _status_told(job, emit), WorkerLoop(job, assignment, transport, emit) as loop:
        loop.prepare(samples)
        for step in assignment.schedule.steps(assignment.worker):
            loop.take(step)


class WorkerLoop:
    """Takes the steps of one worker. Leaving it waits for what was begun in the background."""

    def __init__(self, job: Job, assignment: Assignment, transport: Transport, emit: Emit) -> None:
        self._job, self._assignment, self._transport, self._emit = job, assignment, transport, emit
        self._steps = LayerSteps(job, emit)
        self._reader: _Background[LoadedLayer] = _Background()
        self._writer: _Background[None] = _Background()
        self._snapshot: list[LazyTensor] = []  # of the inputs of the layer under way
        self._write: Callable[[], None] | None = None  # writes the layer that was searched
        budget_bytes = store_budget(job, assignment.schedule.num_workers)
        self._chunks = Chunks(open_chunk_store(job, budget_bytes, lambda message: emit(Warned(message))))

    def __enter__(self) -> WorkerLoop:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._reader.close()
        try:
            self._writer.close(raising=error is None)
        finally:
            self._chunks.close()

    def prepare(self, samples: Tensor) -> None:
        """Embeds the samples, and stores the inputs of the first layer if that is this worker's."""
        schedule, snapshot = self._assignment.schedule, self._assignment.snapshot
        is_first = schedule.owner(schedule.first) == self._assignment.worker
        for index, hidden in enumerate(self._steps.embed(samples)):
            if is_first and snapshot is None:
                self._chunks.put(schedule.first, index, hidden)
        if is_first and snapshot is not None:
            for index, hidden in enumerate(load_snapshot(self._state_folder, snapshot)):
                self._chunks.put(schedule.first, index, hidden)

    def take(self, step: Step) -> None:
        """Takes one step; reading and writing are only begun."""
        self._writer.check()
        match step.kind:
            case "load":
                task = self._job.plan.tasks[step.layer]
                self._reader.start(lambda: read_layer(self._job, task, self._emit, self._reader.check_open))
            case "receive":
                self._chunks.put_passing(step.layer, step.chunk, self._transport.receive(step.layer, step.chunk))
            case "forward":
                self._forward(step.layer, step.chunk)
            case "send":
                self._transport.send(step.layer + 1, step.chunk, self._chunks.take(step.layer + 1, step.chunk))
            case "search":
                self._write = self._steps.search()
            case "write":
                write, self._write = self._write, None
                assert write is not None, "a layer is searched before it is written"
                self._writer.start(write)

    def _forward(self, layer: int, index: int) -> None:
        self._transport.check()
        schedule, is_finished = self._assignment.schedule, layer in self._assignment.finished
        if index == 0:
            self._steps.begin(self._reader.wait(), forward_only=is_finished)
        output = self._steps.forward(index, self._input(layer, index))
        if schedule.is_sent(layer):
            self._chunks.put_passing(layer + 1, index, output)
        elif layer + 1 < schedule.stop:
            self._chunks.put(layer + 1, index, output)
        if index + 1 < schedule.num_chunks:
            return
        self._chunks.expect(layer + 1, 0)
        if self._snapshot:
            chunks, self._snapshot = self._snapshot, []
            self._writer.start(lambda: self._emit(save_snapshot(self._state_folder, layer, chunks)))
        if is_finished:
            if self._steps.leave() != self._assignment.finished[layer]:
                raise other_weights(self._job, layer)
            self._emit(LayerForwarded(layer))

    def _input(self, layer: int, index: int) -> Tensor:
        """Returns the chunk to be forwarded now, and begins to fetch the next one."""
        if layer > self._assignment.schedule.first and layer % self._job.settings.snapshot_every == 0:  # a snapshot
            hidden, kept = self._chunks.take_and_keep(layer, index)
            self._snapshot.append(kept)
        else:
            hidden = self._chunks.take(layer, index)
        self._chunks.expect(layer, index + 1)
        return hidden

    @property
    def _state_folder(self) -> Path:
        return self._job.settings.output / STATE_FOLDER


class _Background(Generic[T]):
    """Does one task at a time in a thread of its own. An error is raised by the next call."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[T] | None = None
        self._closed = False

    def start(self, job: Callable[[], T]) -> None:
        """Waits for the task before, and begins another."""
        if self._pending is not None:
            self.wait()
        self._pending = self._pool.submit(job)

    def wait(self) -> T:
        """Waits for the task and returns its result."""
        assert self._pending is not None, "nothing was begun"
        pending, self._pending = self._pending, None
        return pending.result()

    def check(self) -> None:
        """Raises the error of the task, if it has failed by now."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def check_open(self) -> None:
        """Raises RingBroken if nobody waits for the result any more; long tasks call it now and then."""
        if self._closed:
            raise RingBroken

    def close(self, *, raising: bool = False) -> None:
        """Waits for the end of the task, and with `raising` raises its error."""
        self._closed = True
        self._pool.shutdown(wait=True)
        if raising and self._pending is not None:
            self.wait()


@contextmanager
def _status_told(job: Job, emit: Emit) -> Iterator[None]:
    """Emits a WorkerStatus every few seconds."""
    over = threading.Event()

    def tell() -> None:
        emit(worker_status(job.device))
        while not over.wait(_STATUS_EVERY_S):
            emit(worker_status(job.device))

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@dataclass(slots=True)
class _Layer:
    """The current layer. crc32, sample: of `LoadedLayer`; check: what the function check runs."""

    watch: Stopwatch
    crc32: int
    sample: int
    work: LayerWork
    check: Trial | None = None


class LayerSteps:
    """Forwards and quantizes one layer after the other, on the device of its job."""

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
        """Yields the inputs of the first layer, chunks of (B, L, H) on the CPU. Must be exhausted before the first layer begins.

        Args:
            samples: the calibration tokens, (N, L) int64.
        """
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
        """Puts a layer that was read onto the device. With `forward_only` no statistics are gathered, and it cannot be searched."""
        release_host_memory()
        task, job = loaded.task, self._job
        self._emit(StageStarted(task.index, "forward"))
        with loaded.watch.piece("forward"):
            check_named(loaded.parameters, task.tensors, task.label)
            on = LayerDevice(job.device, self._dtype, on_host_of(job, task))
            module = job.skeleton.layers[task.index] if task.kind == "decoder" else None
            num_tokens = sum(tokens.numel() for tokens in self._token_chunks)
            calibration = None if forward_only else Calibration(task, module, job.recipe, num_tokens, on)
            float32 = job.skeleton.layer_float32(task.index)
            work = LayerWork(task, module, loaded.parameters, on, calibration, float32)
        self._layer = _Layer(loaded.watch, loaded.crc32, loaded.sample, work)

    def forward(self, index: int, chunk: Tensor) -> Tensor:
        """Runs the layer on chunk number `index`, (B, L, H). Returns its output on the CPU, in the checkpoint's dtype."""
        layer, job = self._under_way(), self._job
        before = layer.watch.seconds["forward"] if index else 0.0  # the first chunk answers for `begin` as well
        with layer.watch.piece("forward"):
            number = layer.work.plan.index
            if layer.work.plan.kind == "head":
                tokens, hidden = self._token_chunks[index].to(job.device), chunk.to(job.device, self._dtype)
                layer.work.observe(head_inputs(job.skeleton, self._final, tokens, hidden))
                output = chunk
            else:
                if layer.check is None:
                    first = chunk[:1, :TRIAL_TOKENS].to(job.device)
                    layer.check = Trial(job.skeleton.layers[number], first, self._trial_calls[number])
                output = layer.work.forward(chunk, self._calls[index][number])
        seconds, num_tokens = layer.watch.seconds["forward"] - before, chunk[..., 0].numel()
        self._emit(ChunkForwarded(number, index, len(self._token_chunks), num_tokens, seconds))
        return output

    def search(self) -> Callable[[], None]:
        """Quantizes the layer after all chunks, and returns the function that writes it.

        Raises:
            NumericalError: an input is not finite.
        """
        layer = self._under_way()
        plan = layer.work.plan
        result = layer.work.quantize(self._method, layer.check, layer.watch.stage)
        for mapping in result.mappings:
            self._emit(MappingSearched(plan.index, mapping))
        with layer.watch.stage("round"):
            tensors = layer.work.packed(result, self._method)
        self._layer = None
        record = LayerRecord(
            layer=plan.index,
            file="",  # `write_layer` fills in the file and the seconds
            num_bytes=0,
            sha256="",
            source_crc32=layer.crc32,
            smoothing_error=result.smoothing_error,
            mappings=result.mappings,
            linears=result.linears,
            sites=result.sites,
            skipped=plan.skipped,
            seconds={},
            peak_memory_bytes=peak_memory_bytes(self._job.device),
            source_sample=layer.sample,
        )
        return partial(write_layer, self._job, record, tensors, layer.watch, self._emit)

    def leave(self) -> int:
        """Drops a layer that was only forwarded, and returns the checksum of its weights."""
        checksum = self._under_way().crc32
        self._layer = None
        return checksum

    def _under_way(self) -> _Layer:
        assert self._layer is not None, "begin() comes first"
        return self._layer
