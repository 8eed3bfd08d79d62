"""Times and trace from the messages of a run. All expectations are worked out by hand."""

from __future__ import annotations

import json
import random

import pytest
from support.ring_messages import EPOCH, ring

from awqdist.report.trace import chrome_trace, worker_times
from awqdist.run import events as ev
from awqdist.run.events import Event, Message


def told(*events: tuple[float, Event], worker: int | None = 0) -> list[Message]:
    """Messages of one worker, by seconds after the run began."""
    return [Message(event, worker, EPOCH + second) for second, event in events]


def run_of(seconds: float, *messages: Message) -> list[Message]:
    """A run of this length."""
    start, end = ev.RunStarted("m", "o", "cpu", 4, 0, 1), ev.RunFinished("o", seconds, 1.0, 1)
    return [*told((0.0, start), worker=None), *messages, *told((seconds, end), worker=None)]


def test_reading_and_writing_do_not_count_as_computing() -> None:
    """10 s of forward and 4 s of search in 20 s, while it reads for 15 s."""
    forward, search = ev.ChunkForwarded(0, 0, 1, 9, 10.0), ev.StageEnded(0, "search", 4.0)
    (row,) = worker_times(run_of(20, *told((10, forward), (14, search), (15, ev.StageEnded(1, "read", 15.0)))))
    assert row.wall_seconds == 20
    assert row.busy_seconds == pytest.approx(14)
    assert row.busy_share == pytest.approx(0.7)
    assert row.idle_seconds == pytest.approx(6)
    assert row.seconds == {"forward": 10, "search": 4, "read": 15}


def test_time_that_two_stages_share_counts_once() -> None:
    run = run_of(10, *told((5, ev.StageEnded(0, "search", 4.0)), (6, ev.ChunkForwarded(1, 0, 1, 9, 4.0))))
    assert worker_times(run)[0].busy_seconds == pytest.approx(5)


def test_time_between_chunks_does_not_count_as_busy() -> None:
    """Chunks of 10 s that end at 10, 21 and 34 s."""
    run = run_of(1000, *told(*((end, ev.ChunkForwarded(0, n, 3, 9, 10.0)) for n, end in enumerate((10, 21, 34)))))
    assert worker_times(run)[0].busy_seconds == pytest.approx(30)


def test_the_order_of_the_messages_does_not_matter() -> None:
    run = ring()
    assert worker_times(random.Random(0).sample(run, len(run))) == worker_times(run)


def test_a_ring_has_a_row_per_worker_with_its_host_and_its_times() -> None:
    """Each of 4 workers forwards 4 layers of 8 s and searches, checks and rounds for 14 s each, in 101 s."""
    rows = worker_times(ring())
    assert [row.worker for row in rows] == [0, 1, 2, 3]
    assert [row.host for row in rows] == ["node-0", "node-0", "node-1", "node-1"]
    assert [row.num_layers for row in rows] == [4, 4, 4, 4]
    assert [row.busy_share for row in rows] == pytest.approx([88 / 101] * 4)
    assert rows[3].device == "cuda:1"
    assert rows[3].seconds == {"read": 16, "forward": 32, "search": 40, "check": 4, "round": 12, "write": 8}


def test_a_run_that_did_not_end_lasts_until_its_last_message() -> None:
    run = run_of(50, *told((8, ev.ChunkForwarded(0, 0, 1, 9, 4.0))))[:-1]
    (row,) = worker_times(run)
    assert (row.wall_seconds, row.busy_share) == (8, pytest.approx(0.5))


def test_nothing_was_told_and_nothing_is_shown() -> None:
    assert worker_times([]) == []
    assert chrome_trace([])["traceEvents"] == []


# the trace


def test_the_trace_has_a_span_for_what_ended() -> None:
    read, write = ev.StageEnded(7, "read", 4.0), ev.StageEnded(6, "write", 1.5)
    chunk, search = ev.ChunkForwarded(7, 0, 1, 9, 1.0), ev.StageEnded(7, "search", 12)
    run = run_of(20, *told((5, read), (6, chunk), (9, write), (18, search), worker=2))
    spans = [(x["name"], x["pid"], x["tid"], x["ts"], x["dur"]) for x in chrome_trace(run)["traceEvents"]]
    assert spans == [
        ("read 7", 2, 1, 1_000_000, 4_000_000),
        ("forward 7", 2, 0, 5_000_000, 1_000_000),
        ("write 6", 2, 2, 7_500_000, 1_500_000),
        ("search 7", 2, 0, 6_000_000, 12_000_000),
    ]


def test_the_trace_names_workers_and_threads_and_tells_of_losses() -> None:
    run = [*ring(num_workers=2), *told((40, ev.WorkerLost("its node is gone", 1, 3)), worker=1)]
    events = chrome_trace(run)["traceEvents"]
    names = {(x["name"], x["pid"], x["args"]["name"]) for x in events if x["ph"] == "M"}
    assert ("process_name", 1, "worker 1 (node-0, cuda:1)") in names
    assert {name for kind, _, name in names if kind == "thread_name"} == {"compute", "read", "write"}
    (loss,) = (x for x in events if x["ph"] == "i")
    assert (loss["name"], loss["pid"], loss["ts"]) == ("lost: its node is gone", 1, 40_000_000)


def test_the_trace_is_json_with_the_fields_that_viewers_need() -> None:
    """126 layers of 64 chunks on 16 workers."""
    trace = chrome_trace(ring(num_workers=16, num_layers=126, num_chunks=64))
    spans = [x for x in json.loads(json.dumps(trace))["traceEvents"] if x["ph"] == "X"]
    assert len(spans) == 126 * (64 + 5)
    assert all({"name", "cat", "ph", "ts", "dur", "pid", "tid"} <= set(span) for span in spans)
