"""Makes the charts of `report.html` from the layers' records: errors, ratios, outliers, tokens, time.

Charts are the dictionaries that `Plotly.newPlot` takes, because plotly's Python classes cost seconds of import. What all charts share
stands in `report.html.j2`. Colors are CSS variables that the page resolves, for light and dark.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from awqdist.layer.records import FEW_TOKENS, STAGES, BlockTokens, RunSummary, SiteRecord, tokens_of_experts
from awqdist.report import tables
from awqdist.units import pattern_of

_ONE_PASS = "read", "forward", "write"
_STACKED = (*_ONE_PASS, *(stage for stage in STAGES if stage not in _ONE_PASS))

Item = tuple[str, int, Any]  # label, layer, record
Combine = Callable[[Any], float]
Series = dict[str, list[float | None]]  # by label; one value per layer of the run


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart: `data` and `layout` go to Plotly.newPlot; height in pixels."""

    data: list[dict[str, Any]]
    layout: dict[str, Any]
    title: str = ""
    height: int = 340


def charts_of(summary: RunSummary) -> dict[str, list[Chart]]:
    """Returns the charts by the section of the page that shows them."""
    labels = tables.run_labels(summary)
    layers = summary.layers
    mappings = [(tables.mapping_label(mapping, labels), x.layer, mapping) for x in layers for mapping in x.mappings]
    linears = [(labels[pattern_of(linear.name)], x.layer, linear) for x in layers for linear in x.linears]
    sites = [(_site_label(site, labels), x.layer, site) for x in layers for site in x.sites]

    before = _series(summary, mappings, lambda mapping: mapping.error_before, math.fsum)
    after = _series(summary, mappings, lambda mapping: mapping.error_after, math.fsum)
    pairs = {label: {"unsmoothed": before[label], "smoothed": after[label]} for label in before}
    ratios = _series(summary, mappings, lambda mapping: mapping.ratio, median)
    identities = [
        (record.layer, label)
        for label in after
        for record, ratio, error in zip(layers, ratios[label], after[label], strict=True)
        if ratio is None and error is not None
    ]
    clipped = _series(summary, linears, lambda linear: linear.clipped_share, fmean)
    counts = [("tokens", layer, site) for _, layer, site in sites if site.expert is None]
    spread: dict[str, Combine] = {"fewest": min, "median": median, "most": max}
    tokens = {name: _series(summary, counts, lambda x: x.num_tokens, how) for name, how in spread.items()}
    return {
        "errors": [_lines(summary, pair, title=label, height=270) for label, pair in pairs.items()],
        "ratios": [_heat_map(summary, ratios, 1.0, identities)],
        "written": [_lines(summary, _series(summary, linears, lambda linear: linear.relative_error, max))],
        "clipped": [_heat_map(summary, clipped, max((x for row in clipped.values() for x in row if x), default=1.0))],
        "outliers": [_lines(summary, _series(summary, sites, lambda site: site.max_over_median, max))],
        "time": [_time_by_layer(summary), _time_in_all(summary)],
        "tokens": [_lines(summary, {name: found.get("tokens", []) for name, found in tokens.items()})],
        "experts": _tokens_of_experts(summary),
    }


def _tokens_of_experts(summary: RunSummary) -> list[Chart]:
    """Returns the tokens of the least, the median and the most used expert by layer. No token at all is drawn as a half."""
    blocks = [("", block.layer, block) for block in tokens_of_experts(summary.layers)]
    if not blocks:
        return []
    ways: dict[str, tuple[Callable[[BlockTokens], float], Combine]] = {
        "most": (lambda block: block.most or 0.5, max),
        "median": (lambda block: block.median or 0.5, median),
        "fewest": (lambda block: block.fewest or 0.5, min),
        f"few ({FEW_TOKENS})": (lambda block: FEW_TOKENS, min),
    }
    return [_lines(summary, {name: _series(summary, blocks, *way)[""] for name, way in ways.items()})]


def _site_label(site: SiteRecord, labels: dict[str, str]) -> str:
    patterns = map(pattern_of, site.linears)
    return ", ".join(dict.fromkeys(labels.get(pattern, pattern) for pattern in patterns))


def _series(summary: RunSummary, items: list[Item], value: Callable[[Any], float | None], combine: Combine) -> Series:
    """Returns one value for each label and layer, combined where they share both (experts), None where there is none."""
    groups: dict[str, dict[int, list[float]]] = {}
    for label, layer, record in items:
        found = value(record)
        values = groups.setdefault(label, {}).setdefault(layer, [])
        values += [found] if found is not None and math.isfinite(found) else []
    return {
        label: [float(f"{combine(at[x.layer]):.5g}") if at.get(x.layer) else None for x in summary.layers]
        for label, at in groups.items()
    }


