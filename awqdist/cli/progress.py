"""Messages of a run as a person or a machine watches them: a live display, plain lines, or lines of JSON.

Workers emit events and never print (`awqdist.run.events`); `renderer` gives the callable that hears their messages, in the process that
leads the run or in `awqdist watch`. The live display and the plain lines go to stderr, so that stdout stays free for results; JSON lines
are a result: stdout.

`3/32` counts finished layers. A layer under way is called by its index, from 0, as in the names of its tensors.

Rich is imported by the live display alone, and torch by none: the workers that need it may be other processes.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

from awqdist.cli.display import display, show_eta
from awqdist.cli.run_state import RunState
from awqdist.layer.records import LayerRecord
from awqdist.run import events as ev
from awqdist.run.events import Listen, Message
from awqdist.units import show_bytes, show_number, show_seconds, strict_json

if TYPE_CHECKING:
    from rich.console import RenderableType

Kind = Literal["auto", "rich", "plain", "json"]
Clock = Callable[[], float]

_STYLES: dict[type[ev.Event], str] = {ev.Warned: "yellow", ev.WorkerLost: "bold red", ev.RunFinished: "bold"}


def renderer(kind: Kind = "auto", now: Clock = time.time) -> AbstractContextManager[Listen]:
    """`with renderer("plain") as listen: listen(message)`. `auto` is the live display on a terminal, else plain lines.

    now: the present by the clock of the run. Calls of `listen` must not overlap.
    """
    match resolve(kind):
        case "rich":
            return _rich(now)
        case "json":
            return _json()
        case _:
            return _plain()


def resolve(kind: Kind) -> Kind:
    """What `auto` stands for."""
    return kind if kind != "auto" else "rich" if sys.stderr.isatty() else "plain"


@contextmanager
def _json() -> Iterator[Listen]:
    def listen(message: Message) -> None:
        origin = {"event": type(message.event).__name__, "time": message.time, "worker": message.worker}
        print(strict_json({**origin, **asdict(message.event)}), flush=True)

    yield listen


@contextmanager
def _plain() -> Iterator[Listen]:
    state = RunState()

    def listen(message: Message) -> None:
        state.observe(message)
        line = _line(state, message)
        if line is not None:
            print(line, file=sys.stderr, flush=True)

    yield listen


@contextmanager
def _rich(now: Clock) -> Iterator[Listen]:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    state = RunState()
    console = Console(stderr=True, highlight=False)

    def shown() -> RenderableType:
        return display(state, now(), console.width)

    live = Live(get_renderable=shown, console=console, refresh_per_second=4, redirect_stdout=False)
    with live:

        def listen(message: Message) -> None:
            state.observe(message)
            style, line = _STYLES.get(type(message.event)), _line(state, message)
            if isinstance(message.event, ev.RunFinished):
                live.stop()  # so that the line stands below the display, not above
            if style is not None and line is not None:
                live.console.print(Text(line, style=style))

        yield listen


def _line(state: RunState, message: Message) -> str | None:
    """The plain line for a message, None for those that get none. It names the worker where there are several."""
    event, several = message.event, len(state.workers) > 1
    worker = "a worker" if message.worker is None else f"worker {message.worker}"
    by = f" ({worker})" if several and message.worker is not None else ""
    match event:
        case ev.RunStarted():
            return _start_line(event)
        case ev.WorkerStarted() if several:
            return f"{worker} started on {event.host}, {event.device}, with {len(event.layers)} layers"
        case ev.LayerFinished():
            spent = show_seconds(sum(event.record.seconds.values()))
            eta = show_eta(state.remaining_seconds(message.time))
            where = f"  (layer {event.layer}, {worker})" if by else ""
            done = f"layer {state.num_done}/{state.num_layers}"
            return f"{done}  {spent}{_worst_linear(event.record)}  eta {eta}{where}"
        case ev.LayerForwarded():
            return f"layer {event.layer} was finished before, only its outputs were computed again{by}"
        case ev.WorkerLost():
            return f"{worker} was lost ({event.reason}); going on, restart {event.restart} of {event.max_restarts}"
        case ev.Warned():
            return f"warning: {event.message}{by}"
        case ev.RunFinished():
            over = ""
            if event.floor_seconds > 0:
                over = f", {event.seconds / event.floor_seconds:.2f}x one forward pass with reading and writing"
            return (
                f"finished in {show_seconds(event.seconds)}{over}: {show_bytes(event.output_bytes)} in {event.output}"
            )
    return None


def _start_line(event: ev.RunStarted) -> str:
    earlier = f", {event.num_finished_layers} finished before" if event.num_finished_layers else ""
    workers = f", {event.num_workers} workers ({event.backend})" if event.num_workers > 1 else ""
    work = f"{event.num_layers} layers{earlier}, {event.num_tokens:,} tokens on {event.device}{workers}"
    return f"{event.model} -> {event.output}: {work}"


def _worst_linear(record: LayerRecord) -> str:
    """`  down_proj error 0.0123 -> 0.0045`: the linear that lost most, rounded to nearest and as written."""
    if not record.linears:
        return ""
    worst = max(record.linears, key=lambda x: (not math.isfinite(x.relative_error), x.relative_error))
    name = worst.name.rpartition(".")[2]
    return f"  {name} error {show_number(worst.relative_error_nearest)} -> {show_number(worst.relative_error)}"
