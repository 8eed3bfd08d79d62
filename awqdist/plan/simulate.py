"""How long a run takes, and where workers wait: the schedule's own steps, carried out on given durations instead of tensors.

Every worker has a lane for computing (forward, search), a reader and a writer in the background, and an edge to the worker behind it.
A load begins at its step, or when the reader is free; the first forward of a layer waits for it. A write waits for the write before it.
Sending never waits; chunks on one edge follow each other. Since all orders are fixed, a worker can be taken as far as its chunks have
come before the next one is looked at, and there is no queue of events.

Not simulated: the embedding before the first layer, snapshots, the merge, uneven layers and chunks, and disks or links that workers share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from statistics import median
from typing import Literal

from awqdist.layer.records import LayerRecord
from awqdist.run.schedule import Schedule, Step

SpanKind = Literal["read", "forward", "search", "write"]
Arrivals = dict[tuple[int, int], float]  # (layer, chunk) -> seconds


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of single steps, equal for all layers and workers."""

    chunk_s: float  # one chunk through one layer
    search_s: float  # all between a layer's last forward and its write: search, check, round
    read_s: float = 0.0
    write_s: float = 0.0
    transfer_s: float = 0.0  # one chunk from worker to worker

    def cut_into(self, num_chunks: int, new_num_chunks: int) -> StepTimes:
        """The times of the same tokens in another number of chunks. What a chunk costs beside its tokens is not known, and left out."""
        share = num_chunks / new_num_chunks
        return replace(self, chunk_s=self.chunk_s * share, transfer_s=self.transfer_s * share)


@dataclass(frozen=True, slots=True)
class Span:
    """A worker did one thing from `start_s` to `end_s` after the start of the run. Forwards without a gap are one span."""

    worker: int
    kind: SpanKind
    layer: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class WorkerTimes:
    """Seconds that a worker is busy, by kind, and seconds that it does not compute: before its first forward, after its last search,
    and in between. Reading and writing happen beside computing."""

    forward_s: float
    search_s: float
    read_s: float
    write_s: float
    idle_start_s: float
    idle_middle_s: float
    idle_end_s: float

    @property
    def compute_s(self) -> float:
        return self.forward_s + self.search_s


@dataclass(frozen=True)
class Simulation:
    """A simulated run. spans: of one worker after the other."""

    makespan_s: float  # until the last layer is written
    num_workers: int
    spans: tuple[Span, ...]

    @cached_property
    def workers(self) -> tuple[WorkerTimes, ...]:
        spans: list[list[Span]] = [[] for _ in range(self.num_workers)]
        for span in self.spans:
            spans[span.worker].append(span)
        return tuple(_worker_times(own, self.makespan_s) for own in spans)

    @property
    def utilisation(self) -> tuple[float, ...]:
        """Share of the makespan that each worker computes."""
        return tuple(worker.compute_s / self.makespan_s if self.makespan_s else 0.0 for worker in self.workers)

    @property
    def efficiency(self) -> float:
        """Time that one worker needs at least, all reading and writing hidden, over the time that all workers spend."""
        return sum(self.utilisation) / self.num_workers


@dataclass(frozen=True, slots=True)
class Point:
    """The outcome for one number of workers and of chunks."""

    num_workers: int
    num_chunks: int
    makespan_s: float
    efficiency: float


def simulate(schedule: Schedule, times: StepTimes) -> Simulation:
    """Carries out all steps of all workers."""
    workers = [_Worker(number, schedule.steps(number), times) for number in range(schedule.num_workers)]
    arrivals: Arrivals = {}
    left = workers
    while left:
        num_arrivals, num_left = len(arrivals), len(left)
        left = [worker for worker in left if not worker.go_on(arrivals)]
        assert len(arrivals) > num_arrivals or len(left) < num_left, "the schedule deadlocks"
    spans = tuple(span for worker in workers for span in worker.spans)
    return Simulation(max((span.end_s for span in spans), default=0.0), schedule.num_workers, spans)


def sweep(
    schedule: Schedule,
    times: StepTimes,
    num_workers: Iterable[int],
    num_chunks: Iterable[int],
) -> tuple[Point, ...]:
    """Simulates every number of workers with every number of chunks, for the tokens that `schedule` and `times` are given for."""
    chunkings = tuple(num_chunks)
    points = []
    for workers in num_workers:
        for chunks in chunkings:
            changed = replace(schedule, num_workers=workers, num_chunks=chunks)
            result = simulate(changed, times.cut_into(schedule.num_chunks, chunks))
            points.append(Point(workers, chunks, result.makespan_s, result.efficiency))
    return tuple(points)


