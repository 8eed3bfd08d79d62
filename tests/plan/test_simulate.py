"""Simulated runs: small ones against a pencil's figures, many against what must hold, and what `plan --simulate` shows of them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from statistics import median

import pytest
from support.command_line import awqdist
from support.tiny_llama import NUM_LAYERS, Tiny

from awqdist.plan.simulate import (
    Point,
    StepTimes,
    best_num_chunks,
    best_num_workers,
    measured_times,
    simulate,
    sweep,
    worker_counts,
)
from awqdist.run.journal import read_journal
from awqdist.run.schedule import Schedule

HIDDEN = [StepTimes(1, search) for search in (0, 0.5, 4, 20)]  # reading, writing and sending cost nothing
TIMES = [
    *HIDDEN,
    StepTimes(1, 2, 3, 1, 0.25),
    StepTimes(1, 8, 20, 0, 0),
    StepTimes(1, 8, 0, 20, 0),
    StepTimes(1, 4, 2, 2, 3),
]
SCHEDULES = [
    Schedule(0, num_layers, num_workers, num_chunks)
    for num_layers, num_workers, num_chunks in product((1, 2, 5, 12), (1, 2, 3, 8), (1, 4, 9))
]
ALL = [*SCHEDULES, Schedule(3, 12, 2, 4, forward_only=frozenset({3, 4, 6}))]


# by hand


def test_two_workers_with_a_layer_each_take_this_long() -> None:
    result = simulate(Schedule(0, 2, 2, 2), StepTimes(chunk_s=1, search_s=3, read_s=1, write_s=2, transfer_s=0.5))
    spans = [(span.worker, span.kind, span.start_s, span.end_s) for span in result.spans]
    assert spans == [
        (0, "read", 0, 1),
        (0, "forward", 1, 3),
        (0, "search", 3, 6),
        (0, "write", 6, 8),
        (1, "read", 0, 1),
        (1, "forward", 2.5, 4.5),
        (1, "search", 4.5, 7.5),
        (1, "write", 7.5, 9.5),
    ]
    assert result.makespan_s == 9.5
    idle = [(worker.idle_start_s, worker.idle_middle_s, worker.idle_end_s) for worker in result.workers]
    assert idle == [(1, 0, 3.5), (2.5, 0, 2)]
    assert result.utilisation == pytest.approx((5 / 9.5, 5 / 9.5))
    assert result.efficiency == pytest.approx(10 / (2 * 9.5))


def test_a_forward_waits_for_a_slow_reader() -> None:
    result = simulate(
        Schedule(0, 2, 1, 1), StepTimes(1, 1, read_s=3)
    )  # read 0-3, forward 3-4, read 4-7 beside search 4-5
    assert result.makespan_s == 9
    assert result.workers[0].idle_start_s == 3
    assert result.workers[0].idle_middle_s == 2


def test_a_write_waits_for_a_slow_writer() -> None:
    result = simulate(Schedule(0, 3, 1, 1), StepTimes(1, 1, write_s=5))
    assert [(span.start_s, span.end_s) for span in result.spans if span.kind == "write"] == [(2, 7), (7, 12), (12, 17)]
    assert result.makespan_s == 17
    assert result.workers[0].idle_middle_s == 3  # from 4 to 7, with the second layer to hand over


def test_chunks_on_one_edge_follow_each_other() -> None:
    result = simulate(Schedule(0, 2, 2, 3), StepTimes(1, 0, transfer_s=4))
    assert [(span.start_s, span.end_s) for span in result.spans if span.worker == 1 and span.kind == "forward"] == [
        (5, 6),
        (9, 10),
        (13, 14),
    ]
    assert result.workers[1].idle_middle_s == 6


def test_a_layer_that_is_only_forwarded_is_not_searched_or_written() -> None:
    result = simulate(Schedule(0, 2, 1, 3, forward_only=frozenset({0})), StepTimes(1, 10, write_s=1))
    assert [span.kind for span in result.spans] == ["read", "forward", "read", "forward", "search", "write"]
    assert result.makespan_s == 17


def test_a_worker_without_layers_waits_from_the_start() -> None:
    result = simulate(Schedule(0, 1, 2, 1), StepTimes(1, 2))
    assert result.utilisation == (1, 0)
    assert result.workers[1].idle_start_s == result.makespan_s == 3


# what must hold


def compute_s(schedule: Schedule, times: StepTimes) -> float:
    """Seconds of all forwards and searches."""
    layers = range(schedule.first, schedule.stop)
    num_searched = sum(layer not in schedule.forward_only for layer in layers)
    return len(layers) * schedule.num_chunks * times.chunk_s + num_searched * times.search_s


Event = tuple[object, ...]


def longest_path_s(schedule: Schedule, times: StepTimes) -> float:
    """When the last step ends, from what every step has to wait for; no clocks of workers, no turns."""
    waits: dict[Event, tuple[float, list[Event]]] = {}  # seconds that it takes, events that must end before
    last: dict[tuple[int, str], Event] = {}  # by worker and lane

    def add(worker: int, lane: str, event: Event, seconds: float, *others: Event | None) -> None:
        waits[event] = seconds, [before for before in (last.get((worker, lane)), *others) if before is not None]
        last[worker, lane] = event

    for worker in range(schedule.num_workers):
        for step in schedule.steps(worker):
            event, now = (step.kind, step.layer, step.chunk), last.get((worker, "compute"))
            match step.kind:
                case "load":
                    add(worker, "reader", ("read", step.layer), times.read_s, now)
                case "receive":
                    add(worker, "compute", event, 0, ("sent", step.layer, step.chunk))
                case "forward":
                    add(worker, "compute", event, times.chunk_s, ("read", step.layer))
                case "send":
                    add(worker, "edge", ("sent", step.layer + 1, step.chunk), times.transfer_s, now)
                case "search":
                    add(worker, "compute", event, times.search_s)
                case "write":
                    add(worker, "compute", event, 0, last.get((worker, "writer")))
                    add(worker, "writer", ("written", step.layer), times.write_s, event)

    @cache
    def end_s(event: Event) -> float:
        seconds, before = waits[event]
        return seconds + max((end_s(e) for e in before), default=0)

    return max(end_s(event) for event in waits)


@pytest.mark.parametrize("times", TIMES)
def test_the_makespan_is_the_longest_path_through_all_that_waits_for_something(times: StepTimes) -> None:
    for schedule in ALL:
        assert simulate(schedule, times).makespan_s == pytest.approx(longest_path_s(schedule, times))


@pytest.mark.parametrize("times", TIMES)
def test_nothing_is_faster_than_the_work_shared_out_or_the_way_of_one_chunk(times: StepTimes) -> None:
    for schedule in ALL:
        num_crossings = sum(schedule.is_received(layer) for layer in range(schedule.first, schedule.stop))
        way = (schedule.stop - schedule.first - 1) * times.chunk_s + num_crossings * times.transfer_s
        critical = times.read_s + way + schedule.num_chunks * times.chunk_s + times.search_s + times.write_s
        result = simulate(schedule, times)
        most = max(len(schedule.layers_of(worker)) for worker in range(schedule.num_workers))
        assert result.makespan_s >= compute_s(schedule, times) / schedule.num_workers - 1e-9
        assert result.makespan_s >= critical - 1e-9
        assert result.makespan_s >= most * times.read_s - 1e-9
        assert 0 <= result.efficiency <= 1 + 1e-9


@pytest.mark.parametrize("times", TIMES)
def test_busy_and_idle_seconds_add_up_to_the_makespan(times: StepTimes) -> None:
    for schedule in ALL:
        result = simulate(schedule, times)
        for number, worker in enumerate(result.workers):
            idle = worker.idle_start_s + worker.idle_middle_s + worker.idle_end_s
            assert worker.compute_s + idle == pytest.approx(result.makespan_s)
            assert worker.read_s == pytest.approx(len(schedule.layers_of(number)) * times.read_s)
            assert min(worker.idle_start_s, worker.idle_middle_s, worker.idle_end_s) >= 0
        assert sum(worker.compute_s for worker in result.workers) == pytest.approx(compute_s(schedule, times))
        assert result.efficiency == pytest.approx(
            compute_s(schedule, times) / (schedule.num_workers * result.makespan_s)
        )


@pytest.mark.parametrize("times", TIMES)
def test_spans_of_one_kind_never_overlap_on_a_worker(times: StepTimes) -> None:
    for schedule in ALL:
        spans = simulate(schedule, times).spans
        for worker in range(schedule.num_workers):
            for lane in (("forward", "search"), ("read",), ("write",)):
                own = [span for span in spans if span.worker == worker and span.kind in lane]
                assert all(a.end_s <= b.start_s for a, b in pairwise(own))


@pytest.mark.parametrize("times", HIDDEN)
def test_one_worker_takes_as_long_as_its_work(times: StepTimes) -> None:
    schedule = Schedule(0, 7, 1, 5)
    assert simulate(schedule, times).makespan_s == pytest.approx(compute_s(schedule, times))
    assert simulate(schedule, times).efficiency == pytest.approx(1)


@pytest.mark.parametrize("times", HIDDEN)
def test_the_time_is_that_of_the_design_while_no_worker_waits(times: StepTimes) -> None:
    """Rounds of C·t_chunk + t_search, and the way of the first chunk to the worker that does the last layer."""
    for schedule in SCHEDULES:
        layer_s = schedule.num_chunks * times.chunk_s + times.search_s
        if schedule.num_workers * times.chunk_s <= layer_s:
            num_rounds = -(-schedule.stop // schedule.num_workers)
            last = schedule.owner(schedule.stop - 1)
            assert simulate(schedule, times).makespan_s == pytest.approx(num_rounds * layer_s + last * times.chunk_s)


def test_twice_the_workers_take_half_the_time() -> None:
    times = StepTimes(0.1, 3.2)
    seconds = [simulate(Schedule(0, 128, num_workers, 64), times).makespan_s for num_workers in (1, 2, 4, 8, 16)]
    for longer, shorter in pairwise(seconds):
        assert longer / shorter == pytest.approx(2, rel=0.03)


@pytest.mark.parametrize("times", TIMES)
def test_nothing_takes_longer_when_a_step_gets_shorter(times: StepTimes) -> None:
    for schedule in ALL:
        before = simulate(schedule, times).makespan_s
        for name in ("chunk_s", "search_s", "read_s", "write_s", "transfer_s"):
            shorter = replace(times, **{name: getattr(times, name) / 2})
            assert simulate(schedule, shorter).makespan_s <= before + 1e-9


# sweeps


def test_a_sweep_keeps_the_tokens() -> None:
    schedule, times = Schedule(0, 12, 2, 8), StepTimes(1, 4, transfer_s=0.5)
    points = sweep(schedule, times, [1, 2], [4, 16])
    assert [(point.num_workers, point.num_chunks) for point in points] == [(1, 4), (1, 16), (2, 4), (2, 16)]
    assert points[0].makespan_s == pytest.approx(points[1].makespan_s) == pytest.approx(12 * (8 + 4))
    expected = simulate(Schedule(0, 12, 2, 16), StepTimes(0.5, 4, transfer_s=0.25))
    assert points[3] == Point(2, 16, expected.makespan_s, expected.efficiency)


def test_the_numbers_of_workers_worth_a_look_are_those_where_fewer_have_more_to_do() -> None:
    assert worker_counts(12, 64) == [1, 2, 3, 4, 6, 12]
    assert worker_counts(12, 5) == [1, 2, 3, 4]
    assert worker_counts(126, 64)[-4:] == [26, 32, 42, 63]


def test_the_best_number_of_workers_is_the_most_that_are_used_well() -> None:
    points = [Point(n, 8, 1, e) for n, e in ((1, 0.98), (2, 0.97), (4, 0.89), (8, 0.7))]
    assert best_num_workers(points) == 4
    assert best_num_workers(points, share=0.95) == 2


def test_the_best_number_of_chunks_is_the_fewest_that_are_as_good_as_fast() -> None:
    points = [Point(4, c, s, 1) for c, s in ((1, 20), (8, 10.2), (16, 10.05), (32, 10))]
    assert best_num_chunks(points) == 16
    assert best_num_chunks(points, tolerance=0.05) == 8


def test_measured_times_are_medians_over_the_layers_for_the_tokens_asked_for(undisturbed: Path) -> None:
    records = read_journal(undisturbed).layers.values()
    times = measured_times(records, num_tokens=1024, num_chunks=4)  # the run had 256 tokens
    assert times.chunk_s == pytest.approx(median(record.seconds["forward"] for record in records))
    assert times.read_s == median(record.seconds["read"] for record in records)
    assert times.search_s == median(sum(r.seconds[stage] for stage in ("search", "check", "round")) for r in records)
    assert times.transfer_s == 0


# the command line


SECONDS = ("--chunk-seconds", 0.5, "--search-seconds", 4)


def plan(tiny: Tiny, *options: object) -> tuple[object, ...]:
    return (
        "plan",
        tiny.model,
        "--recipe",
        tiny.recipe,
        "--num-samples",
        8,
        "--seq-len",
        32,
        "--chunk-tokens",
        32,
        *options,
    )


def test_plan_simulates_what_it_is_given(tiny: Tiny) -> None:
    outcome = awqdist(*plan(tiny, "--workers", 2, "--simulate", *SECONDS, "--write-seconds", 1, "--json"))
    assert outcome.code == 0, outcome.stderr
    found = json.loads(outcome.stdout)["simulation"]
    expected = simulate(Schedule(0, NUM_LAYERS, 2, 8), StepTimes(0.5, 4, write_s=1))
    assert found["makespan_s"] == expected.makespan_s
    assert found["efficiency"] == expected.efficiency
    assert [worker["utilisation"] for worker in found["workers"]] == list(expected.utilisation)
    assert found["times"] == {"chunk_s": 0.5, "search_s": 4, "read_s": 0, "write_s": 1, "transfer_s": 0}
    assert {1, 2, 4, 8, 16, 32, 64} <= {point["num_workers"] for point in found["over_workers"]}
    assert [point["num_chunks"] for point in found["over_chunks"]] == [1, 2, 4, 8]
    assert found["best_num_workers"] == 2
    assert found["best_num_chunks"] == 8


def test_plan_shows_a_simulation_in_tables(tiny: Tiny) -> None:
    outcome = awqdist(*plan(tiny, "--workers", 3, "--simulate", *SECONDS))
    assert outcome.code == 0, outcome.stderr
    shown = " ".join(outcome.stdout.split())
    for part in (
        "efficiency",
        "Where workers wait",
        "idle at the start",
        "Best: up to",
        "--chunk-tokens",
        "search 4.00 s",
    ):
        assert part in shown, part
    rows = {line.split("│")[1].strip() for line in outcome.stdout.splitlines() if line.startswith("│")}
    assert {"1", "2", "3", "4", "8", "16", "32", "64"} <= rows


def test_plan_takes_times_from_a_run_and_those_given_go_first(tiny: Tiny, undisturbed: Path) -> None:
    outcome = awqdist(*plan(tiny, "--simulate", "--times-from", undisturbed, "--transfer-seconds", 7, "--json"))
    assert outcome.code == 0, outcome.stderr
    measured = measured_times(read_journal(undisturbed).layers.values(), num_tokens=8 * 32, num_chunks=8)
    assert StepTimes(**json.loads(outcome.stdout)["simulation"]["times"]) == replace(measured, transfer_s=7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--simulate",), "give --chunk-seconds and --search-seconds"),
        (("--simulate",), "or --times-from OUTPUT"),
        (("--simulate", "--chunk-seconds", 1), "give --search-seconds"),
        (("--read-seconds", 1), "--read-seconds says how long a simulated run takes; add --simulate"),
        (("--times-from", "."), "--times-from says how long a simulated run takes; add --simulate"),
        (("--simulate", "--times-from", "nowhere"), "nowhere/.awqdist/log.jsonl speaks of no finished layer"),
        (("--simulate", "--chunk-seconds", "inf", "--search-seconds", 1), "expected a finite number of seconds"),
        (("--simulate", "--chunk-seconds", -1, "--search-seconds", 1), "--chunk-seconds"),
        (("--workers", 0), "--workers"),
    ],
)
def test_plan_refuses_times_that_lack_or_are_for_nothing(tiny: Tiny, options: tuple[object, ...], message: str) -> None:
    assert message in awqdist(*plan(tiny, *options)).error_line()


def test_plan_shows_how_layers_are_dealt_to_workers(tiny: Tiny) -> None:
    found = json.loads(awqdist(*plan(tiny, "--workers", 3, "--json")).stdout)
    whole = found["estimate"]
    assert [worker["layers"] for worker in found["workers"]] == [[0, 3], [1], [2]]
    assert sum(w["written_bytes"] for w in found["workers"]) == sum(layer["written_bytes"] for layer in whole["layers"])
    layers_read = sum(layer["read_bytes"] for layer in whole["layers"])
    assert sum(w["read_bytes"] for w in found["workers"]) == layers_read + 3 * whole["embedding_bytes"]
    one, two = whole["layers"][1], found["workers"][0]
    assert found["workers"][1]["held_bytes"] == one["device_bytes"]
    assert two["held_bytes"] == one["device_bytes"] + max(one["read_bytes"], one["written_bytes"])
    shown = awqdist(*plan(tiny, "--workers", 5)).stdout
    assert "none" in shown
    assert "held at the peak" in shown
    assert "simulation" not in found
