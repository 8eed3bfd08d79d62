"""OUTPUT/events.jsonl, as the leader writes it: every message a line, so that any machine that sees the folder can watch the run."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from awqdist.checkpoint.writer import output_error
from awqdist.run.events import Message


class EventLog:
    """Appends messages to a file. A disk that is full costs lines of it, never the run. Raises OutputError if it cannot be opened."""

    def __init__(self, file: Path, *, anew: bool) -> None:
        try:
            self._stream: BinaryIO = file.open("wb" if anew else "ab", buffering=0)
        except OSError as error:
            raise output_error(file, error) from error

    def append(self, message: Message) -> None:
        with suppress(OSError):
            self._stream.write(message.to_json().encode() + b"\n")

    def close(self) -> None:
        self._stream.close()


def seconds_of_runs(file: Path) -> float:
    """How long the runs that wrote the file took until their last messages, all together."""
    total, first, last = 0.0, None, 0.0
    with suppress(OSError), file.open("rb") as stream:
        for line in stream:
            with suppress(ValueError, KeyError, TypeError):
                fact = json.loads(line)
                if fact["event"] == "RunStarted":
                    total += last - first if first is not None else 0.0
                    first = last = float(fact["time"])
                last = max(last, float(fact["time"]))
    return total + (last - first if first is not None else 0.0)
