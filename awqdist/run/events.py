"""What workers tell the world while they work. Workers emit events and never print; renderers live with the command line.

An event that leaves its worker becomes a `Message`: with the worker's number and the time. Messages are what the leader journals from,
what renderers are given, and the lines of OUTPUT/events.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from awqdist.layer.records import LayerRecord, MappingRecord


@dataclass(frozen=True, slots=True)
class RunStarted:
    model: str
    output: str
    device: str
    num_layers: int
    num_finished_layers: int  # by an earlier, interrupted run
    num_tokens: int
    num_workers: int = 1
    backend: str = "local"


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    """A worker is ready to begin, or to begin again after another was lost."""

    host: str
    device: str
    layers: tuple[int, ...]  # that it will do
    process_id: int = 0


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """How a worker is doing; told every few seconds."""

    memory_bytes: int  # resident, of its process
    device_memory_bytes: int  # held on its GPU; 0 on a CPU
    device_utilization: int | None  # percent; None where it cannot be asked


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker died. The others finish what they are searching; then the run goes on from the newest usable boundary."""

    reason: str
    restart: int  # the how manieth
    max_restarts: int


@dataclass(frozen=True, slots=True)
class StageStarted:
    layer: int
    stage: str  # one of STAGES; "read" and "write" run in the background of the others


@dataclass(frozen=True, slots=True)
class StageEnded:
    layer: int
    stage: str
    seconds: float


@dataclass(frozen=True, slots=True)
class SourceRead:
    """Bytes of the source that were read, as the reader counted them. A worker reads its layers and what is outside of them; the leader
    reads what is copied. The few bytes by which the journal knows a layer's weights again (at most 32 KiB of a layer) are not counted."""

    layer: int | None  # None: outside the layers
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ChunkForwarded:
    """A chunk went through a layer: a piece of its stage "forward"."""

    layer: int
    chunk: int
    num_chunks: int
    num_tokens: int
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class MappingSearched:
    layer: int
    mapping: MappingRecord


@dataclass(frozen=True, slots=True)
class LayerForwarded:
    """A layer that an earlier run had finished: only its outputs were computed again."""

    layer: int


@dataclass(frozen=True, slots=True)
class LayerFinished:
    """The layer's file is on disk. The leader journals it before it tells others."""

    layer: int
    record: LayerRecord


@dataclass(frozen=True, slots=True)
class SnapshotSaved:
    """Boundary activations in front of `layer` are on disk, in `file` of the state folder."""

    layer: int
    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Warned:
    message: str


@dataclass(frozen=True, slots=True)
class RunFinished:
    output: str
    seconds: float
    floor_seconds: float
    output_bytes: int


@dataclass(frozen=True, slots=True)
class RunFailed:
    """The run ended before its time, and could say so: for those who watch from elsewhere. Its own screen shows the error."""

    reason: str


_EVENTS = (
    RunStarted,
    WorkerStarted,
    WorkerStatus,
    WorkerLost,
    StageStarted,
    StageEnded,
    SourceRead,
    ChunkForwarded,
    MappingSearched,
    LayerForwarded,
    LayerFinished,
    SnapshotSaved,
    Warned,
    RunFinished,
    RunFailed,
)
Event = (
    RunStarted
    | WorkerStarted
    | WorkerStatus
    | WorkerLost
    | StageStarted
    | StageEnded
    | SourceRead
    | ChunkForwarded
    | MappingSearched
    | LayerForwarded
    | LayerFinished
    | SnapshotSaved
    | Warned
    | RunFinished
    | RunFailed
)
Emit = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Message:
    """An event with its origin. worker: its number, None for the run as a whole; time: seconds since 1970, by the worker's clock."""

    event: Event
    worker: int | None
    time: float

    def to_json(self) -> str:
        """One line, without the newline. Numbers that are not finite stay as Python writes them (NaN, Infinity)."""
        return json.dumps(
            {"event": type(self.event).__name__, "time": self.time, "worker": self.worker, **asdict(self.event)}
        )

    @classmethod
    def from_json(cls, line: str | bytes) -> Message:
        """Raises ValueError for anything that `to_json` did not write."""
        try:
            data: dict[str, Any] = json.loads(line)
            kind = next(kind for kind in _EVENTS if kind.__name__ == data["event"])
            time, worker = data["time"], data["worker"]
            fields = {name: value for name, value in data.items() if name not in ("event", "time", "worker")}
            return cls(kind(**{name: _value(name, value) for name, value in fields.items()}), worker, time)
        except (KeyError, TypeError, AttributeError, StopIteration) as error:
            raise ValueError(f"not an event: {line!r}") from error


Listen = Callable[[Message], None]


def _value(name: str, value: Any) -> Any:
    match name:
        case "record":
            return LayerRecord.from_json(value)
        case "mapping":
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
            return MappingRecord(**fields)
        case _:
            return tuple(value) if isinstance(value, list) else value
