"""Events that workers and the leader emit; a `Message` adds who and when, and is a line of the log.

Workers emit events and never print. The leader writes the messages to the log (`awqdist.run.log`), then gives them to listeners:
renderers of the command line, tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import get_args

from pydantic import TypeAdapter, ValidationError

from awqdist.layer.records import LayerRecord, MappingRecord


@dataclass(frozen=True, slots=True)
class LogBegun:
    """The first line of a log. All layers in the log were made under this fingerprint (`job.fingerprint`)."""

    fingerprint: dict[str, str]


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A run begins, or goes on where an earlier one was interrupted."""

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
    """A worker begins, or begins again after another was lost."""

    host: str
    device: str
    layers: tuple[int, ...]  # that it will do
    process_id: int = 0


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """The resources that a worker uses, every few seconds."""

    memory_bytes: int  # resident, of its process
    device_memory_bytes: int  # held on its GPU; 0 on a CPU
    device_utilization: int | None  # percent; None where it cannot be asked


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker died. The others finish what they are searching; then the run resumes from the newest usable snapshot."""

    reason: str
    restart: int  # number of this restart, from 1
    max_restarts: int


@dataclass(frozen=True, slots=True)
class StageStarted:
    """A stage of a layer begins."""

    layer: int
    stage: str  # one of STAGES; "read" and "write" run in the background of the others


@dataclass(frozen=True, slots=True)
class StageEnded:
    """A stage of a layer has ended."""

    layer: int
    stage: str
    seconds: float


@dataclass(frozen=True, slots=True)
class SourceRead:
    """Bytes of the source were read: by a worker, of its layers and the tensors outside the layers; by the leader, of what is copied.

    Not counted are the bytes by which a resumed run recognises a layer's weights (at most 32 KiB of a layer)."""

    layer: int | None  # None: outside the layers
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ChunkForwarded:
    """Chunks went through a layer: one for listeners; in the log, all since the line before (`log.Thinning`)."""

    layer: int
    chunk: int  # the last of them
    num_chunks: int  # of the layer
    num_tokens: int
    seconds: float = 0.0  # of computing


@dataclass(frozen=True, slots=True)
class MappingSearched:
    """The scales of a mapping have been chosen."""

    layer: int
    mapping: MappingRecord


@dataclass(frozen=True, slots=True)
class LayerForwarded:
    """The outputs of a layer that an earlier run had finished were computed again."""

    layer: int


@dataclass(frozen=True, slots=True)
class LayerFinished:
    """The layer's file is on disk. The leader writes this to the log before anyone else hears of it."""

    layer: int
    record: LayerRecord


@dataclass(frozen=True, slots=True)
class SnapshotSaved:
    """The inputs of `layer`, all chunks, are on disk, in `file` of the state folder."""

    layer: int
    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class OutsideCopied:
    """The tensors that belong to no layer have been copied to the file `name` of the output folder."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Warned:
    """Something that the user should know, and that does not end the run."""

    message: str


@dataclass(frozen=True, slots=True)
class RunFinished:
    """The output is complete."""

    output: str
    seconds: float
    floor_seconds: float
    output_bytes: int


@dataclass(frozen=True, slots=True)
class RunFailed:
    """The run failed or was interrupted; tells those who watch from elsewhere."""

    reason: str


Event = (
    LogBegun
    | RunStarted
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
    | OutsideCopied
    | Warned
    | RunFinished
    | RunFailed
)
Emit = Callable[[Event], None]
_ADAPTERS = {kind.__name__: TypeAdapter(kind) for kind in get_args(Event)}


@dataclass(frozen=True, slots=True)
class Message:
    """An event with its origin. worker: its number, None for the leader; time: seconds since 1970, by the sender's clock."""

    event: Event
    worker: int | None
    time: float

    def to_json(self) -> str:
        """Returns one line without the newline. Numbers that are not finite are written as Python does (NaN, Infinity)."""
        origin = {"event": type(self.event).__name__, "time": self.time, "worker": self.worker}
        return json.dumps({**origin, **asdict(self.event)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str | bytes) -> Message:
        """Returns the message of a line. Raises ValueError for anything that `to_json` did not write."""
        try:
            data = json.loads(line)
            event = _ADAPTERS[data["event"]].validate_python(data)
            return cls(event, _WORKER.validate_python(data["worker"]), _TIME.validate_python(data["time"]))
        except (KeyError, TypeError, ValidationError) as error:
            raise ValueError(f"not an event: {line[:200]!r}") from error


Listen = Callable[[Message], None]
_WORKER: TypeAdapter[int | None] = TypeAdapter(int | None)
_TIME = TypeAdapter(float)
