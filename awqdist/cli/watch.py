"""Follows a running job from the log in its output folder, on any machine that can read it (`awqdist watch`).

It only reads, so it may begin before the run, end at any time, and run many times over. A run that is killed does not say so; all that
can be seen, and is said, is that nothing was written for long.
"""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from awqdist.cli.progress import LONG_SILENCE_S, Kind, RunState, display, renderer, resolve, silence
from awqdist.errors import OutputError
from awqdist.run.events import Message, RunFailed, RunFinished, last_run, log_file, read_log
from awqdist.run.events import follow as follow_log
from awqdist.units import strict_json

POLL_S = 0.5
_WORKER_FIELDS = "host", "device", "stage", "layer", "chunk", "num_chunks", "background", "tokens_per_second"


def show_now(output: Path, kind: Kind = "auto") -> None:
    """Prints the present state of the last run in `output`: the live display once, or with "json" an object."""
    state = RunState()
    for message in last_run(read_log(log_file(output)).messages):
        state.observe(message)
    if state.started is None:
        raise OutputError(f"{log_file(output)} tells of no run; name the output folder of a run that has begun")
    now = max(state.time, time.time())
    if kind == "json":
        print(strict_json(_state_json(state, now)))
        return
    from rich.console import Console

    console = Console(highlight=False, color_system=None if kind == "plain" else "auto")
    console.print(display(state, now, console.width))


def follow(output: Path, kind: Kind = "auto") -> None:
    """Shows the last run in `output`, or the next, until it has finished. SIGINT and SIGTERM end the watching, not the run."""
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    kind, clock, next_s = resolve(kind), _RunClock(), float(LONG_SILENCE_S)
    if not log_file(output).exists():
        _say(f"waiting for a run to begin: there is no {log_file(output)} yet")
    with renderer(kind, clock.now) as listen:
        for message in follow_log(log_file(output), POLL_S, lambda: bool(signals)):
            if message is None:
                clock.is_live = True
                silent_s = clock.silent_seconds()
                if silent_s < LONG_SILENCE_S:
                    next_s = LONG_SILENCE_S
                elif silent_s > next_s:  # after a minute, then each time that it has doubled
                    next_s = 2 * silent_s
                    if kind != "rich":  # the live display tells by itself
                        _say(silence(silent_s))
                continue
            clock.hear(message)
            listen(message)
            if isinstance(message.event, RunFinished):
                return
            if isinstance(message.event, RunFailed) and clock.is_live:
                _say(f"the run has ended: {message.event.reason}")
                raise SystemExit(1)
    _say("no longer watching; the run itself continues")
    raise SystemExit(128 + signals[0])


def _say(line: str) -> None:
    print(f"awqdist: {line}", file=sys.stderr, flush=True)


@dataclass(slots=True)
class _RunClock:
    """Tells the present by the clock of the run, which may differ from this machine's; a message that arrives shows by how much."""

    is_live: bool = False  # what was written before the watching began has been heard
    newest: float | None = None
    offset_s: float = 0.0

    def hear(self, message: Message) -> None:
        self.newest = message.time
        if self.is_live:
            self.offset_s = message.time - time.time()

    def now(self) -> float:
        return time.time() + self.offset_s

    def silent_seconds(self) -> float:
        return 0.0 if self.newest is None else self.now() - self.newest


def _state_json(state: RunState, now: float) -> dict[str, Any]:
    assert state.started is not None
    return {
        **asdict(state.started),
        "num_done": state.num_done,
        "finished": state.finished is not None,
        "restarts": 0 if state.lost is None else state.lost.restart,
        "elapsed_seconds": state.elapsed_seconds(now),
        "remaining_seconds": state.remaining_seconds(now),
        "silent_seconds": state.silent_seconds(now),
        "workers": [
            {
                "worker": worker.number,
                **{name: getattr(worker, name) for name in _WORKER_FIELDS},
                **({} if worker.status is None else asdict(worker.status)),
            }
            for worker in state.by_number()
        ],
    }
