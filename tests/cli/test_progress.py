"""The renderers of `awqdist.cli.progress` and the state that they show, fed with the messages of runs that never were."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from io import StringIO
from typing import get_args

import pytest
from pydantic import TypeAdapter
from rich.console import Console
from support.ring_messages import EPOCH, GIB, layer_record, mapping_record, ring

from awqdist.cli.progress import RunState, display, renderer
from awqdist.layer.records import LayerRecord
from awqdist.run import events
from awqdist.run.events import Message
from awqdist.units import strict_json


def messages_of_a_run(*, num_layers: int = 2, num_finished_layers: int = 0) -> list[Message]:
    """Every kind of event but a failure, of one worker, a second apart; `num_finished_layers` are of an earlier run."""
    told: list[events.Event] = [events.WorkerStarted("node", "cpu", tuple(range(num_layers)))]
    told += [events.WorkerStatus(3 * GIB, 0, None)]
    told += [events.LayerForwarded(layer) for layer in range(num_finished_layers)]
    for layer in range(num_finished_layers, num_layers):
        told += [events.StageStarted(layer, "forward"), events.ChunkForwarded(layer, 0, 2, 2048, 1.0)]
        told += [events.ChunkForwarded(layer, 1, 2, 2048, 1.0), events.StageStarted(layer, "search")]
        told += [events.MappingSearched(layer, mapping_record(layer)), events.StageEnded(layer, "search", 2.0)]
        told += [events.LayerFinished(layer, layer_record(layer))]
    told += [
        events.SnapshotSaved(num_layers, "file", "0"),
        events.OutsideCopied("file", 3, "0"),
        events.WorkerLost("out of memory", 1, 3),
    ]
    run = [Message(events.RunStarted("model", "out", "cpu", num_layers, num_finished_layers, 4096), None, EPOCH)]
    run += [Message(event, 0, EPOCH + 1 + second) for second, event in enumerate(told)]
    ends = [
        events.SourceRead(None, 1024),
        events.Warned("[bold]few tokens"),
        events.RunFinished("out", 30.0, 10.0, 2048),
    ]
    return [*run, *(Message(event, None, EPOCH + 60) for event in ends)]


def render(kind: str, run: list[Message]) -> None:
    with renderer(kind) as listen:  # type: ignore[arg-type]
        for message in run:
            listen(message)


def state_after(run: list[Message]) -> RunState:
    state = RunState()
    for message in run:
        state.observe(message)
    return state


def until(run: list[Message], seconds: float) -> list[Message]:
    """What was told in the first seconds of a run."""
    return [message for message in run if message.time <= EPOCH + seconds]


def displayed(run: list[Message], now: float, width: int = 160) -> str:
    """The live display, `now` seconds after the run began."""
    console = Console(width=width, file=StringIO())
    console.print(display(state_after(run), EPOCH + now, width))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


# JSON lines


def test_json_writes_one_object_per_message_with_its_class_its_origin_and_all_its_fields(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = messages_of_a_run(num_layers=3, num_finished_layers=1)
    assert {type(message.event) for message in run} == set(get_args(events.Event)) - {events.LogBegun, events.RunFailed}
    render("json", run)
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert not err
    assert [(line["event"], line["time"], line["worker"]) for line in lines] == [
        (type(message.event).__name__, message.time, message.worker) for message in run
    ]
    for line, message in zip(lines, run, strict=True):
        assert set(line) == {"event", "time", "worker", *(field.name for field in fields(message.event))}
    finished = next(line for line in lines if line["event"] == "LayerFinished")
    assert TypeAdapter(LayerRecord).validate_python(finished["record"]) == layer_record(1)


def test_json_writes_null_for_numbers_that_are_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    told = [events.LayerFinished(0, layer_record(0, float("nan"))), events.RunFinished("o", float("inf"), 0, 0)]
    render("json", [Message(event, None, EPOCH) for event in told])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    first, second = (json.loads(line, parse_constant=refuse) for line in capsys.readouterr().out.splitlines())
    assert first["record"]["linears"][1]["relative_error"] is None
    assert second["seconds"] is None
    assert strict_json({"a": (float("-inf"), 1.5)}) == '{"a":[null,1.5]}'


# plain lines


def test_plain_writes_one_line_per_finished_layer_with_count_time_worst_linear_and_eta(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first layer took 6 s from its first chunk on, so the second will."""
    render("plain", messages_of_a_run())
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines() == [
        "model -> out: 2 layers, 4,096 tokens on cpu",
        "layer 1/2  12.3 s  down_proj error 0.0123 -> 0.0045  eta 6 s",
        "layer 2/2  12.3 s  down_proj error 0.0123 -> 0.0045  eta 0 s",
        "worker 0 was lost (out of memory); continuing, restart 1 of 3",
        "warning: [bold]few tokens",
        "finished in 30.0 s, 3.00x one forward pass with reading and writing: 2.0 KiB in out",
    ]


