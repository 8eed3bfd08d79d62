"""Who computed when: a run as spans of time per worker, from its messages. Pure: messages in, figures out.

A worker is busy while it forwards, searches, checks or rounds. It reads and writes in the background of that, so these are spans of their
own and count for nothing. What ended is told with its duration; a stage that a lost worker never ended is in no span.

Times are those of the workers' clocks, as seconds since the run began. Where the clocks of machines differ, lanes are shifted against
each other; what is within a lane is right.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from awqdist.run.events import (
    ChunkForwarded,
    Event,
    LayerFinished,
    Message,
    RunFinished,
    RunStarted,
    StageEnded,
    WorkerLost,
    WorkerStarted,
)

COMPUTE_KINDS = ("forward", "search")
BACKGROUND_KINDS = ("read", "write")

_KIND_OF_STAGE = {"search": "search", "check": "search", "round": "search", "read": "read", "write": "write"}
SMALLEST_GAP = 1 / 1000  # of the run; a shorter one within a layer is not drawn


@dataclass(frozen=True, slots=True)
class Span:
    """Work of one kind on one layer. busy_seconds: without the gaps in it that are too short to be drawn."""

    kind: str  # "forward", "search" (with check and round), "read" or "write"
    layer: int
    start: float
    end: float
    busy_seconds: float


@dataclass(frozen=True, slots=True)
class Lane:
    """What a worker did. utilization: its share of the run's wall time in which it computed, 0 to 1."""

    worker: int
    host: str
    device: str
    spans: tuple[Span, ...]  # by their start
    num_layers: int  # that it finished
    busy_seconds: float
    utilization: float

    def seconds(self, kind: str) -> float:
        """Spent on one kind of work."""
        return math.fsum(span.busy_seconds for span in self.spans if span.kind == kind)


@dataclass(frozen=True, slots=True)
class Loss:
    """A worker that was lost; None where it is not known which."""

    worker: int | None
    time: float
    reason: str


@dataclass(frozen=True, slots=True)
class Timeline:
    """wall_seconds: from RunStarted to RunFinished, or to the last message of a run that did not end."""

    wall_seconds: float
    lanes: tuple[Lane, ...]  # by number of the worker
    losses: tuple[Loss, ...]

    @property
    def utilization(self) -> float:
        """Mean over the workers, 0 to 1; 0 without any."""
        return math.fsum(lane.utilization for lane in self.lanes) / max(len(self.lanes), 1)


def timeline(messages: Sequence[Message]) -> Timeline:
    """Of one run (`log.last_run`), its messages in any order."""
    began = _time_of(messages, RunStarted, min)
    wall = _time_of(messages, RunFinished, max) - began
    pieces: dict[int, list[Span]] = defaultdict(list)
    for message in messages:
        piece = _piece(message, began)
        if piece is not None:
            pieces[message.worker or 0].append(piece)
    origins = {m.worker or 0: m.event for m in messages if isinstance(m.event, WorkerStarted)}
    finished = Counter(m.worker or 0 for m in messages if isinstance(m.event, LayerFinished))
    lanes = []
    for worker in sorted({*pieces, *origins}):
        origin = origins.get(worker, WorkerStarted("", "", ()))
        busy = _covered(piece for piece in pieces[worker] if piece.kind in COMPUTE_KINDS)
        spans = _joined(pieces[worker], wall * SMALLEST_GAP)
        share = min(1.0, busy / wall) if wall > 0 else 0.0
        lanes.append(Lane(worker, origin.host, origin.device, spans, finished[worker], busy, share))
    losses = [Loss(m.worker, m.time - began, m.event.reason) for m in messages if isinstance(m.event, WorkerLost)]
    return Timeline(wall, tuple(lanes), tuple(losses))


def _time_of(messages: Sequence[Message], kind: type[Event], choose: Callable[..., float]) -> float:
    """The time of the event of this kind; where there is none, the first or last time of all."""
    times = [m.time for m in messages if isinstance(m.event, kind)] or [m.time for m in messages]
    return choose(times, default=0.0)


def _piece(message: Message, began: float) -> Span | None:
    """What the message says to have just ended. The stage "forward" is told chunk by chunk."""
    match message.event:
        case ChunkForwarded(layer=layer, seconds=seconds):
            kind = "forward"
        case StageEnded(layer=layer, stage=stage, seconds=seconds) if stage in _KIND_OF_STAGE:
            kind = _KIND_OF_STAGE[stage]
        case _:
            return None
    end = message.time - began
    return Span(kind, layer, end - seconds, end, seconds)


def _joined(pieces: Iterable[Span], gap: float) -> tuple[Span, ...]:
    """Pieces of one kind and layer that no more than `gap` seconds part become one: 64 chunks of a layer are one bar of a chart."""
    joined: list[Span] = []
    last: dict[str, int] = {}  # kind -> place of its last span
    for piece in sorted(pieces, key=lambda span: (span.start, span.kind, span.layer)):
        place = last.get(piece.kind, -1)
        before = joined[place] if place >= 0 else None
        if before is not None and before.layer == piece.layer and piece.start - before.end <= gap:
            end, busy = max(before.end, piece.end), before.busy_seconds + piece.busy_seconds
            joined[place] = replace(before, end=end, busy_seconds=busy)
        elif piece.end > piece.start:
            last[piece.kind] = len(joined)
            joined.append(piece)
    return tuple(joined)


def _covered(spans: Iterable[Span]) -> float:
    """Seconds in which at least one of the spans was under way."""
    covered, reached = 0.0, -math.inf
    for span in sorted(spans, key=lambda span: span.start):
        covered += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return covered
