"""Events of a run as a person or a machine watches them: a live display, plain lines, or lines of JSON.

Workers emit events and never print (`awqdist.run.events`); `renderer` gives the callable that they emit to. The live
display and the plain lines go to stderr, so that stdout stays free for results; JSON lines are a result: stdout.

`3/32` counts finished layers. A layer under way is called by its index, from 0, as in the names of its tensors.

Rich is imported by the live display alone, and torch by none: the worker that needs it may be another process.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from awqdist.cli.tables import pattern_of, show_bytes, show_number, show_seconds
from awqdist.run import events as ev
from awqdist.run.events import Emit, Event
from awqdist.run.records import LayerRecord, MappingRecord

if TYPE_CHECKING:
    from rich.console import RenderableType

Kind = Literal["auto", "rich", "plain", "json"]


def renderer(kind: Kind = "auto") -> AbstractContextManager[Emit]:
    """`with renderer("plain") as emit: emit(event)`. `auto` is the live display on a terminal, else plain lines."""
    if kind == "auto":
        kind = "rich" if sys.stderr.isatty() else "plain"
    return {"rich": _rich, "plain": _plain, "json": _json}[kind]()


def strict_json(value: Any) -> str:
    """JSON as every parser reads it: numbers that are not finite become null."""
    return json.dumps(_without_nonfinite(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(item) for item in value]
    return value


@dataclass(slots=True)
class LayerUnderWay:
    """A layer that has begun and not ended; a ring of workers has several."""

    layer: int
    stage: str = ""
    chunk: int = 0
    num_chunks: int = 0
    num_tokens: int = 0
    forward_began: float = field(default_factory=time.monotonic)
    mapping: MappingRecord | None = None
    num_mappings: int = 0


@dataclass(slots=True)
class RunState:
    """What the events so far add up to. `observe` is the only way in."""

    model: str = ""
    device: str = ""
    num_layers: int = 0
    num_done: int = 0  # by this run and by those before it
    num_done_now: int = 0
    tokens_per_second: float | None = None
    under_way: dict[int, LayerUnderWay] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    work_began: float = field(default_factory=time.monotonic)  # new layers, after the replay of finished ones
    last_done: float = 0.0

    def observe(self, event: Event) -> None:
        now = time.monotonic()
        match event:
            case ev.RunStarted():
                self.model, self.device, self.num_layers = event.model, event.device, event.num_layers
                self.num_done, self.began, self.work_began = event.num_finished_layers, now, now
            case ev.StageStarted():
                layer = self._layer(event.layer)
                layer.stage = event.stage
                if event.stage == "forward":
                    layer.forward_began, layer.num_tokens = now, 0
            case ev.ChunkForwarded():
                layer = self._layer(event.layer)
                layer.chunk, layer.num_chunks = min(event.chunk + 1, event.num_chunks), event.num_chunks
                layer.num_tokens += event.num_tokens
                self.tokens_per_second = layer.num_tokens / max(now - layer.forward_began, 1e-9)
            case ev.MappingSearched():
                layer = self._layer(event.layer)
                layer.mapping, layer.num_mappings = event.mapping, layer.num_mappings + 1
            case ev.LayerForwarded():
                self.under_way.pop(event.layer, None)
                self.work_began = now if not self.num_done_now else self.work_began
            case ev.LayerFinished():
                self.under_way.pop(event.layer, None)
                self.num_done, self.num_done_now, self.last_done = self.num_done + 1, self.num_done_now + 1, now

    def _layer(self, layer: int) -> LayerUnderWay:
        return self.under_way.setdefault(layer, LayerUnderWay(layer))

    def remaining_seconds(self) -> float | None:
        """From the pace of the layers that this run finished; None before the first."""
        if not self.num_done_now:
            return None
        per_layer = (self.last_done - self.work_began) / self.num_done_now
        return max(0.0, per_layer * (self.num_layers - self.num_done) - (time.monotonic() - self.last_done))


def _show_eta(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _worst_linear(record: LayerRecord) -> str:
    """`  down_proj error 0.0123 -> 0.0045`: the linear that lost most, rounded to nearest and as written."""
    if not record.linears:
        return ""
    worst = max(record.linears, key=lambda x: (not math.isfinite(x.relative_error), x.relative_error))
    name = worst.name.rpartition(".")[2]
    return f"  {name} error {show_number(worst.relative_error_nearest)} -> {show_number(worst.relative_error)}"


def _finished_line(state: RunState, record: LayerRecord) -> str:
    spent = show_seconds(sum(record.seconds.values()))
    eta = _show_eta(state.remaining_seconds())
    return f"layer {state.num_done}/{state.num_layers}  {spent}{_worst_linear(record)}  eta {eta}"


def _end_line(event: ev.RunFinished) -> str:
    over = f", {event.seconds / event.floor_seconds:.2f} times the floor" if event.floor_seconds > 0 else ""
    return f"finished in {show_seconds(event.seconds)}{over}: {show_bytes(event.output_bytes)} in {event.output}"


@contextmanager
def _plain() -> Iterator[Emit]:
    state = RunState()

    def emit(event: Event) -> None:
        state.observe(event)
        match event:
            case ev.RunStarted():
                earlier = f", {event.num_finished_layers} finished before" if event.num_finished_layers else ""
                work = f"{event.num_layers} layers{earlier}, {event.num_tokens:,} tokens on {event.device}"
                line = f"{event.model} -> {event.output}: {work}"
            case ev.LayerFinished():
                line = _finished_line(state, event.record)
            case ev.LayerForwarded():
                line = f"layer {event.layer} was finished before, only its outputs were computed again"
            case ev.Warned():
                line = f"warning: {event.message}"
            case ev.RunFinished():
                line = _end_line(event)
            case _:
                return
        print(line, file=sys.stderr, flush=True)

    yield emit


@contextmanager
def _json() -> Iterator[Emit]:
    def emit(event: Event) -> None:
        print(strict_json({"event": type(event).__name__, "time": time.time(), **asdict(event)}), flush=True)

    yield emit


@contextmanager
def _rich() -> Iterator[Emit]:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    state = RunState()
    console = Console(stderr=True, highlight=False)
    live = Live(get_renderable=lambda: _display(state), console=console, refresh_per_second=4, redirect_stdout=False)
    with live:

        def emit(event: Event) -> None:
            state.observe(event)
            if isinstance(event, ev.Warned):
                live.console.print(Text(f"warning: {event.message}", style="yellow"))
            elif isinstance(event, ev.RunFinished):
                live.stop()  # so that the line stands below the display, not above
                live.console.print(Text(_end_line(event), style="bold"))

        yield emit


def _display(state: RunState) -> RenderableType:
    """A bar over the run's layers, one line per layer under way, one line of memory. Called from rich's own thread."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(padding=(0, 2))
    eta = _show_eta(state.remaining_seconds())
    elapsed = show_seconds(time.monotonic() - state.began)
    bar = ProgressBar(total=max(state.num_layers, 1), completed=state.num_done, width=30)
    head.add_row(Text(f"{state.num_done}/{state.num_layers} layers", style="bold"), bar, elapsed, f"eta {eta}")
    lanes = Table.grid(padding=(0, 2))
    for lane in sorted(state.under_way.values(), key=lambda x: x.layer):
        chunk = f"chunk {lane.chunk}/{lane.num_chunks}" if lane.num_chunks else ""
        found = Text(_best_so_far(lane), style="green")
        lanes.add_row(Text(f"layer {lane.layer}"), Text(lane.stage, style="cyan"), chunk, found)
    pace = "" if state.tokens_per_second is None else f"forward {state.tokens_per_second:,.0f} tokens/s   "
    return Group(Text(f"{state.model} on {state.device}"), head, lanes, Text(pace + _memory(), style="dim"))


def _best_so_far(lane: LayerUnderWay) -> str:
    found = lane.mapping
    if found is None:
        return ""
    names = list(dict.fromkeys(pattern_of(name).rpartition(".")[2] for name in found.balance_layers))
    ratio = "identity" if found.ratio is None else f"ratio {found.ratio:.2f}"
    errors = f"{show_number(found.error_before)} -> {show_number(found.error_after)}"
    return f"{', '.join(names)}: {errors} ({ratio})"


def _memory() -> str:
    """Resident memory of this process, and CUDA's if this process already uses it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
    statm = Path("/proc/self/statm")
    now = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else peak
    text = f"memory {show_bytes(now)}, peak {show_bytes(max(now, peak))}"
    cuda: Any = sys.modules.get("torch.cuda")
    if getattr(cuda, "is_initialized", bool)():  # another thread may be in the midst of importing it
        text += f"   CUDA {show_bytes(cuda.memory_allocated())}, peak {show_bytes(cuda.max_memory_allocated())}"
    return text