def test_plain_says_which_worker_where_there_are_several(capsys: pytest.CaptureFixture[str]) -> None:
    lost = Message(events.WorkerLost("its node is gone", 1, 3), 1, EPOCH + 40)
    forwarded, warned = events.LayerForwarded(3), events.Warned("few tokens")
    render(
        "plain", [*ring(num_workers=2, num_layers=2), lost, *(Message(x, 1, EPOCH + 41) for x in (forwarded, warned))]
    )
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "org/tiny -> /out: 2 layers, 16,384 tokens on cuda, 2 workers (ray)"
    assert lines[1] == "worker 0 started on node-0, cuda:0, with 1 layers"
    assert lines[3].startswith("layer 1/2  12.3 s")
    assert lines[3].endswith("  (layer 0, worker 0)")
    assert lines[-3:] == [
        "worker 1 was lost (its node is gone); continuing, restart 1 of 3",
        "layer 3 was finished before, only its outputs were computed again (worker 1)",
        "warning: few tokens (worker 1)",
    ]


def test_plain_counts_the_layers_of_an_earlier_run_as_done(capsys: pytest.CaptureFixture[str]) -> None:
    render("plain", messages_of_a_run(num_layers=4, num_finished_layers=2))
    lines = capsys.readouterr().err.splitlines()
    assert "2 finished before" in lines[0]
    assert [line.split("  ")[0] for line in lines if re.match(r"layer \d/", line)] == ["layer 3/4", "layer 4/4"]


def test_plain_names_the_linear_whose_error_is_not_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    render("plain", [Message(events.LayerFinished(0, layer_record(0, float("nan"))), 0, EPOCH)])
    assert "down_proj error 0.0123 -> nan" in capsys.readouterr().err


def test_auto_is_plain_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    render("auto", messages_of_a_run())
    assert "layer 1/2  " in capsys.readouterr().err


def test_plain_progress_imports_neither_rich_nor_torch() -> None:
    program = (
        "import sys; from awqdist.cli.progress import renderer\n"
        "with renderer('plain') as listen: pass\n"
        "print([name for name in ('rich', 'torch', 'plotly', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# the live display


def test_rich_shows_the_run_on_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "140")
    render("rich", messages_of_a_run()[:8])  # within the first layer
    out, err = capsys.readouterr()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err)
    assert not out
    for part in ("0/2 layers", "search", "2,048", "3.0 GiB", "down_proj: 2 -> 1 (ratio 0.50)"):
        assert part in text


def test_rich_prints_warnings_as_they_are_and_lost_workers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    render("rich", messages_of_a_run())
    err = capsys.readouterr().err
    assert "warning: [bold]few tokens" in err
    assert "worker 0 was lost (out of memory); continuing, restart 1 of 3" in err
    assert "2/2 layers" in err
    assert "finished in 30.0 s, 3.00x one forward pass with reading and writing: 2.0 KiB in out" in err


def test_the_display_has_a_row_per_worker() -> None:
    """After 30.5 s worker 0 is 3 chunks into layer 4, which began at 27 s; worker 1 wrote layer 1 since 28 s and began layer 5."""
    lines = [line.split() for line in displayed(until(ring(), 30.5), 30.5).splitlines()]
    head, rows = lines[2], lines[3:7]
    assert head[:8] == ["worker", "host", "layer", "stage", "for", "background", "tokens/s", "memory"]
    assert rows[0][:10] == ["0", "node-0", "4", "forward", "3/8", "4", "s", "2,048", "3.0", "GiB"]
    assert rows[1][:9] == ["1", "node-0", "5", "forward", "2/8", "2", "s", "2,048", "3.0"]
    assert rows[2][:10] == ["2", "node-1", "6", "forward", "1/8", "2", "s", "write", "2", "2,048"]
    assert rows[3][:5] == ["3", "node-1", "7", "forward", "0/8"]
    assert rows[1][10:14] == ["40.0", "GiB", "91", "%"]