def _plot_text(label: str) -> str:
    """Returns the label in short lines, escaped."""
    return "<br>".join(html.escape(line) for line in textwrap.wrap(label, 40, break_long_words=False))


def _lines(summary: RunSummary, series: Series, *, title: str = "", height: int = 360) -> Chart:
    """Returns one line for each label over the layers, on a logarithmic axis."""
    layers = [record.layer for record in summary.layers]
    data = [
        {
            "name": _plot_text(label),
            "x": layers,
            "y": [value if value and value > 0 else None for value in values],
            "line": {"color": f"var(--series-{number % 8 + 1})", "dash": ("solid", "dot", "dash")[number // 8 % 3]},
            "marker": {"size": 5 if len(layers) <= 40 else 3},
        }
        for number, (label, values) in enumerate(series.items())
    ]
    layout = {"xaxis": _layer_axis(summary), "yaxis": {"type": "log"}, "hovermode": "x unified"}
    return Chart(data, layout, title, height)


def _heat_map(summary: RunSummary, series: Series, top: float, marked: Sequence[tuple[int, str]] = ()) -> Chart:
    """Returns one row for each label, colored from 0 to `top`, with a cross at each (layer, label) of `marked`."""
    layers, labels = [record.layer for record in summary.layers], [_plot_text(label) for label in series]
    cells = {"type": "heatmap", "x": layers, "y": labels, "z": list(series.values()), "zmax": top}
    crosses = {
        "mode": "markers",
        "x": [layer for layer, _ in marked],
        "y": [_plot_text(label) for _, label in marked],
        "marker": {"symbol": "x-thin", "size": 6, "line": {"width": 1.5, "color": "var(--muted)"}},
        "hovertemplate": "layer %{x}<br>%{y}<br>identity<extra></extra>",
        "showlegend": False,
    }
    layout = {"xaxis": _layer_axis(summary), "yaxis": {"autorange": "reversed", "type": "category"}}
    return Chart(
        [cells, crosses],
        layout,
        height=110 + len(labels) * max(32, *(18 + 16 * label.count("<br>") for label in labels), 0),
    )


def _layer_axis(summary: RunSummary) -> dict[str, Any]:
    layers = [record.layer for record in summary.layers] or [0]
    step = next((step for step in (1, 2, 5, 10, 20) if len(layers) <= 16 * step), 50)
    return {"title": {"text": "layer"}, "range": [min(layers) - 0.5, max(layers) + 0.5], "dtick": step, "tick0": 0}


def _time_by_layer(summary: RunSummary) -> Chart:
    """Returns the stages stacked, those of one forward pass with reading and writing at the bottom."""
    layers = [record.layer for record in summary.layers]
    data = [_bar(stage, x=layers, y=[x.seconds.get(stage, 0.0) for x in summary.layers]) for stage in _STACKED]
    layout = {"barmode": "stack", "xaxis": _layer_axis(summary), "yaxis": {"ticksuffix": " s"}, "bargap": 0.15}
    return Chart(data, layout, "By layer")


def _time_in_all(summary: RunSummary) -> Chart:
    """Compares one forward pass, all stages, and the clock: several workers are faster than the sum of their stages."""
    rows = ["one pass", "all stages", "clock"]
    in_layers = {stage: math.fsum(x.seconds.get(stage, 0.0) for x in summary.layers) for stage in STAGES}
    around = {stage: value for stage, value in summary.seconds.items() if stage != "total"}
    data = []
    for stage in dict.fromkeys([*_STACKED, *around]):
        spent = in_layers.get(stage, 0.0) + around.get(stage, 0.0)
        one_pass = in_layers[stage] / summary.num_workers if stage in _ONE_PASS else None
        data.append(_bar(stage, y=rows, x=[one_pass, spent, None], orientation="h"))
    data.append(_bar("total", y=rows, x=[None, None, summary.seconds.get("total")], orientation="h", showlegend=False))
    layout = {"barmode": "stack", "xaxis": {"ticksuffix": " s"}, "yaxis": {"autorange": "reversed"}}
    return Chart(data, layout, "The whole run", 250)


def _bar(stage: str, **trace: Any) -> dict[str, Any]:
    return {"type": "bar", "name": _plot_text(stage), "marker": {"color": f"var(--stage-{stage})"}, **trace}
