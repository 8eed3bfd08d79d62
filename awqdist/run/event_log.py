"""OUTPUT/events.jsonl: every message of every run that wrote into OUTPUT, a line each, in the order in which the leader heard them.

A run that is resumed appends: its RunStarted begins it. The file is read while another machine writes it, so its last line may be torn,
and a run that was killed leaves a torn line for good. Such lines, and those that no run wrote, are passed over.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from awqdist.run.events import Message, RunStarted, SourceRead

EVENTS_FILE = "events.jsonl"


class EventLog:
    """The leader's pen. A disk that is full costs lines, never the run. Raises OSError if the file cannot be opened."""

    def __init__(self, file: Path, *, anew: bool) -> None:
        self._stream = file.open("wb" if anew else "ab", buffering=0)
        self._is_torn = not anew  # a run that was killed may have left half a line

    def append(self, message: Message) -> None:
        data = (b"\n" if self._is_torn else b"") + message.to_json().encode() + b"\n"
        self._is_torn = True
        with suppress(OSError):
            self._is_torn = self._stream.write(data) < len(data)

    def close(self) -> None:
        self._stream.close()


def seconds_of_runs(file: Path) -> float:
    """How long the runs that wrote the file took until their last messages, all together."""
    total = begun = latest = 0.0
    for message in read_events(file):
        if isinstance(message.event, RunStarted) or not begun:
            total += latest - begun
            begun = latest = message.time
        latest = max(latest, message.time)
    return total + latest - begun


def bytes_read(messages: list[Message]) -> dict[int | None, int]:
    """Bytes of the source that each worker read, and None, the leader."""
    total: dict[int | None, int] = {}
    for message in messages:
        if isinstance(message.event, SourceRead):
            total[message.worker] = total.get(message.worker, 0) + message.event.num_bytes
    return total


def read_events(file: Path) -> list[Message]:
    """All messages of `file`, of all runs; none where there is no file."""
    return _messages(_Tail(file).read())


def last_run(messages: list[Message]) -> list[Message]:
    """The messages from the last RunStarted on; all if there is none."""
    starts = [place for place, message in enumerate(messages) if isinstance(message.event, RunStarted)]
    return messages[starts[-1] :] if starts else messages


def follow_events(file: Path, poll_s: float, stop: Callable[[], bool]) -> Iterator[Message | None]:
    """The messages of the last run in `file`, then those that are added, of every run; None after each look at the file.

    Looks every `poll_s` seconds until `stop()`. The file may be missing at first, and may be replaced by a new one.
    """
    tail = _Tail(file)
    while not stop():
        messages = _messages(tail.read())
        yield from last_run(messages) if tail.replaced else messages
        yield None
        time.sleep(poll_s)


@dataclass(slots=True)
class _Tail:
    """Reads a growing file from where it was read to before."""

    file: Path
    position: int = 0
    inode: int = -1
    replaced: bool = False  # since the last look, or this was the first: it was read from its start

    def read(self) -> bytes:
        """The whole lines that were added. A file system of a network shows them to those who open the file after they were written."""
        try:
            with self.file.open("rb") as stream:
                status = os.fstat(stream.fileno())
                self.replaced = status.st_ino != self.inode or status.st_size < self.position
                if self.replaced:
                    self.inode, self.position = status.st_ino, 0
                stream.seek(self.position)
                data = stream.read()
        except FileNotFoundError:
            self.position, self.inode, self.replaced = 0, -1, False
            return b""
        lines = data[: data.rfind(b"\n") + 1]
        self.position += len(lines)
        return lines


def _messages(lines: bytes) -> list[Message]:
    found = []
    for line in lines.splitlines():
        try:
            found.append(Message.from_json(line))
        except ValueError:
            continue
    return found