def test_the_display_of_one_worker_names_neither_worker_nor_host() -> None:
    text = displayed(until(ring(num_workers=1), 20), 20)
    assert "worker" not in text
    assert "node-0" not in text
    assert "search" in text


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_the_display_fits_the_terminal(width: int) -> None:
    lines = displayed(until(ring(), 36.5), 36.5, width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) == 8
    assert "forward 7/8" in lines[5]


def test_a_lost_worker_is_seen_until_it_is_back() -> None:
    run = until(ring(), 30.5)
    run.append(Message(events.WorkerLost("its node is gone", 1, 3), 2, EPOCH + 30.5))
    assert "lost" in displayed(run, 31).splitlines()[5]
    assert "restart 1 of 3" in displayed(run, 31)
    run.append(Message(events.WorkerStarted("node-9", "cuda:0", (2, 6)), 2, EPOCH + 40))
    row = displayed(run, 41).splitlines()[5]
    assert "lost" not in row
    assert "node-9" in row
    assert "waiting" in row


def test_the_display_says_when_there_was_no_news_for_long() -> None:
    run = until(ring(), 30)
    assert "no news" not in displayed(run, 85)
    assert "no news for 75 s" in displayed(run, 105)
    assert "no news" not in displayed(ring(), 10_000)  # it has finished
    assert displayed(ring(), 10_000).count("done") == 4


# the state


def test_the_state_does_not_depend_on_when_the_messages_are_read() -> None:
    """It is the same for a run of long ago: nothing but the times of its messages counts."""
    run = until(ring(), 60)
    earlier = [replace(message, time=message.time - 1e6) for message in run]
    then, now = state_after(earlier), state_after(run)
    assert then.elapsed_seconds(EPOCH - 1e6 + 61) == now.elapsed_seconds(EPOCH + 61) == 61
    assert then.remaining_seconds(EPOCH - 1e6 + 61) == pytest.approx(now.remaining_seconds(EPOCH + 61))


def test_the_time_left_is_that_of_the_worker_with_most_to_do() -> None:
    """Worker 0 finished layers 0 and 2 after 10 s and 20 s, and has 2 left; worker 1 finished layer 1 after 14 s and has 2 left."""
    run = [Message(events.RunStarted("m", "o", "cpu", 7, 0, 1, 2, "ray"), None, EPOCH)]
    run += [Message(events.WorkerStarted("h", "cpu", tuple(range(w, 7, 2))), w, EPOCH) for w in (0, 1)]
    assert state_after(run).remaining_seconds(EPOCH + 1) is None
    for second, worker, layer in ((10, 0, 0), (14, 1, 1), (20, 0, 2)):
        run.append(Message(events.LayerFinished(layer, layer_record(layer)), worker, EPOCH + second))
    state = state_after(run)
    assert state.num_done == 3
    assert state.remaining_seconds(EPOCH + 20) == 2 * 14 - 6
    assert state.remaining_seconds(EPOCH + 25) == 2 * 14 - 11
    assert state.remaining_seconds(EPOCH + 1000) == 0


def test_the_time_left_of_a_ring_is_near_the_truth_from_its_first_layer_on() -> None:
    run = ring()
    total = run[-1].time - EPOCH
    for seconds in (30, 40, 60, 80):
        left = state_after(until(run, seconds)).remaining_seconds(EPOCH + seconds)
        assert left == pytest.approx(total - seconds, abs=0.05 * total)


def test_layers_forwarded_again_do_not_count_for_the_pace() -> None:
    run = [Message(events.RunStarted("m", "o", "cpu", 4, 2, 1), None, EPOCH)]
    run += [Message(events.WorkerStarted("h", "cpu", (0, 1, 2, 3)), 0, EPOCH)]
    run += [Message(events.LayerForwarded(layer), 0, EPOCH + 100 * (layer + 1)) for layer in (0, 1)]
    run += [Message(events.LayerFinished(2, layer_record(2)), 0, EPOCH + 210)]
    assert state_after(run).remaining_seconds(EPOCH + 210) == 10


def test_a_run_that_is_resumed_begins_anew_in_the_state() -> None:
    resumed = Message(events.RunStarted("org/tiny", "/out", "cuda", 16, 5, 1, 2), None, EPOCH + 500)
    state = state_after([*until(ring(), 60), resumed])
    assert (state.num_done, len(state.workers), state.elapsed_seconds(EPOCH + 510)) == (5, 2, 10)
    assert state.remaining_seconds(EPOCH + 510) is None
