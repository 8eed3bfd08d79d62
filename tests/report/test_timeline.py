"""Spans and utilization from the messages of a run, and the chart that is drawn of them. All expectations are worked out by hand."""

from __future__ import annotations

import json
import random

import pytest
from support.ring_messages import EPOCH, ring

from awqdist.report.intervals import Span, timeline
from awqdist.report.timeline import lane_rows, timeline_chart
from awqdist.run import events as ev
from awqdist.run.events import Event, Message


def told(*events: tuple[float, Event], worker: int | None = 0) -> list[Message]:
    """Messages of one worker, by seconds after the run began."""
    return [Message(event, worker, EPOCH + second) for second, event in events]


def run_of(seconds: float, *messages: Message) -> list[Message]:
    """A run of this length."""
    start, end = ev.RunStarted("m", "o", "cpu", 4, 0, 1), ev.RunFinished("o", seconds, 1.0, 1)
    return [*told((0.0, start), worker=None), *messages, *told((seconds, end), worker=None)]


def rounded(spans: tuple[Span, ...]) -> list[tuple[str, int, float, float, float]]:
    return [(x.kind, x.layer, round(x.start, 3), round(x.end, 3), round(x.busy_seconds, 3)) for x in spans]


def test_what_ended_spans_the_seconds_before_it_was_told() -> None:
    read, write = ev.StageEnded(7, "read", 4.0), ev.StageEnded(6, "write", 1.5)
    run = run_of(
        20, *told((5, read), (6, ev.ChunkForwarded(7, 0, 1, 9, 1.0)), (9, write), (18, ev.StageEnded(7, "search", 12)))
    )
    (lane,) = timeline(run).lanes
    assert rounded(lane.spans) == [
        ("read", 7, 1, 5, 4),
        ("forward", 7, 5, 6, 1),
        ("search", 7, 6, 18, 12),
        ("write", 6, 7.5, 9, 1.5),
    ]


def test_reading_and_writing_do_not_count_as_computing() -> None:
    """10 s of forward and 4 s of search in 20 s, while it reads for 15 s."""
    forward, search = ev.ChunkForwarded(0, 0, 1, 9, 10.0), ev.StageEnded(0, "search", 4.0)
    run = run_of(20, *told((10, forward), (14, search), (15, ev.StageEnded(1, "read", 15.0))))
    result = timeline(run)
    assert result.wall_seconds == 20
    assert result.lanes[0].busy_seconds == pytest.approx(14)
    assert result.lanes[0].utilization == pytest.approx(0.7)
    assert [result.lanes[0].seconds(kind) for kind in ("forward", "search", "read", "write")] == [10, 4, 15, 0]


def test_time_that_two_stages_share_counts_once() -> None:
    run = run_of(10, *told((5, ev.StageEnded(0, "search", 4.0)), (6, ev.ChunkForwarded(1, 0, 1, 9, 4.0))))
    assert timeline(run).lanes[0].busy_seconds == pytest.approx(5)


def test_search_check_and_round_of_a_layer_are_one_span() -> None:
    stages = told(
        (13, ev.StageEnded(2, "search", 3)), (14, ev.StageEnded(2, "check", 1)), (18, ev.StageEnded(2, "round", 4))
    )
    assert rounded(timeline(run_of(20, *stages)).lanes[0].spans) == [("search", 2, 10, 18, 8)]


def test_chunks_merge_unless_a_gap_between_them_can_be_seen() -> None:
    """In a run of 1000 s a gap of 1 s is not drawn; a gap of 3 s is. Neither counts as busy."""
    ends = (10, 21, 34)  # of chunks of 10 s: gaps of 1 s and 3 s
    run = run_of(1000, *told(*((end, ev.ChunkForwarded(0, n, 3, 9, 10.0)) for n, end in enumerate(ends))))
    (lane,) = timeline(run).lanes
    assert rounded(lane.spans) == [("forward", 0, 0, 21, 20), ("forward", 0, 24, 34, 10)]
    assert lane.busy_seconds == pytest.approx(30)


def test_neighboring_layers_stay_apart() -> None:
    run = run_of(4, *told((1, ev.ChunkForwarded(0, 0, 1, 9, 1.0)), (2, ev.ChunkForwarded(1, 0, 1, 9, 1.0))))
    assert [span.layer for span in timeline(run).lanes[0].spans] == [0, 1]


