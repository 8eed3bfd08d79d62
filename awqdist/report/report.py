"""Writes `report.html`, one page that shows a whole run, from its summary and its log.

The page needs no network: plotly's JavaScript stands inside it, and a content security policy forbids every load. Its words stand in
`report.html.j2`. Names come from checkpoints and are escaped: text by jinja, JSON below, chart labels by `html.escape`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from awqdist import units
from awqdist.layer.records import FEW_TOKENS, RunSummary, tokens_of_experts
from awqdist.report import tables
from awqdist.report.charts import charts_of
from awqdist.report.trace import chrome_trace, worker_times
from awqdist.run.events import STATE_FOLDER, Message, last_run, log_file, read_log

TRACE_FILE = f"{STATE_FOLDER}/trace.json"


def render_report(summary: RunSummary, messages: Sequence[Message] = ()) -> str:
    """Returns the page.

    Args:
        summary: The records of the run.
        messages: Those of the run that ended it. Without them the page has no table of workers.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    charts = charts_of(summary)
    drawn = {
        f"{key}-{number}": {"data": chart.data, "layout": chart.layout}
        for key, group in charts.items()
        for number, chart in enumerate(group)
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=units.show_number, percent=units.show_percent, seconds=units.show_seconds)
    environment.filters.update(bytes=units.show_bytes, layers=units.show_layers, pattern=units.pattern_of)
    template = environment.from_string(files("awqdist.report").joinpath("report.html.j2").read_text("utf-8"))
    return template.render(
        summary=summary,
        tiles=_tiles(summary),
        facts=_facts(summary),
        charts=charts,
        workers=worker_times(messages),
        trace_file=TRACE_FILE,
        mappings=tables.mapping_rows(summary),
        mappings_by_layer=tables.mapping_rows(summary, by_layer=True),
        worst=tables.worst_linears(summary, 20),
        skipped=tables.skipped_rows(summary),
        ignored=Counter(map(units.pattern_of, summary.ignored)),
        blocks=tokens_of_experts(summary.layers),
        few_tokens=FEW_TOKENS,
        num_tokens=sorted(
            {site.num_tokens for record in summary.layers for site in record.sites if site.expert is None}
        ),
        chart_json=Markup(units.strict_json(drawn).replace("<", "\\u003c")),  # no `<` can end the <script>
        plotly_js=Markup(get_plotlyjs()),
    )


def write_report(summary: RunSummary, folder: Path) -> Path:
    """Writes `report.html` into the run's output folder, and the trace of its workers if its log lies there.

    Args:
        summary: The records of the run.
        folder: Its output folder.

    Returns:
        The path of the page, which is written whole or not at all.

    Raises:
        OSError: A file cannot be written.
    """
    messages = last_run(read_log(log_file(folder)).messages)
    if messages:
        (folder / TRACE_FILE).write_text(units.strict_json(chrome_trace(messages)), encoding="utf-8")
    unfinished = folder / "report.html.tmp"
    try:
        unfinished.write_text(render_report(summary, messages), encoding="utf-8")
        return unfinished.replace(folder / "report.html")
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def _tiles(summary: RunSummary) -> list[tuple[str, str, str]]:
    """Returns (caption, figure, small print) of what one looks for first."""
    reductions = [row.reduction for row in tables.mapping_rows(summary, by_layer=True)]
    linears = [linear for record in summary.layers for linear in record.linears]
    factor, share = tables.times_one_pass(summary), summary.output_bytes / max(summary.source_bytes, 1)
    over = "" if factor is None else f"{factor:.2f} × one forward pass with reading and writing"
    written = tables.finite_median(x.relative_error for x in linears)
    nearest = tables.finite_median(x.relative_error_nearest for x in linears)
    nearest_note = f"median linear; nearest: {units.show_number(nearest)}"
    return [
        ("Time", units.show_seconds(summary.seconds.get("total")), over),
        ("Size", units.show_bytes(summary.output_bytes), f"{units.show_percent(share)} of the source"),
        ("Error removed by smoothing", units.show_percent(tables.finite_median(reductions)), "median mapping"),
        ("Relative error as written", units.show_number(written), nearest_note),
    ]


def _facts(summary: RunSummary) -> dict[str, str]:
    linears = [linear for record in summary.layers for linear in record.linears]
    schemes = Counter(
        f"{x.num_bits} bit, group {x.group_size}, {'symmetric' if x.symmetric else 'asymmetric'}" for x in linears
    )
    changes = [(not math.isfinite(x.smoothing_error), x.smoothing_error, x.layer) for x in summary.layers]
    _, change, layer = max(changes, default=(False, 0.0, 0))
    by_worker = [f"{units.show_bytes(n)} by worker {w}" for w, n in summary.bytes_read.items() if w is not None]
    copied = units.show_bytes(summary.bytes_read.get(None, 0))
    return {
        "Read": ", ".join([*by_worker, f"{copied} by the leader, to copy what is in no layer"]),
        "Quantized": f"{len(linears):,} linears in {len(summary.layers)} layers; {len(summary.ignored):,} left out",
        "Weights": "; ".join(f"{scheme} ({count:,})" for scheme, count in schemes.items()),
        "Peak memory": units.show_bytes(max((x.peak_memory_bytes for x in summary.layers), default=0)),
        "Dead inputs": f"{sum(x.num_dead_inputs for x in linears):,} channels were always zero",
        "Check of smoothing": f"changed a layer's output by {units.show_number(change)} at most (layer {layer})",
    }
