"""What workers and the leader tell, and the log that it is written to: OUTPUT/.awqdist/log.jsonl, one message a line, only appended.

Workers emit events and never print. A `Message` adds who and when. The leader writes the messages to the log, then gives them to
listeners: renderers of the command line, tests. The log is both the journal from which an interrupted run is resumed
(`awqdist.run.journal`) and what `awqdist watch`, the report and the forecasts read. A line is the JSON of a message with a checksum
as its last key, so a damaged line is recognised and costs nothing but itself. This module needs no torch, so that `awqdist watch`
starts at once.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

from pydantic import TypeAdapter, ValidationError

from awqdist.layer.records import LayerRecord, MappingRecord

STATE_FOLDER = ".awqdist"
_THINNED_S = 60.0
_CHECKSUM = b',"crc32":"'


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
    """Chunks went through a layer: one for listeners; in the log, all since the line before (`Thinning`)."""

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


def log_file(output: Path) -> Path:
    """Returns the path of the log in the output folder."""
    return output / STATE_FOLDER / "log.jsonl"


def encode(message: Message) -> bytes:
    """Returns the line of a message, with its checksum and the newline."""
    body = message.to_json().encode()[:-1]
    return b'%s%s%08x"}\n' % (body, _CHECKSUM, zlib.crc32(body))


class LogWriter:
    """Appends messages to the log, in one write each. Raises OSError if the file cannot be opened."""

    def __init__(self, file: Path) -> None:
        self._stream = file.open("ab+", buffering=0)
        size = self._stream.seek(0, os.SEEK_END)
        # a machine that failed may have left half a line
        self._is_torn = size > 0 and os.pread(self._stream.fileno(), 1, size - 1) != b"\n"

    def append(self, message: Message, *, durable: bool) -> None:
        """Writes a line; with `durable`, returns once it is on the disk. Raises OSError; the next line is whole all the same."""
        data = (b"\n" if self._is_torn else b"") + encode(message)
        self._is_torn = True
        if self._stream.write(data) == len(data):
            self._is_torn = False
            if durable:
                os.fsync(self._stream.fileno())
        else:
            raise OSError(28, "No space left on device")

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


class Thinning:
    """Keeps the log small: decides which messages about work in progress become lines.

    One WorkerStatus is written a minute and worker. Chunks are added up: a line is written for the first and the last chunk of a
    layer, and in between once a minute. Mappings are left out, since LayerFinished holds them. All else is written as it is.
    """

    def __init__(self) -> None:
        self._written: dict[tuple[int | None, type], float] = {}  # -> time of the last line
        self._chunks: dict[int | None, ChunkForwarded] = {}  # by worker: not written yet

    def line_of(self, message: Message) -> Message | None:
        """Returns what is to be written of a message, or None."""
        event, worker = message.event, message.worker
        if isinstance(event, MappingSearched):
            return None
        if not isinstance(event, ChunkForwarded | WorkerStatus):
            return message
        key = worker, type(event)
        is_due = not 0 <= message.time - self._written.get(key, -1e9) < _THINNED_S
        if isinstance(event, ChunkForwarded):
            before = self._chunks.pop(worker, None)
            if before is not None and before.layer == event.layer:
                num_tokens, seconds = before.num_tokens + event.num_tokens, before.seconds + event.seconds
                event = replace(event, num_tokens=num_tokens, seconds=seconds)
            if event.chunk not in (0, event.num_chunks - 1) and not is_due:
                self._chunks[worker] = event
                return None
        elif not is_due:
            return None
        self._written[key] = message.time
        return replace(message, event=event)


@dataclass(frozen=True, slots=True)
class Log:
    """The contents of a log. damaged: numbers of the lines, from 1, that could not be read."""

    messages: tuple[Message, ...] = ()
    damaged: tuple[int, ...] = ()


def read_log(file: Path) -> Log:
    """Returns all that a log holds, of all runs; nothing where there is no file."""
    return _decoded(file.read_bytes()) if file.is_file() else Log()


def last_run(messages: Iterable[Message]) -> list[Message]:
    """Returns the messages from the last RunStarted on; all of them if there is none."""
    known = list(messages)
    starts = [place for place, message in enumerate(known) if isinstance(message.event, RunStarted)]
    return known[starts[-1] :] if starts else known


def seconds_of_runs(messages: Iterable[Message]) -> float:
    """Returns how long the runs of a log took, each until its last message, all together."""
    total = begun = latest = 0.0
    for message in messages:
        if isinstance(message.event, RunStarted) or not begun:
            total += latest - begun
            begun = latest = message.time
        latest = max(latest, message.time)
    return total + latest - begun


def bytes_read(messages: Iterable[Message]) -> dict[int | None, int]:
    """Returns the bytes of the source that each worker read, and None, the leader."""
    total: dict[int | None, int] = {}
    for message in messages:
        if isinstance(message.event, SourceRead):
            total[message.worker] = total.get(message.worker, 0) + message.event.num_bytes
    return total


def follow(file: Path, poll_s: float, stop: Callable[[], bool]) -> Iterator[Message | None]:
    """Yields the messages of the last run in `file`, then those that are added, of every run; None after each look at the file.

    Looks every `poll_s` seconds until `stop()`. The file may be missing at first, and may be replaced by a new one.
    """
    position, inode = 0, -1
    while not stop():
        lines, is_new = b"", False
        try:
            with file.open("rb") as stream:  # anew, since a network file system shows new lines only then
                status = os.fstat(stream.fileno())
                is_new = status.st_ino != inode or status.st_size < position
                inode, position = status.st_ino, 0 if is_new else position
                stream.seek(position)
                data = stream.read()
            lines = data[: data.rfind(b"\n") + 1]  # whole ones only: the rest is being written
            position += len(lines)
        except FileNotFoundError:
            position, inode = 0, -1
        messages = _decoded(lines).messages
        yield from last_run(messages) if is_new else messages
        yield None
        time.sleep(poll_s)


def _decoded(data: bytes) -> Log:
    messages, damaged = [], []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line:
            body, _, checksum = line.rpartition(_CHECKSUM)
            try:
                if checksum != b'%08x"}' % zlib.crc32(body):
                    raise ValueError("the line is not what its checksum says")
                messages.append(Message.from_json(body + b"}"))
            except ValueError:
                damaged.append(number)
    return Log(tuple(messages), tuple(damaged))
