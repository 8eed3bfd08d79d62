"""The renderers of `awqdist.cli.progress`, fed with the events of a small run of two layers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from typing import get_args

import pytest

from awqdist.cli.progress import renderer, strict_json
from awqdist.run import events
from awqdist.run.records import LayerRecord, LinearRecord, MappingRecord

MAPPING = MappingRecord("model.layers.0.norm", ("model.layers.0.mlp.down_proj",), 0.5, True, 2.0, 1.0, 0)


def layer_record(layer: int, relative_error: float = 0.0045) -> LayerRecord:
    quiet = LinearRecord(f"model.layers.{layer}.mlp.up_proj", (8, 8), 4, 8, False, 0.002, 0.001, 0.0, 0)
    worst = LinearRecord(f"model.layers.{layer}.mlp.down_proj", (8, 8), 4, 8, False, 0.0123, relative_error, 0.1, 0)
    seconds = {"read": 0.3, "forward": 10.0, "search": 2.0}
    return LayerRecord(layer, "f", 9, "0", 0, 1e-6, (MAPPING,), (quiet, worst), (), (), seconds, 1024)


def events_of_a_run(*, num_layers: int = 2, num_finished_layers: int = 0) -> list[events.Event]:
    """Every kind of event; `num_finished_layers` are of an earlier run."""
    run: list[events.Event] = [events.RunStarted("model", "out", "cpu", num_layers, num_finished_layers, 4096)]
    run += [events.LayerForwarded(layer) for layer in range(num_finished_layers)]
    for layer in range(num_finished_layers, num_layers):
        run += [events.StageStarted(layer, "forward"), events.ChunkForwarded(layer, 0, 2, 2048)]
        run += [events.ChunkForwarded(layer, 1, 2, 2048), events.StageStarted(layer, "search")]
        run += [events.MappingSearched(layer, MAPPING), events.LayerFinished(layer, layer_record(layer))]
    return [*run, events.Warned("[bold]few tokens"), events.RunFinished("out", 30.0, 10.0, 2048)]


def render(kind: str, run: list[events.Event]) -> None:
    with renderer(kind) as emit:  # type: ignore[arg-type]
        for event in run:
            emit(event)


def test_json_writes_one_object_per_event_with_its_class_its_time_and_all_its_fields(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = events_of_a_run(num_layers=3, num_finished_layers=1)
    assert {type(event) for event in run} == set(get_args(events.Event))
    render("json", run)
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert not err
    assert [line["event"] for line in lines] == [type(event).__name__ for event in run]
    assert all(set(line) == {"event", "time", *(f.name for f in fields(e))} for line, e in zip(lines, run, strict=True))
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    finished = next(line for line in lines if line["event"] == "LayerFinished")
    assert LayerRecord.from_json(finished["record"]) == layer_record(1)


def test_json_writes_null_for_numbers_that_are_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    render(
        "json", [events.LayerFinished(0, layer_record(0, float("nan"))), events.RunFinished("o", float("inf"), 0, 0)]
    )

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    first, second = (json.loads(line, parse_constant=refuse) for line in capsys.readouterr().out.splitlines())
    assert first["record"]["linears"][1]["relative_error"] is None
    assert second["seconds"] is None
    assert strict_json({"a": (float("-inf"), 1.5)}) == '{"a":[null,1.5]}'


def test_plain_writes_one_line_per_finished_layer_with_count_time_worst_linear_and_eta(
    capsys: pytest.CaptureFixture[str],
) -> None:
    render("plain", events_of_a_run())
    out, err = capsys.readouterr()
    assert not out
    start, first, second, warning, end = err.splitlines()
    assert start == "model -> out: 2 layers, 4,096 tokens on cpu"
    assert re.fullmatch(r"layer 1/2  12\.3 s  down_proj error 0\.0123 -> 0\.0045  eta \d+ s", first)
    assert second.startswith("layer 2/2")
    assert second.endswith("eta 0 s")
    assert warning == "warning: [bold]few tokens"
    assert end == "finished in 30.0 s, 3.00 times the floor: 2.0 KiB in out"


def test_plain_counts_the_layers_of_an_earlier_run_as_done(capsys: pytest.CaptureFixture[str]) -> None:
    render("plain", events_of_a_run(num_layers=4, num_finished_layers=2))
    lines = capsys.readouterr().err.splitlines()
    assert "2 finished before" in lines[0]
    assert [line.split("  ")[0] for line in lines if re.match(r"layer \d/", line)] == ["layer 3/4", "layer 4/4"]


def test_plain_names_the_linear_whose_error_is_not_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    render("plain", [events.LayerFinished(0, layer_record(0, float("nan")))])
    assert "down_proj error 0.0123 -> nan" in capsys.readouterr().err


def test_auto_is_plain_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    render("auto", events_of_a_run())
    assert "layer 1/2  " in capsys.readouterr().err


def test_rich_shows_layers_chunks_mapping_and_memory_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    render("rich", events_of_a_run()[:6])  # within the first layer
    out, err = capsys.readouterr()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err)
    assert not out
    for part in ("0/2 layers", "layer 0", "search", "chunk 2/2", "down_proj: 2 -> 1 (ratio 0.50)", "tokens/s", "peak"):
        assert part in text


def test_rich_prints_warnings_as_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    render("rich", events_of_a_run())
    err = capsys.readouterr().err
    assert "warning: [bold]few tokens" in err
    assert "2/2 layers" in err


def test_plain_progress_imports_neither_rich_nor_torch() -> None:
    program = (
        "import sys; from awqdist.cli.progress import renderer\n"
        "with renderer('plain') as emit: pass\n"
        "print([name for name in ('rich', 'torch', 'plotly', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
