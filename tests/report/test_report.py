"""The page and the table of a finished run, for runs of every size and with hostile or broken data."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.ring_messages import EPOCH, ring, write_log

from awqdist.layer.records import LayerRecord, LinearRecord, MappingRecord, RunSummary, SiteRecord, SkippedMapping
from awqdist.report.report import TRACE_FILE, render_report, write_report
from awqdist.report.tables import mapping_rows, skipped_rows, summary_table, worst_linears
from awqdist.report.trace import chrome_trace
from awqdist.run.events import Message, WorkerLost, WorkerStarted, encode
from awqdist.units import show_layers

NAN = float("nan")


def layer_record(layer: int, *, num_experts: int = 0) -> LayerRecord:
    """A layer with two mappings, or one more for every expert; the first mapping of layer 0 stays unsmoothed."""
    at = f"model.layers.{layer}."
    pairs = [(at + "norm", at + "attn.q_proj"), (at + "mlp.up_proj", at + "mlp.down_proj")]
    pairs += [(f"{at}mlp.experts.{e}.up_proj", f"{at}mlp.experts.{e}.down_proj") for e in range(num_experts)]
    mappings = tuple(
        MappingRecord(smooth, (balance,), None if layer == 0 and number == 0 else 0.5, True, 4.0, 3.0, 0)
        for number, (smooth, balance) in enumerate(pairs)
    )
    linears = tuple(
        LinearRecord(balance, (64, 128), 4, 32, False, 0.02, 0.01 + layer / 1000, 0.25, 0) for _, balance in pairs
    )
    sites = tuple(SiteRecord((balance,), 4096 - 10 * number, 12.0) for number, (_, balance) in enumerate(pairs))
    skipped = (SkippedMapping(f"{at}attn.v_proj -> {at}attn.o_proj", f"layer {layer}: widths differ"),)
    seconds = {"read": 1.0, "forward": 2.0, "search": 3.0, "round": 1.0, "check": 0.5, "write": 1.0}
    return LayerRecord(layer, "f", 9, "0", 0, 1e-6, mappings, linears, sites, skipped, seconds, 2**30)


def run_summary(num_layers: int = 8, *, num_experts: int = 0, **changes: Any) -> RunSummary:
    layers = tuple(layer_record(layer, num_experts=num_experts) for layer in range(num_layers))
    summary = RunSummary(
        model="org/tiny",
        output="/out",
        architecture="TinyForCausalLM",
        device="cpu",
        recipe="bits: 4\n",
        num_calibration_samples=16,
        sequence_length=256,
        num_workers=1,
        layers=layers,
        seconds={"start": 1.0, "embed": 0.5, "merge": 0.5, "total": 8.5 * num_layers + 2},
        source_bytes=4 * 2**20,
        output_bytes=2**20,
        ignored=("lm_head",),
        warnings=("few tokens",),
        bytes_read={0: 3 * 2**20, 1: 2**20, None: 2**20},
    )
    return replace(summary, **changes)


def broken(record: LayerRecord, value: float) -> LayerRecord:
    """The same layer with `value` in place of every figure that can go wrong."""
    return replace(
        record,
        smoothing_error=value,
        mappings=tuple(replace(m, ratio=value, error_before=value, error_after=value) for m in record.mappings),
        linears=tuple(
            replace(x, relative_error=value, relative_error_nearest=value, clipped_share=value) for x in record.linears
        ),
        sites=tuple(replace(site, max_over_median=value) for site in record.sites),
    )


class Page(HTMLParser):
    """What a browser would take from the page: text, tags, links, and the charts' JSON."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())
        self.charts: dict[str, Any] = json.loads(self.scripts[1], parse_constant=pytest.fail)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        (self.scripts if self.tags and self.tags[-1] == "script" and data.strip() else self.words).append(data)


def printed(summary: RunSummary) -> str:
    console = Console(width=160, file=StringIO())
    console.print(summary_table(summary))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("num_layers", [0, 1, 8, 130])
def test_every_chart_of_the_page_has_a_place_and_a_point_per_layer(num_layers: int) -> None:
    page = Page(render_report(run_summary(num_layers)))
    assert set(page.charts) - set(page.ids) == (set() if num_layers else {"tokens-0"})
    if num_layers:
        for key in ("errors-0", "ratios-0", "written-0", "clipped-0", "outliers-0", "time-0", "tokens-0"):
            assert page.charts[key]["data"][0]["x"] == list(range(num_layers))


