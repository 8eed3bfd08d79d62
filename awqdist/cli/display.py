"""The live display of a run, drawn with rich from a `RunState`: a bar over the layers, and a row for every worker.

Rich is imported when something is drawn, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from awqdist.cli.run_state import RunState, WorkerState
from awqdist.layer.records import MappingRecord
from awqdist.run.events import WorkerStatus
from awqdist.units import pattern_of, show_bytes, show_number, show_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

LONG_SILENCE_S = 60  # workers tell their status every few seconds

_GAP = 2  # between columns
_LEAST_SEARCHED = 16  # columns of the terminal


def show_eta(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def silence(seconds: float) -> str:
    """What is said after `seconds` without a message."""
    return f"no news for {show_eta(seconds)}: the run is stuck, was stopped, or cannot reach this folder"


def display(state: RunState, now: float, width: int) -> RenderableType:
    """A bar over the run's layers, and one line per worker; width: of the terminal. Called from rich's own thread."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    run = state.started
    if run is None:
        return Text("waiting for the run to begin", style="dim")
    workers = f", {run.num_workers} workers ({run.backend})" if run.num_workers > 1 else ""
    bar = ProgressBar(total=max(state.num_layers, 1), completed=state.num_done, width=30)
    head = Table.grid(padding=(0, 2))
    ends = "finished" if state.finished else f"eta {show_eta(state.remaining_seconds(now))}"
    lost = state.lost
    restarts = Text("" if lost is None else f"restart {lost.restart} of {lost.max_restarts}", style="red")
    count = Text(f"{state.num_done}/{state.num_layers} layers", style="bold")
    head.add_row(count, bar, show_seconds(state.elapsed_seconds(now)), ends, restarts)
    parts: list[RenderableType] = [
        Text(f"{run.model} on {run.device}{workers}"),
        head,
        _worker_table(state.by_number(), now, width),
    ]
    parts += [Text(peaks, style="dim")] if (peaks := _peaks(state)) else []
    if (silent := state.silent_seconds(now)) > LONG_SILENCE_S:
        parts.append(Text(silence(silent), style="bold red"))
    return Group(*parts)


def _worker_table(workers: list[WorkerState], now: float, width: int) -> Table:
    """One row per worker."""
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
    """The columns by their names, a cell per worker."""
    several_hosts = len({worker.host for worker in workers}) > 1
    return {
        "worker": [str(w.number) if len(workers) > 1 else "" for w in workers],
        "host": [w.host if several_hosts else "" for w in workers],
        "layer": ["" if w.layer is None else str(w.layer) for w in workers],
        "stage": [_stage(w) for w in workers],
        "for": ["" if w.stage in ("lost", "done") else show_eta(max(0.0, now - w.since)) for w in workers],
        "background": [", ".join(f"{stage} {layer}" for stage, layer in list(w.background.items())) for w in workers],
        "tokens/s": ["" if w.tokens_per_second is None else f"{w.tokens_per_second:,.0f}" for w in workers],
        "memory": ["" if w.status is None else show_bytes(w.status.memory_bytes) for w in workers],
        "GPU": ["" if w.status is None else _gpu(w.status) for w in workers],
        "searched": [_search(w.mapping) for w in workers],
    }


def _fitting(cells: dict[str, list[str]], width: int) -> dict[str, list[str]]:
    """Without columns that would say nothing in the whole run, and those that a narrow terminal has no room for."""
    shown = {name: column for name, column in cells.items() if any(column) or name in ("layer", "background")}
    widths = {name: max(len(name), *map(len, column)) + _GAP for name, column in shown.items()}
    widths["searched"] = _LEAST_SEARCHED  # it may be cut
    for name in ("searched", "background", "for", "host"):
        if sum(widths[name] for name in shown) - _GAP > width:
            shown.pop(name, None)
    return shown


def _stage(worker: WorkerState) -> str:
    is_counted = worker.stage == "forward" and worker.num_chunks
    return f"forward {worker.chunk}/{worker.num_chunks}" if is_counted else worker.stage


def _gpu(status: WorkerStatus) -> str:
    """Memory and use of a GPU; nothing for a CPU."""
    use = "" if status.device_utilization is None else f" {status.device_utilization:3} %"
    return f"{show_bytes(status.device_memory_bytes)}{use}" if status.device_memory_bytes or use else ""


def _search(found: MappingRecord | None) -> str:
    if found is None:
        return ""
    names = list(dict.fromkeys(pattern_of(name).rpartition(".")[2] for name in found.balance_layers))
    ratio = "identity" if found.ratio is None else f"ratio {found.ratio:.2f}"
    errors = f"{show_number(found.error_before)} -> {show_number(found.error_after)}"
    return f"{', '.join(names)}: {errors} ({ratio})"


def _peaks(state: RunState) -> str:
    memory = max((w.peak_memory_bytes for w in state.by_number()), default=0)
    device = max((w.peak_device_memory_bytes for w in state.by_number()), default=0)
    text = f"peak memory {show_bytes(memory)}" if memory else ""
    return text + (f"   peak GPU memory {show_bytes(device)}" if device else "")