def worker_counts(num_layers: int, most: int) -> list[int]:
    """Numbers of workers up to `most` that are worth a look: with fewer workers, one of them would have more layers to do."""
    return sorted({-(-num_layers // layers_each) for layers_each in range(1, num_layers + 1)} & set(range(1, most + 1)))


def best_num_workers(points: Iterable[Point], share: float = 0.9) -> int:
    """The most workers that are used well: whose efficiency is at least `share` of the best."""
    known = tuple(points)
    floor = share * max(point.efficiency for point in known)
    return max(point.num_workers for point in known if point.efficiency >= floor)


def best_num_chunks(points: Iterable[Point], tolerance: float = 0.01) -> int:
    """The fewest chunks whose makespan is at most `tolerance` above the shortest. Fewer, for what a chunk costs beside its tokens."""
    known = tuple(points)
    limit = (1 + tolerance) * min(point.makespan_s for point in known)
    return min(point.num_chunks for point in known if point.makespan_s <= limit)


def measured_times(records: Iterable[LayerRecord], num_tokens: int, num_chunks: int) -> StepTimes:
    """Step times for `num_tokens` in `num_chunks`, from finished layers, of which there is at least one: medians over the layers.

    Forward is scaled from the tokens that the layers saw. A journal does not tell what a transfer takes: it is 0.
    """
    known = tuple(records)
    seen = max(site.num_tokens for record in known for site in record.sites)

    def seconds(*stages: str) -> float:
        return median(sum(record.seconds.get(stage, 0.0) for stage in stages) for record in known)

    return StepTimes(
        chunk_s=seconds("forward") * num_tokens / seen / num_chunks,
        search_s=seconds("search", "check", "round"),
        read_s=seconds("read"),
        write_s=seconds("write"),
    )


class _Worker:
    """A worker on its way: when its compute lane, its reader, its writer and the edge behind it are free, in seconds."""

    def __init__(self, number: int, steps: Iterator[Step], times: StepTimes) -> None:
        self.spans: list[Span] = []
        self._number, self._times, self._steps = number, times, steps
        self._next = next(steps, None)
        self._now = self._reader = self._writer = self._edge = 0.0
        self._loaded: dict[int, float] = {}

    def go_on(self, arrivals: Arrivals) -> bool:
        """Takes steps until a chunk has not been sent yet: False. True if none is left."""
        while (step := self._next) is not None:
            if step.kind == "receive" and (step.layer, step.chunk) not in arrivals:
                return False
            self._take(step, arrivals)
            self._next = next(self._steps, None)
        return True

    def _take(self, step: Step, arrivals: Arrivals) -> None:
        times, layer = self._times, step.layer
        match step.kind:
            case "receive":
                self._wait_until(arrivals[layer, step.chunk])
            case "forward":
                self._wait_until(self._loaded[layer])
                self._compute("forward", layer, times.chunk_s)
            case "send":
                self._edge = max(self._now, self._edge) + times.transfer_s
                arrivals[layer + 1, step.chunk] = self._edge
            case "load":
                self._loaded[layer] = self._reader = self._behind("read", layer, self._reader, times.read_s)
            case "search":
                self._compute("search", layer, times.search_s)
            case "write":
                self._wait_until(self._writer)
                self._writer = self._behind("write", layer, self._writer, times.write_s)

    def _wait_until(self, moment_s: float) -> None:
        self._now = max(self._now, moment_s)

    def _compute(self, kind: SpanKind, layer: int, seconds: float) -> None:
        start, self._now = self._now, self._now + seconds
        last = self.spans[-1] if self.spans else None
        if last is not None and (last.kind, last.layer, last.end_s) == (kind, layer, start):
            self.spans[-1] = Span(self._number, kind, layer, last.start_s, self._now)
        else:
            self.spans.append(Span(self._number, kind, layer, start, self._now))

    def _behind(self, kind: SpanKind, layer: int, free_s: float, seconds: float) -> float:
        """Begins something in the background. Returns when it ends."""
        start = max(self._now, free_s)
        self.spans.append(Span(self._number, kind, layer, start, start + seconds))
        return start + seconds


def _worker_times(spans: list[Span], makespan_s: float) -> WorkerTimes:
    busy: dict[SpanKind, float] = {"forward": 0.0, "search": 0.0, "read": 0.0, "write": 0.0}
    for span in spans:
        busy[span.kind] += span.end_s - span.start_s
    computing = [span for span in spans if span.kind in ("forward", "search")]
    start = computing[0].start_s if computing else makespan_s  # a worker without layers waits from the start
    end = computing[-1].end_s if computing else makespan_s
    return WorkerTimes(
        forward_s=busy["forward"],
        search_s=busy["search"],
        read_s=busy["read"],
        write_s=busy["write"],
        idle_start_s=start,
        idle_middle_s=sum(after.start_s - before.end_s for before, after in pairwise(computing)),
        idle_end_s=makespan_s - end,
    )