def test_the_page_loads_nothing_from_anywhere() -> None:
    text = render_report(run_summary())
    page = Page(text)
    assert page.links == []
    assert not {"link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert "default-src 'none'" in text
    assert "@import" not in text.partition("<script>")[0]


def test_the_page_tells_facts_recipe_warnings_mappings_and_reasons() -> None:
    text = Page(render_report(run_summary())).text
    for part in ("org/tiny", "TinyForCausalLM", "16 samples of 256 tokens", "bits: 4", "few tokens", "lm_head"):
        assert part in text
    assert "norm → q_proj 1 of 8 0.50 32 24 25.0 %" in text
    assert "layer *: widths differ 0-7" in text
    assert "16 linears in 8 layers" in text


def test_the_time_chart_compares_one_pass_with_all_stages_and_the_clock() -> None:
    summary = run_summary(2)
    bars = {bar["name"]: bar for bar in Page(render_report(summary)).charts["time-1"]["data"]}
    one_pass, spent, clock = (sum(bar["x"][row] or 0.0 for bar in bars.values()) for row in range(3))
    assert one_pass == pytest.approx(summary.floor_seconds)
    assert spent == pytest.approx(2 * 8.5 + 2.0)
    assert clock == pytest.approx(summary.seconds["total"])


def test_one_pass_is_shared_by_all_workers() -> None:
    """Two layers of 4 s each that cannot be done without, on 4 workers."""
    summary = run_summary(2, num_workers=4)
    bars = Page(render_report(summary)).charts["time-1"]["data"]
    assert sum(bar["x"][0] or 0.0 for bar in bars) == pytest.approx(summary.floor_seconds) == pytest.approx(2.0)


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_numbers_that_are_not_finite_leave_gaps_in_the_charts_and_break_nothing(value: float) -> None:
    summary = run_summary(3)
    summary = replace(summary, layers=(broken(summary.layers[0], value), *summary.layers[1:]))
    page = Page(render_report(summary))  # refuses NaN in the JSON
    assert page.charts["written-0"]["data"][0]["y"] == [None, 0.011, 0.012]
    assert page.charts["ratios-0"]["data"][0]["z"][0] == [None, 0.5, 0.5]
    assert str(value).lstrip("-") in printed(summary)


def test_a_mapping_that_stayed_unsmoothed_gets_a_cross_instead_of_a_ratio() -> None:
    cells, crosses = Page(render_report(run_summary(3))).charts["ratios-0"]["data"]
    assert cells["z"][0] == [None, 0.5, 0.5]
    assert (crosses["x"], crosses["y"]) == ([0], [cells["y"][0]])


@pytest.mark.parametrize("hostile", ["</script><b>x</b><img src=http://evil>", "<!--<script>", "\"'&{{ 7*7 }}\u2028"])
def test_hostile_text_stays_text(hostile: str) -> None:
    record = layer_record(0)
    record = replace(
        record,
        mappings=(replace(record.mappings[0], smooth_layer=hostile, balance_layers=(hostile,)),),
        linears=(replace(record.linears[0], name=hostile),),
        sites=(replace(record.sites[0], linears=(hostile,)),),
        skipped=(SkippedMapping(hostile, hostile),),
        seconds={**record.seconds, hostile: 1.0},
    )
    texts: dict[str, Any] = dict.fromkeys(("model", "output", "architecture", "device", "recipe"), hostile)
    summary = run_summary(layers=(record,), ignored=(hostile,), warnings=(hostile,), **texts)
    plain, page = Page(render_report(run_summary(1))), Page(render_report(summary))
    assert [page.tags.count(tag) for tag in ("script", "b", "img")] == [plain.tags.count("script"), 4, 0]
    assert page.links == []
    names = json.dumps([trace.get("name", "") for chart in page.charts.values() for trace in chart["data"]])
    assert "<b>" not in names
    assert "<img" not in names
    assert " ".join(hostile.split()) in page.text
    assert hostile.split()[0] in printed(summary)


def test_experts_share_one_row_and_one_line() -> None:
    summary = run_summary(4, num_experts=16)
    rows = {row.pattern: row for row in mapping_rows(summary)}
    assert list(rows) == ["norm → q_proj", "mlp.up_proj → mlp.down_proj", "experts.*.up_proj → experts.*.down_proj"]
    experts = rows["experts.*.up_proj → experts.*.down_proj"]
    assert (experts.num_mappings, experts.error_before, experts.error_after) == (64, 256.0, 192.0)
    charts = Page(render_report(summary)).charts
    assert len(charts["written-0"]["data"]) == 3
    assert [trace["y"][0] for trace in charts["tokens-0"]["data"]] == [3926, 4011, 4096]


def test_the_page_tells_the_tokens_of_experts_and_names_those_that_got_few() -> None:
    counts = {1: (700, 90, 0, 3), 2: (512, 128, 64, 256)}
    layers = [layer_record(0), *(with_experts(layer, tokens) for layer, tokens in counts.items())]
    page = Page(render_report(run_summary(layers=tuple(layers))))
    lines = {trace["name"]: trace["y"] for trace in page.charts["experts-0"]["data"]}
    assert lines == {
        "most": [None, 700, 512],
        "median": [None, 46.5, 192],
        "fewest": [None, 0.5, 64],
        "few (64)": [None, 64, 64],
    }
    assert "model.layers.*.mlp.experts 1 4 0 46 700 2 2 (0), 3 (3)" in page.text
    assert "model.layers.*.mlp.experts 2 4 64 192 512 0 –" in page.text
    assert "experts-0" in page.ids
    assert "experts-0" not in Page(render_report(run_summary(2))).charts


def with_experts(layer: int, tokens: tuple[int, ...]) -> LayerRecord:
    """A layer whose expert e was sent tokens[e], beside what all tokens go to."""
    name = "model.layers.{}.mlp.experts.{}.{}"
    shared = SiteRecord((f"model.layers.{layer}.mlp.gate",), 4096, 12.0)
    sites = [
        SiteRecord((name.format(layer, e, linear),), count, 12.0, e)
        for e, count in enumerate(tokens)
        for linear in ("up_proj", "down_proj")
    ]
    return replace(layer_record(layer), sites=(shared, *sites))


def test_tokens_are_one_sentence_where_all_linears_saw_the_same() -> None:
    summary = run_summary(2)
    layers = tuple(replace(x, sites=tuple(replace(s, num_tokens=4096) for s in x.sites)) for x in summary.layers)
    assert "saw the same 4,096 tokens" in Page(render_report(replace(summary, layers=layers))).text


def test_the_report_of_eight_layers_is_written_in_half_a_second(tmp_path: Path) -> None:
    render_report(run_summary(1))  # imports
    began = time.perf_counter()
    path = write_report(run_summary(8), tmp_path)
    assert time.perf_counter() - began < 0.5
    assert path == tmp_path / "report.html"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_the_page_has_the_workers_of_the_last_run_in_the_folder(tmp_path: Path) -> None:
    """The earlier run had one worker and was killed; the last had four, each of which computed 88 s of 101 s."""
    runs = [*ring(num_workers=1, begins=EPOCH - 1000)[:50], *ring()]
    write_log(tmp_path, runs, tail=encode(runs[0])[:30])
    page = Page(write_report(run_summary(16), tmp_path).read_text())
    assert "0 node-0 cuda:0 4 32.0 s 40.0 s 4.00 s 12.0 s 16.0 s 8.00 s 13.0 s 87.1 %" in page.text
    assert TRACE_FILE in page.text
    assert set(page.charts) <= set(page.ids)
    assert json.loads((tmp_path / TRACE_FILE).read_text()) == chrome_trace(ring())


def test_the_page_does_without_workers_where_no_events_are(tmp_path: Path) -> None:
    without = Page(write_report(run_summary(2), tmp_path).read_text())
    write_log(tmp_path, [], tail=b"not JSON\n")
    with_foreign_lines = Page(write_report(run_summary(2), tmp_path).read_text())
    for page in (without, with_foreign_lines):
        assert "Workers" not in page.text
    assert not (tmp_path / TRACE_FILE).exists()


@pytest.mark.parametrize("hostile", ["</script><b>x</b>", "<img src=http://evil>"])
def test_hostile_hosts_stay_text(hostile: str) -> None:
    started, lost = WorkerStarted(hostile, hostile, (0,)), WorkerLost(hostile, 1, 3)
    told = [*ring(num_workers=2), *(Message(event, 1, EPOCH + 9) for event in (started, lost))]
    plain, page = Page(render_report(run_summary(2))), Page(render_report(run_summary(2), told))
    assert [page.tags.count(tag) for tag in ("script", "b", "img")] == [plain.tags.count("script"), 4, 0]
    assert hostile in page.text
    assert hostile not in json.dumps(page.charts)


def test_the_table_tells_mappings_worst_linears_reasons_time_and_bytes() -> None:
    text = printed(run_summary(8))
    assert re.search(r"norm → q_proj +1 of 8 +0\.50 +32 +24 +25\.0 %", text)
    assert re.search(r"layer \*: widths differ +0-7", text)
    assert "8 layers in 1 min 10 s, 2.19x one forward pass with reading and writing (32.0 s)" in text
    assert "5.0 MiB read (source: 4.0 MiB), 1.0 MiB written to /out" in text
    assert "warning: few tokens" in text


def test_worst_linears_come_first_and_those_without_a_number_before_them() -> None:
    summary = run_summary(3)
    summary = replace(summary, layers=(broken(summary.layers[0], NAN), *summary.layers[1:]))
    names = [linear.name.split(".")[2] for linear in worst_linears(summary, 4)]
    assert names == ["0", "0", "2", "2"]


@pytest.mark.parametrize(("layers", "text"), [((), ""), ((3,), "3"), ((5, 0, 1, 2), "0-2, 5")])
def test_layers_are_shown_as_ranges(layers: tuple[int, ...], text: str) -> None:
    assert show_layers(layers) == text


def test_a_mapping_skipped_for_two_reasons_has_two_rows() -> None:
    other = replace(layer_record(1), skipped=(SkippedMapping("model.layers.1.attn.v_proj -> o", "no such module"),))
    rows = skipped_rows(run_summary(layers=(layer_record(0), other)))
    assert [(reason, layers) for _, reason, layers in rows] == [
        ("layer *: widths differ", (0,)),
        ("no such module", (1,)),
    ]


@pytest.mark.parametrize("show", [render_report, printed])
def test_a_run_without_measured_times_is_shown(show: Callable[[RunSummary], str]) -> None:
    summary = run_summary(2)
    bare = replace(summary, seconds={}, layers=tuple(replace(x, seconds={}) for x in summary.layers))
    assert "org/tiny" in show(bare) or "2 layers in –" in show(bare)
