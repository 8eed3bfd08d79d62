"""The timeline of `report.html`: a lane per worker, in which bars show what it worked on, and the background where it was idle.

Reading and writing overlap the rest of a worker's work, so they are thin bars below it. Spans come from `intervals.py`, merged so
that the page stays small however many chunks a run had.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from awqdist.report.charts import Chart, plot_text
from awqdist.report.intervals import Lane, Timeline
from awqdist.units import show_percent, show_seconds

# kind -> (name, offset from the middle of the lane, thickness); lanes are 1 apart, counted downward
BARS = {
    "forward": ("forward", -0.4, 0.5),
    "search": ("search, check, round", -0.4, 0.5),
    "read": ("read", 0.14, 0.11),
    "write": ("write", 0.27, 0.11),
}
COLUMNS = ("Forward", "Search, check, round", "Read", "Write", "Idle", "Computed")
_NUM_DIGITS = 5  # of a time, by the run's whole length


@dataclass(frozen=True, slots=True)
class LaneRow:
    """A worker as the page shows it. figures: one for each of COLUMNS."""

    worker: int
    host: str
    device: str
    num_layers: int
    figures: tuple[str, ...]


def lane_rows(times: Timeline) -> list[LaneRow]:
    """One row per worker."""
    return [
        LaneRow(lane.worker, lane.host, lane.device, lane.num_layers, _figures(lane, times.wall_seconds))
        for lane in times.lanes
    ]


def _figures(lane: Lane, wall_seconds: float) -> tuple[str, ...]:
    idle = max(0.0, wall_seconds - lane.busy_seconds)
    return (*(show_seconds(lane.seconds(kind)) for kind in BARS), show_seconds(idle), show_percent(lane.utilization))


def timeline_chart(times: Timeline) -> Chart:
    """Lanes from the top, time from the left, in seconds, minutes or hours."""
    unit, length = _unit(times.wall_seconds)
    names = [plot_text(_lane_name(lane, times)) for lane in times.lanes]
    layout = {
        "barmode": "overlay",
        "hovermode": "closest",
        "xaxis": {"ticksuffix": f" {unit}", "range": [0, times.wall_seconds / length]},
        "yaxis": {
            "tickvals": list(range(len(names))),
            "ticktext": names,
            "range": [len(names) - 0.5, -0.5],
            "showgrid": False,
        },
    }
    data = [_idle(times, length), *(_bars(times, kind, length) for kind in BARS), *_losses(times, length)]
    return Chart(data, layout, height=95 + max(26, min(52, 720 // max(len(names), 1))) * len(names))


def _unit(seconds: float) -> tuple[str, float]:
    """Of the axis, and its seconds."""
    if seconds < 600:
        return "s", 1.0
    return ("min", 60.0) if seconds < 4 * 3600 else ("h", 3600.0)


def _lane_name(lane: Lane, times: Timeline) -> str:
    host = f" · {lane.host}" if len({x.host for x in times.lanes}) > 1 else ""
    return f"worker {lane.worker}{host} · {100 * lane.utilization:.0f} %"


def _idle(times: Timeline, length: float) -> dict[str, Any]:
    """The whole lane of every worker, behind its bars."""
    lanes = range(len(times.lanes))
    return {
        "type": "bar",
        "name": "idle",
        "orientation": "h",
        "y": list(lanes),
        "x": [times.wall_seconds / length for _ in lanes],
        "offset": -0.4,
        "width": 0.5,
        "marker": {"color": "var(--lane)"},
        "hoverinfo": "skip",
    }


def _bars(times: Timeline, kind: str, length: float) -> dict[str, Any]:
    """All spans of one kind, of all workers."""
    name, offset, width = BARS[kind]
    found = [(place, span) for place, lane in enumerate(times.lanes) for span in lane.spans if span.kind == kind]
    digits = _NUM_DIGITS - len(str(int(times.wall_seconds / length)))
    return {
        "type": "bar",
        "name": plot_text(name),
        "orientation": "h",
        "y": [place for place, _ in found],
        "base": [round(span.start / length, digits) for _, span in found],
        "x": [round((span.end - span.start) / length, digits) for _, span in found],
        "offset": offset,
        "width": width,
        "marker": {"color": f"var(--stage-{kind})", "line": {"width": 0}},
        "customdata": [[span.layer, show_seconds(span.busy_seconds)] for _, span in found],
        "hovertemplate": f"layer %{{customdata[0]}}<br>{plot_text(name)}, %{{customdata[1]}}<extra></extra>",
    }


def _losses(times: Timeline, length: float) -> list[dict[str, Any]]:
    """A cross on the lane of every worker that was lost, when it was; on the first lane if it is not known which."""
    if not times.losses:
        return []
    places = {lane.worker: place for place, lane in enumerate(times.lanes)}
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "lost",
            "x": [loss.time / length for loss in times.losses],
            "y": [places.get(loss.worker, 0) - 0.15 if loss.worker is not None else -0.15 for loss in times.losses],
            "marker": {
                "symbol": "x",
                "size": 10,
                "color": "var(--lost)",
                "line": {"width": 1.5, "color": "var(--card)"},
            },
            "customdata": [plot_text(loss.reason) for loss in times.losses],
            "hovertemplate": "lost: %{customdata}<extra></extra>",
        }
    ]
