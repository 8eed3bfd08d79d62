"""One worker's part of a run: the steps of the schedule, one after the other, with reading and writing in the background.

The worker does not know who launched it. It is given an `Assignment`, a `Transport` to its neighbours and a function for its events,
and is the same in one process, in a Ray actor and in a rank of torchrun. Background threads move and hash bytes only; all arithmetic
is done here, in one thread, so that the bytes do not depend on what happens at the same time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from awqdist.checkpoint.writer import LazyTensor
from awqdist.run.chunks import Chunks, open_chunk_store
from awqdist.run.device import worker_status
from awqdist.run.events import Emit, LayerForwarded, SnapshotSaved, Warned, WorkerStarted
from awqdist.run.job import Job, other_weights
from awqdist.run.layer_io import LoadedLayer, SearchedLayer, read_layer, write_layer
from awqdist.run.log import STATE_FOLDER
from awqdist.run.schedule import Schedule, Step
from awqdist.run.snapshots import load_snapshot, save_snapshot
from awqdist.run.worker import Worker

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


def work(job: Job, samples: Tensor, assignment: Assignment, transport: Transport, emit: Emit) -> None:
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
    with _status_told(job, emit), _Course(job, assignment, transport, emit) as loop:
        loop.prepare(samples)
        for step in assignment.schedule.steps(assignment.worker):
            loop.take(step)


class _Course:
    """Takes the steps of one worker. Leaving it waits for what was begun in the background."""

    def __init__(self, job: Job, assignment: Assignment, transport: Transport, emit: Emit) -> None:
        self._job, self._assignment, self._transport, self._emit = job, assignment, transport, emit
        self._worker = Worker(job, emit)
        self._reader: _Background[LoadedLayer] = _Background()
        self._writer: _Background[None] = _Background()
        self._snapshot: list[LazyTensor] = []  # of the inputs of the layer under way
        self._searched: SearchedLayer | None = None
        num_workers = assignment.schedule.num_workers
        self._chunks = Chunks(open_chunk_store(job, num_workers, lambda message: emit(Warned(message))))

    def __enter__(self) -> _Course:
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
        for index, hidden in enumerate(self._worker.embed(samples)):
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
                self._searched = self._worker.search()
            case "write":
                searched, self._searched = self._searched, None
                assert searched is not None, "a layer is searched before it is written"
                self._writer.start(lambda: write_layer(self._job, searched, self._emit))

    def _forward(self, layer: int, index: int) -> None:
        self._transport.check()
        schedule, is_finished = self._assignment.schedule, layer in self._assignment.finished
        if index == 0:
            self._worker.begin(self._reader.wait(), forward_only=is_finished)
        output = self._worker.forward(index, self._input(layer, index))
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
            if self._worker.leave() != self._assignment.finished[layer]:
                raise other_weights(self._job, layer)
            self._emit(LayerForwarded(layer))

    def _input(self, layer: int, index: int) -> Tensor:
        """Returns the chunk to be forwarded now, and begins to fetch the next one."""
        if self._is_snapshot(layer):
            hidden, kept = self._chunks.take_and_keep(layer, index)
            self._snapshot.append(kept)
        else:
            hidden = self._chunks.take(layer, index)
        self._chunks.expect(layer, index + 1)
        return hidden

    def _is_snapshot(self, layer: int) -> bool:
        return layer > self._assignment.schedule.first and layer % self._job.settings.snapshot_every == 0

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
