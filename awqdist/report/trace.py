"""What each worker did and when: figures for the report, and a trace file that Perfetto and chrome://tracing show.

A worker is busy while it forwards, searches, checks or rounds. It reads and writes in the background of that, which does not count as
busy. Times are those of the workers' clocks; where the clocks of machines differ, workers are shifted against each other.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from awqdist.run.events import (
    ChunkForwarded,
    LayerFinished,
    Message,
    RunFinished,
    RunStarted,
    StageEnded,
    WorkerLost,
    WorkerStarted,
)

COMPUTE_STAGES = ("forward", "search", "check", "round")
_THREADS = {"read": 1, "write": 2}  # of the trace; the stages that compute share number 0


@dataclass(frozen=True, slots=True)
class WorkerTimes:
    """What one worker spent its time on, in seconds of the run's wall time."""

    worker: int
    host: str
    device: str
    num_layers: int  # that it finished
    seconds: dict[str, float]  # by stage
    busy_seconds: float  # in which it computed; time that two stages share counts once
    wall_seconds: float  # of the run

    @property
    def idle_seconds(self) -> float:
        """Returns the time in which it did not compute."""
        return max(0.0, self.wall_seconds - self.busy_seconds)

    @property
    def busy_share(self) -> float:
        """Returns the share of the wall time in which it computed, 0 to 1."""
        return min(1.0, self.busy_seconds / self.wall_seconds) if self.wall_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class _Span:
    worker: int
    stage: str
    layer: int
    start: float  # seconds since the run began
    seconds: float


def worker_times(messages: Sequence[Message]) -> list[WorkerTimes]:
    """Returns one row for each worker of one run (`last_run`), whatever the order of its messages.

    A run that did not finish lasts until its last message. A stage that a lost worker never ended counts for nothing.
    """
    began, ended = _begin_and_end(messages)
    origins = {m.worker or 0: m.event for m in messages if isinstance(m.event, WorkerStarted)}
    num_layers = Counter(m.worker or 0 for m in messages if isinstance(m.event, LayerFinished))
    spans: dict[int, list[_Span]] = {worker: [] for worker in origins}
    for span in _spans(messages, began):
        spans.setdefault(span.worker, []).append(span)
    found = []
    for worker, own in sorted(spans.items()):
        origin = origins.get(worker, WorkerStarted("", "", ()))
        seconds: dict[str, float] = defaultdict(float)
        for span in own:
            seconds[span.stage] += span.seconds
        busy = _covered(span for span in own if span.stage in COMPUTE_STAGES)
        row = WorkerTimes(
            worker, origin.host, origin.device, num_layers[worker], dict(seconds), busy, max(0.0, ended - began)
        )
        found.append(row)
    return found


def chrome_trace(messages: Sequence[Message]) -> dict[str, Any]:
    """Returns one run in the Trace Event Format: a process for each worker, a thread for what it computes, reads and writes."""
    began, _ = _begin_and_end(messages)
    events: list[dict[str, Any]] = []
    for message in messages:
        worker, event = message.worker or 0, message.event
        if isinstance(event, WorkerStarted):
            name = f"worker {worker} ({event.host}, {event.device})"
            events.append({"ph": "M", "name": "process_name", "pid": worker, "args": {"name": name}})
            for thread, kind in enumerate(("compute", *_THREADS)):
                events.append({"ph": "M", "name": "thread_name", "pid": worker, "tid": thread, "args": {"name": kind}})
        elif isinstance(event, WorkerLost):
            time = _microseconds(message.time - began)
            events.append({"ph": "i", "name": f"lost: {event.reason}", "pid": worker, "tid": 0, "s": "p", "ts": time})
    for span in _spans(messages, began):
        times = {"ts": _microseconds(span.start), "dur": _microseconds(span.seconds)}
        place = {"pid": span.worker, "tid": _THREADS.get(span.stage, 0)}
        events.append({"ph": "X", "name": f"{span.stage} {span.layer}", "cat": span.stage, **place, **times})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)


def _begin_and_end(messages: Sequence[Message]) -> tuple[float, float]:
    times = [message.time for message in messages] or [0.0]
    begins = [message.time for message in messages if isinstance(message.event, RunStarted)]
    ends = [message.time for message in messages if isinstance(message.event, RunFinished)]
    return min(begins or times), max(ends or times)


def _spans(messages: Iterable[Message], began: float) -> Iterator[_Span]:
    """Yields what each message says to have just ended. The stage "forward" is told chunk by chunk."""
    for message in messages:
        match message.event:
            case ChunkForwarded(layer=layer, seconds=seconds):
                stage = "forward"
            case StageEnded(layer=layer, stage=stage, seconds=seconds) if stage in (*COMPUTE_STAGES[1:], *_THREADS):
                pass
            case _:
                continue
        yield _Span(message.worker or 0, stage, layer, message.time - began - seconds, seconds)


def _covered(spans: Iterable[_Span]) -> float:
    """Returns the seconds in which at least one of the spans was under way."""
    covered, reached = 0.0, -math.inf
    for span in sorted(spans, key=lambda span: span.start):
        end = span.start + span.seconds
        covered += max(0.0, end - max(span.start, reached))
        reached = max(reached, end)
    return covered