def test_the_order_of_the_messages_does_not_matter() -> None:
    run = ring()
    shuffled = random.Random(0).sample(run, len(run))
    assert timeline(shuffled) == timeline(run)


def test_a_ring_has_a_lane_per_worker_with_its_host_and_utilization() -> None:
    """Each of 4 workers forwards 4 layers of 8 s and searches for 14 s each, in 101 s."""
    result = timeline(ring())
    assert [lane.worker for lane in result.lanes] == [0, 1, 2, 3]
    assert [lane.host for lane in result.lanes] == ["node-0", "node-0", "node-1", "node-1"]
    assert [lane.num_layers for lane in result.lanes] == [4, 4, 4, 4]
    assert result.wall_seconds == pytest.approx(101)
    assert [lane.utilization for lane in result.lanes] == pytest.approx([88 / 101] * 4)
    assert result.utilization == pytest.approx(88 / 101)


def test_a_run_that_did_not_end_lasts_until_its_last_message() -> None:
    run = run_of(50, *told((8, ev.ChunkForwarded(0, 0, 1, 9, 4.0))))[:-1]
    result = timeline(run)
    assert result.wall_seconds == 8
    assert result.lanes[0].utilization == pytest.approx(0.5)


def test_a_loss_is_kept_with_its_worker_and_time() -> None:
    (loss,) = timeline(run_of(50, *told((20, ev.WorkerLost("gone", 1, 3)), worker=2))).losses
    assert (loss.worker, loss.time, loss.reason) == (2, 20, "gone")


def test_nothing_was_told_and_nothing_is_drawn() -> None:
    result = timeline([])
    assert (result.wall_seconds, result.lanes, result.losses, result.utilization) == (0, (), (), 0)


# the chart


def test_the_chart_has_bars_where_the_spans_are() -> None:
    """Worker 1 of the ring forwards its second layer, 5, from 28 s to 36 s."""
    result = timeline(ring())
    chart = timeline_chart(result)
    bars = {trace["name"]: trace for trace in chart.data}
    assert set(bars) == {"idle", "forward", "search, check, round", "read", "write"}
    assert bars["idle"]["x"] == pytest.approx([101] * 4)
    forward = bars["forward"]
    place = next(n for n, (layer, _) in enumerate(forward["customdata"]) if layer == 5)
    assert (forward["y"][place], forward["base"][place], forward["x"][place]) == (1, 28, 8)
    assert len(forward["x"]) == 16
    assert chart.layout["yaxis"]["ticktext"][1] == "worker 1 · node-0 · 87 %"


@pytest.mark.parametrize(("seconds", "unit", "length"), [(90, " s", 90), (1800, " min", 30), (36000, " h", 10)])
def test_long_runs_are_drawn_in_minutes_or_hours(seconds: float, unit: str, length: float) -> None:
    run = run_of(seconds, *told((seconds / 2, ev.ChunkForwarded(0, 0, 1, 9, seconds / 2))))
    chart = timeline_chart(timeline(run))
    assert chart.layout["xaxis"]["ticksuffix"] == unit
    assert chart.layout["xaxis"]["range"] == [0, length]
    assert chart.data[1]["x"] == [length / 2]


def test_a_cross_marks_where_a_worker_was_lost() -> None:
    run = [*ring(), *told((40, ev.WorkerLost("<b>gone", 1, 3)), worker=2)]
    cross = timeline_chart(timeline(run)).data[-1]
    assert (cross["name"], cross["x"], round(cross["y"][0])) == ("lost", [40], 2)
    assert cross["customdata"] == ["&lt;b&gt;gone"]


def test_the_rows_tell_the_seconds_of_every_worker() -> None:
    row = lane_rows(timeline(ring()))[3]
    assert (row.worker, row.host, row.device, row.num_layers) == (3, "node-1", "cuda:1", 4)
    assert row.figures == ("32.0 s", "56.0 s", "16.0 s", "8.00 s", "13.0 s", "87.1 %")


def test_the_chart_of_a_large_run_stays_small() -> None:
    """126 layers of 64 chunks on 16 workers: 4 bars a layer, not 67."""
    chart = timeline_chart(timeline(ring(num_workers=16, num_layers=126, num_chunks=64)))
    assert sum(len(trace["x"]) for trace in chart.data) == 16 + 4 * 126
    assert len(json.dumps(chart.data)) < 50_000
