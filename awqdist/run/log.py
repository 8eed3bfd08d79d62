"""The log of a run: OUTPUT/.awqdist/log.jsonl, one message a line, only ever appended to.

It is both the journal from which an interrupted run is resumed (`awqdist.run.journal`) and what `awqdist watch`, the report and
the forecasts read. A line is the JSON of a message with a checksum as its last key, so a damaged line is recognised and costs
nothing but itself. This module needs no torch, so that `awqdist watch` starts at once.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from awqdist.run.events import ChunkForwarded, MappingSearched, Message, RunStarted, SourceRead, WorkerStatus

STATE_FOLDER = ".awqdist"
LOG_FILE = "log.jsonl"
_THINNED_S = 60.0
_CHECKSUM = b',"crc32":"'


def log_file(output: Path) -> Path:
    """Returns the path of the log in the output folder."""
    return output / STATE_FOLDER / LOG_FILE


def encode(message: Message) -> bytes:
    """Returns the line of a message, with its checksum and the newline."""
    body = message.to_json().encode()[:-1]
    return b'%s%s%08x"}\n' % (body, _CHECKSUM, zlib.crc32(body))


def decode(line: bytes) -> Message:
    """Returns the message of a line. Raises ValueError for anything that `encode` did not write."""
    body, _, checksum = line.rstrip(b"\n").rpartition(_CHECKSUM)
    if checksum != b'%08x"}' % zlib.crc32(body):
        raise ValueError("the line is not what its checksum says")
    return Message.from_json(body + b"}")


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
            try:
                messages.append(decode(line))
            except ValueError:
                damaged.append(number)
    return Log(tuple(messages), tuple(damaged))
