"""Who does which layer, and in which order. An interpreter of its own takes the steps, without clocks."""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import replace
from itertools import pairwise, product

from awqdist.run.schedule import Schedule, Step

SCHEDULES = [
    Schedule(0, num_layers, num_workers, num_chunks)
    for num_layers, num_workers, num_chunks in product((1, 2, 5, 12), (1, 2, 3, 8), (1, 4))
] + [
    Schedule(8, 20, 3, 4),
    Schedule(8, 20, 3, 4, forward_only=frozenset({8, 9, 11})),
    Schedule(1, 7, 2, 3, forward_only=frozenset(range(5))),
]


def all_steps(schedule: Schedule) -> list[list[Step]]:
    return [list(schedule.steps(worker)) for worker in range(schedule.num_workers)]


def take_all(schedule: Schedule, seed: int) -> list[Step]:
    """Workers take their steps in turns that chance decides; whoever lacks a chunk is passed over. Fails if nobody can go on."""
    chance = random.Random(seed)
    left = [deque(steps) for steps in all_steps(schedule)]
    inbox: list[deque[tuple[int, int]]] = [deque() for _ in left]  # (layer, chunk), as they were sent
    taken: list[Step] = []
    while any(left):
        able = [
            worker
            for worker, steps in enumerate(left)
            if steps
            and (steps[0].kind != "receive" or (inbox[worker] and inbox[worker][0] == (steps[0].layer, steps[0].chunk)))
        ]
        assert able, f"nobody can go on: {[steps[0] for steps in left if steps]}"
        worker = chance.choice(able)
        step = left[worker].popleft()
        taken.append(step)
        if step.kind == "receive":
            inbox[worker].popleft()
        elif step.kind == "send":
            inbox[schedule.owner(step.layer + 1)].append((step.layer + 1, step.chunk))
    assert not any(inbox), "a chunk was sent to no one"
    return taken


def test_every_layer_belongs_to_one_worker() -> None:
    for schedule in SCHEDULES:
        dealt = [layer for worker in range(schedule.num_workers) for layer in schedule.layers_of(worker)]
        assert sorted(dealt) == list(range(schedule.first, schedule.stop))
        assert all(layer in schedule.layers_of(schedule.owner(layer)) for layer in dealt)


def test_layers_are_dealt_like_cards() -> None:
    schedule = Schedule(0, 7, 3, 1)
    assert [schedule.layers_of(worker) for worker in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    resumed = replace(schedule, first=4)
    assert [resumed.layers_of(worker) for worker in range(3)] == [[4], [5], [6]]


def test_every_layer_is_loaded_forwarded_and_quantized_once() -> None:
    for schedule in SCHEDULES:
        count = Counter(step for steps in all_steps(schedule) for step in steps)
        layers = range(schedule.first, schedule.stop)
        quantized = [layer for layer in layers if layer not in schedule.forward_only]
        assert set(count.values()) == {1}
        assert {step for step in count if step.kind not in ("send", "receive")} == {
            *(Step("load", layer) for layer in layers),
            *(Step("forward", layer, chunk) for layer in layers for chunk in range(schedule.num_chunks)),
            *(Step(kind, layer) for layer in quantized for kind in ("search", "write")),
        }


def test_every_chunk_received_was_sent_by_the_owner_of_the_layer_before_in_the_same_order() -> None:
    for schedule in SCHEDULES:
        steps = all_steps(schedule)
        for layer in range(schedule.first + 1, schedule.stop):
            sender, receiver = schedule.owner(layer - 1), schedule.owner(layer)
            sent = [step.chunk for step in steps[sender] if step.kind == "send" and step.layer == layer - 1]
            received = [step.chunk for step in steps[receiver] if step.kind == "receive" and step.layer == layer]
            assert sent == received == (list(range(schedule.num_chunks)) if sender != receiver else [])
            assert schedule.is_sent(layer - 1) == schedule.is_received(layer) == (sender != receiver)
        ends = {("receive", schedule.first), ("send", schedule.stop - 1)}
        assert not any((step.kind, step.layer) in ends for own in steps for step in own)


def test_whoever_is_slow_the_steps_come_to_an_end_and_chunks_in_order() -> None:
    for schedule in SCHEDULES:
        for seed in range(3):
            taken = take_all(schedule, seed)
            place = {step: i for i, step in enumerate(taken)}
            for layer, chunk in product(range(schedule.first + 1, schedule.stop), range(schedule.num_chunks)):
                assert place[Step("forward", layer - 1, chunk)] < place[Step("forward", layer, chunk)]


def test_a_layer_is_loaded_then_forwarded_then_searched_then_written() -> None:
    for schedule in SCHEDULES:
        for steps in all_steps(schedule):
            place = {step: i for i, step in enumerate(steps)}
            for layer in {step.layer for step in steps}:
                forwards = [place[Step("forward", layer, chunk)] for chunk in range(schedule.num_chunks)]
                assert forwards == sorted(forwards)
                assert place[Step("load", layer)] < forwards[0]
                if layer not in schedule.forward_only:
                    assert forwards[-1] < place[Step("search", layer)] == place[Step("write", layer)] - 1


def test_the_next_layer_is_read_from_the_last_forward_of_the_one_before() -> None:
    for schedule in SCHEDULES:
        for worker, steps in enumerate(all_steps(schedule)):
            for layer, following in pairwise(schedule.layers_of(worker)):
                last = Step("send" if schedule.is_sent(layer) else "forward", layer, schedule.num_chunks - 1)
                assert steps[steps.index(Step("load", following)) - 1] == last


def most_layers_held(steps: list[Step], schedule: Schedule) -> int:
    """The most layers that are forwarded, at least in part, but not searched yet."""
    held: set[int] = set()
    most = 0
    for step in steps:
        if step.kind == "forward" and step.layer not in schedule.forward_only:
            held.add(step.layer)
        elif step.kind == "search":
            held.remove(step.layer)
        most = max(most, len(held))
    return most


def test_a_worker_holds_statistics_of_one_layer_at_a_time() -> None:
    assert max(most_layers_held(steps, schedule) for schedule in SCHEDULES for steps in all_steps(schedule)) == 1


def test_a_worker_that_is_dealt_no_layer_has_no_steps() -> None:
    assert list(Schedule(0, 2, 3, 4).steps(2)) == []
    assert Schedule(0, 2, 3, 4).layers_of(2) == []
