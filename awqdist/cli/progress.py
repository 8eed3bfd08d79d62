"""Adds up the messages of a run, and shows them as a live display, as plain lines or as lines of JSON.

Workers emit events and never print; `renderer` gives the callable that hears their messages, in the leader's process or in
`awqdist watch`. The live display and the plain lines go to stderr, JSON lines to stdout. `3/32` counts finished layers; a layer under way
is called by its index, from 0, as in the names of its tensors. Rich is imported by the live display alone, and torch by none.

`RunState` takes its times from the messages, so a log gives the state that a listener had, on any machine and at any time. What depends
on the present takes it as `now`, by the clock of the run.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

from awqdist.layer.records import LayerRecord, MappingRecord
from awqdist.run import events as ev
from awqdist.run.events import Listen, Message
from awqdist.units import MISSING, pattern_of, show_bytes, show_number, show_seconds, strict_json

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Kind = Literal["auto", "rich", "plain", "json"]

_BACKGROUND_STAGES = ("read", "write")  # they overlap the other stages of their worker
LONG_SILENCE_S = 60  # workers tell their status every few seconds

_GAP = 2  # between columns
_LEAST_SEARCHED = 16  # columns of the terminal
_STYLES: dict[type[ev.Event], str] = {ev.Warned: "yellow", ev.WorkerLost: "bold red", ev.RunFinished: "bold"}


@dataclass(slots=True)
class WorkerState:
    """What a worker is doing. It computes one layer while it reads the next and writes the one before."""

    number: int
    since: float = 0.0  # when its stage began
    host: str = ""
    device: str = ""
    stage: str = "starting"  # or a stage that computes, "waiting", "lost", "done"
    layer: int | None = None  # None while it waits
    chunk: int = 0  # that were forwarded
    num_chunks: int = 0
    num_tokens: int = 0  # of them
    forward_seconds: float = 0.0  # spent on them
    background: dict[str, int] = field(default_factory=dict)  # stage -> layer
    mapping: MappingRecord | None = None  # the last that was searched
    status: ev.WorkerStatus | None = None
    peak_memory_bytes: int = 0
    peak_device_memory_bytes: int = 0
    layers_left: set[int] | None = None  # None: unknown
    num_finished: int = 0  # layers; its first counts from its first chunk on, because it waits for that
    finished_seconds: float = 0.0  # that these took
    layer_began: float = 0.0  # the layer that it will finish next
    is_under_way: bool = False

    @property
    def tokens_per_second(self) -> float | None:
        """Returns the speed in the layer that it forwarded last, without the time in which it waited for chunks."""
        return self.num_tokens / self.forward_seconds if self.forward_seconds > 0 else None

    def turn_to(self, stage: str, time: float, layer: int | None = None) -> None:
        """Sets the stage, and when it began."""
        self.stage, self.since, self.layer = stage, time, layer

    def observe(self, event: ev.Event, time: float) -> None:
        """Takes in an event of this worker."""
        match event:
            case ev.WorkerStarted():
                self.host, self.device = event.host, event.device
                self.layers_left, self.layer_began, self.is_under_way = set(event.layers), time, False
                self.mapping, self.background = None, {}
                self.turn_to("waiting", time)
            case ev.WorkerStatus():
                self.status = event
                self.peak_memory_bytes = max(self.peak_memory_bytes, event.memory_bytes)
                self.peak_device_memory_bytes = max(self.peak_device_memory_bytes, event.device_memory_bytes)
            case ev.WorkerLost():
                self.status, self.background = None, {}
                self.turn_to("lost", time, self.layer)
            case ev.StageStarted() | ev.StageEnded() if event.stage in _BACKGROUND_STAGES:
                self.background.pop(event.stage, None)
                if isinstance(event, ev.StageStarted):
                    self.background[event.stage] = event.layer
            case ev.StageStarted():
                self.turn_to(event.stage, time, event.layer)
                if event.stage == "forward":
                    self.chunk, self.num_tokens, self.forward_seconds = 0, 0, 0.0
                    self.layer_began = self.layer_began if self.is_under_way else time
                    self.is_under_way = True
            case ev.StageEnded() if event.stage == self.stage:
                self.turn_to("waiting", time)
            case ev.ChunkForwarded():
                self.chunk, self.num_chunks = min(event.chunk + 1, event.num_chunks), event.num_chunks
                self.num_tokens += event.num_tokens
                self.forward_seconds += event.seconds
            case ev.MappingSearched():
                self.mapping = event.mapping
            case ev.LayerForwarded():  # an earlier run had finished it: it cost little and does not count for the pace
                (self.layers_left or set()).discard(event.layer)
                self.layer_began, self.is_under_way = time, False
                self.turn_to("waiting", time)
            case ev.LayerFinished():
                (self.layers_left or set()).discard(event.layer)
                self.num_finished += 1
                self.finished_seconds += time - self.layer_began
                self.layer_began = time


@dataclass(slots=True)
class RunState:
    """The state of a run after the messages so far. A RunStarted begins it anew."""

    started: ev.RunStarted | None = None
    finished: ev.RunFinished | None = None
    lost: ev.WorkerLost | None = None  # the last loss
    workers: dict[int, WorkerState] = field(default_factory=dict)
    num_done: int = 0  # layers finished by this run and by those before it
    began: float = 0.0
    time: float = 0.0  # of the newest message

    def observe(self, message: Message) -> None:
        """Takes in the next message."""
        event, self.time = message.event, max(self.time, message.time)
        match event:
            case ev.RunStarted():
                self.started, self.finished, self.lost = event, None, None
                self.num_done, self.began, self.time = event.num_finished_layers, message.time, message.time
                self.workers = {
                    n: WorkerState(n, message.time, layer_began=message.time) for n in range(event.num_workers)
                }
            case ev.RunFinished():
                self.finished = event
                for worker in self.workers.values():
                    worker.turn_to("done", message.time)
            case ev.LayerFinished():
                self.num_done += 1
            case ev.WorkerLost():
                self.lost = event
            case ev.WorkerStarted():  # the layers of lost workers are assigned again
                for worker in self.workers.values():
                    if worker.stage == "lost":
                        worker.layers_left = set()
        if message.worker is not None:
            new = WorkerState(message.worker, message.time, layer_began=message.time)
            self.workers.setdefault(message.worker, new).observe(event, message.time)

    @property
    def num_layers(self) -> int:
        """Returns the number of layers of the model; 0 before a run."""
        return self.started.num_layers if self.started else 0

    def by_number(self) -> list[WorkerState]:
        """Returns the workers in the order of their numbers."""
        return sorted(self.workers.values(), key=lambda worker: worker.number)

    def elapsed_seconds(self, now: float) -> float:
        """Returns the time since the run began, until its end if it has finished."""
        return max(0.0, (self.time if self.finished else now) - self.began) if self.started else 0.0

    def silent_seconds(self, now: float) -> float:
        """Returns the time since the newest message; 0 before a run and after it."""
        return max(0.0, now - self.time) if self.started and not self.finished else 0.0

    def remaining_seconds(self, now: float) -> float | None:
        """Returns the time left of the worker with most left to do; None before the first layer is finished.

        Each worker's own pace counts, or that of all while it has finished no layer. The first layers of all workers end almost at once,
        so one pace for the whole ring would be wrong by the number of workers at first.
        """
        if self.finished:
            return 0.0
        workers = list(self.workers.values())
        num_finished = sum(worker.num_finished for worker in workers)
        if not num_finished:
            return None
        share = math.ceil((self.num_layers - self.num_done) / len(workers))
        of_all = sum(worker.finished_seconds for worker in workers) / num_finished
        left = [0.0]
        for worker in workers:
            if num_left := share if worker.layers_left is None else len(worker.layers_left):
                own = worker.finished_seconds / worker.num_finished if worker.num_finished else of_all
                left.append(num_left * own - (now - worker.layer_began))
        return max(left)


def resolve(kind: Kind) -> Kind:
    """Returns what `auto` stands for: the live display on a terminal, else plain lines."""
    return kind if kind != "auto" else "rich" if sys.stderr.isatty() else "plain"


@contextmanager
def renderer(kind: Kind = "auto", now: Callable[[], float] = time.time) -> Iterator[Listen]:
    """Yields the function that shows messages: `with renderer("plain") as listen: listen(message)`.

    Args:
        kind: How they are shown.
        now: The present by the clock of the run, in seconds since 1970. Calls of `listen` must not overlap.
    """
    kind, state = resolve(kind), RunState()
    if kind == "rich":
        with _live(state, now) as listen:
            yield listen
        return

    def show(message: Message) -> None:
        if kind == "json":
            origin = {"event": type(message.event).__name__, "time": message.time, "worker": message.worker}
            print(strict_json({**origin, **asdict(message.event)}), flush=True)
            return
        state.observe(message)
        if (line := _line(state, message)) is not None:
            print(line, file=sys.stderr, flush=True)

    yield show


@contextmanager
def _live(state: RunState, now: Callable[[], float]) -> Iterator[Listen]:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

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
    """Returns the plain line for a message, None for those that get none. It names the worker where there are several."""
    event, several = message.event, len(state.workers) > 1
    worker = "a worker" if message.worker is None else f"worker {message.worker}"
    by = f" ({worker})" if several and message.worker is not None else ""
    match event:
        case ev.RunStarted():
            earlier = f", {event.num_finished_layers} finished before" if event.num_finished_layers else ""
            workers = f", {event.num_workers} workers ({event.backend})" if event.num_workers > 1 else ""
            work = f"{event.num_layers} layers{earlier}, {event.num_tokens:,} tokens on {event.device}{workers}"
            return f"{event.model} -> {event.output}: {work}"
        case ev.WorkerStarted() if several:
            return f"{worker} started on {event.host}, {event.device}, with {len(event.layers)} layers"
        case ev.LayerFinished():
            spent = show_seconds(sum(event.record.seconds.values()))
            eta = _show_eta(state.remaining_seconds(message.time))
            where = f"  (layer {event.layer}, {worker})" if by else ""
            done = f"layer {state.num_done}/{state.num_layers}"
            return f"{done}  {spent}{_worst_linear(event.record)}  eta {eta}{where}"
        case ev.LayerForwarded():
            return f"layer {event.layer} was finished before, only its outputs were computed again{by}"
        case ev.WorkerLost():
            return f"{worker} was lost ({event.reason}); continuing, restart {event.restart} of {event.max_restarts}"
        case ev.Warned():
            return f"warning: {event.message}{by}"
        case ev.RunFinished():
            over = ""
            if event.floor_seconds > 0:
                over = f", {event.seconds / event.floor_seconds:.2f}x one forward pass with reading and writing"
            size = show_bytes(event.output_bytes)
            return f"finished in {show_seconds(event.seconds)}{over}: {size} in {event.output}"
    return None


def _worst_linear(record: LayerRecord) -> str:
    """Returns `  down_proj error 0.0123 -> 0.0045`: the linear with the largest error, rounded to nearest and as written."""
    if not record.linears:
        return ""
    worst = max(record.linears, key=lambda x: (not math.isfinite(x.relative_error), x.relative_error))
    name = worst.name.rpartition(".")[2]
    return f"  {name} error {show_number(worst.relative_error_nearest)} -> {show_number(worst.relative_error)}"


def _show_eta(seconds: float | None) -> str:
    """Returns `75 s`, `12 min` or `1.5 h`, for times that change while one looks."""
    if seconds is None:
        return MISSING
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def silence(seconds: float) -> str:
    """Returns what is said after so many seconds without a message."""
    return f"no news for {_show_eta(seconds)}: the run is stuck, was stopped, or cannot reach this folder"


def display(state: RunState, now: float, width: int) -> RenderableType:
    """Returns the live display: a bar over the run's layers, and one line per worker. Rich calls it from its own thread.

    Args:
        state: Of the run.
        now: The present by the clock of the run, in seconds since 1970.
        width: Columns of the terminal.
    """
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    run = state.started
    if run is None:
        return Text("waiting for the run to begin", style="dim")
    workers = f", {run.num_workers} workers ({run.backend})" if run.num_workers > 1 else ""
    bar = ProgressBar(total=max(state.num_layers, 1), completed=state.num_done, width=30)
    ends = "finished" if state.finished else f"eta {_show_eta(state.remaining_seconds(now))}"
    lost = state.lost
    restarts = Text("" if lost is None else f"restart {lost.restart} of {lost.max_restarts}", style="red")
    count = Text(f"{state.num_done}/{state.num_layers} layers", style="bold")
    head = Table.grid(padding=(0, 2))
    head.add_row(count, bar, show_seconds(state.elapsed_seconds(now)), ends, restarts)
    table = _worker_table(state.by_number(), now, width)
    parts: list[RenderableType] = [Text(f"{run.model} on {run.device}{workers}"), head, table]
    memory = max((w.peak_memory_bytes for w in state.by_number()), default=0)
    device = max((w.peak_device_memory_bytes for w in state.by_number()), default=0)
    if peaks := f"peak memory {show_bytes(memory)}" if memory else "":
        parts.append(Text(peaks + (f"   peak GPU memory {show_bytes(device)}" if device else ""), style="dim"))
    if (silent := state.silent_seconds(now)) > LONG_SILENCE_S:
        parts.append(Text(silence(silent), style="bold red"))
    return Group(*parts)


def _worker_table(workers: list[WorkerState], now: float, width: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    cells = _fitting(_cells(workers, now), width)
    styles = {"stage": "cyan", "background": "dim", "searched": "green"}
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="dim")
    for name in cells:
        figures = name in ("layer", "for", "tokens/s", "memory", "GPU")
        table.add_column(name, justify="right" if figures else "left", no_wrap=name != "searched")
    for row, worker in enumerate(workers):
        texts = [
            Text(column[row], styles.get(name, ""), no_wrap=True, overflow="ellipsis") for name, column in cells.items()
        ]
        table.add_row(*texts, style="red" if worker.stage == "lost" else "")
    return table


def _cells(workers: list[WorkerState], now: float) -> dict[str, list[str]]:
    """Returns the columns by their names, a cell per worker."""
    several_hosts = len({worker.host for worker in workers}) > 1
    return {
        "worker": [str(w.number) if len(workers) > 1 else "" for w in workers],
        "host": [w.host if several_hosts else "" for w in workers],
        "layer": ["" if w.layer is None else str(w.layer) for w in workers],
        "stage": [
            f"forward {w.chunk}/{w.num_chunks}" if w.stage == "forward" and w.num_chunks else w.stage for w in workers
        ],
        "for": ["" if w.stage in ("lost", "done") else _show_eta(max(0.0, now - w.since)) for w in workers],
        "background": [", ".join(f"{stage} {layer}" for stage, layer in list(w.background.items())) for w in workers],
        "tokens/s": ["" if w.tokens_per_second is None else f"{w.tokens_per_second:,.0f}" for w in workers],
        "memory": ["" if w.status is None else show_bytes(w.status.memory_bytes) for w in workers],
        "GPU": ["" if w.status is None else _gpu(w.status) for w in workers],
        "searched": [_search(w.mapping) for w in workers],
    }


def _fitting(cells: dict[str, list[str]], width: int) -> dict[str, list[str]]:
    """Returns the columns without empty ones, and without those that a narrow terminal has no room for."""
    shown = {name: column for name, column in cells.items() if any(column) or name in ("layer", "background")}
    widths = {name: max(len(name), *map(len, column)) + _GAP for name, column in shown.items()}
    widths["searched"] = _LEAST_SEARCHED  # it may be cut
    for name in ("searched", "background", "for", "host"):
        if sum(widths[name] for name in shown) - _GAP > width:
            shown.pop(name, None)
    return shown


def _gpu(status: ev.WorkerStatus) -> str:
    """Returns memory and use of a GPU; nothing for a CPU."""
    use = "" if status.device_utilization is None else f" {status.device_utilization:3} %"
    return f"{show_bytes(status.device_memory_bytes)}{use}" if status.device_memory_bytes or use else ""


def _search(found: MappingRecord | None) -> str:
    if found is None:
        return ""
    names = list(dict.fromkeys(pattern_of(name).rpartition(".")[2] for name in found.balance_layers))
    ratio = "identity" if found.ratio is None else f"ratio {found.ratio:.2f}"
    return f"{', '.join(names)}: {show_number(found.error_before)} -> {show_number(found.error_after)} ({ratio})"
