"""The leader: where a run begins, what it journals of what workers tell, and what it tells others. Layers and snapshots are made up."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.command_line import contents
from support.ring_messages import layer_record, write_log
from support.tiny_llama import NUM_LAYERS, Tiny
from torch import Tensor

from awqdist.checkpoint.writer import lazy_tensor, write_safetensors
from awqdist.errors import AwqdistError, OutputError
from awqdist.recipe import load_recipe
from awqdist.run.chunks import chunk_name, load_snapshot, save_snapshot
from awqdist.run.events import (
    Event,
    LayerFinished,
    Message,
    RunFailed,
    RunFinished,
    RunStarted,
    SnapshotSaved,
    StageStarted,
    Warned,
    encode,
    log_file,
    read_log,
    seconds_of_runs,
)
from awqdist.run.job import Job, prepare
from awqdist.run.journal import read_journal
from awqdist.run.leader import Leader
from awqdist.run.worker import Assignment
from awqdist.settings import RunSettings

SAMPLES = torch.randint(0, 128, (8, 32), generator=torch.Generator().manual_seed(0))
STATE = ".awqdist"


def job_of(tiny: Tiny, output: Path, **settings: Any) -> Job:
    given = RunSettings(tiny.model, output, device="cpu", chunk_tokens=128, threads=1, **settings)
    return prepare(load_recipe(tiny.recipe), given)


@pytest.fixture
def job(tiny: Tiny, tmp_path: Path) -> Job:
    return job_of(tiny, tmp_path / "output")


def opened(job: Job, heard: list[Message] | None = None) -> Leader:
    return Leader(job, SAMPLES, (lambda message: None) if heard is None else heard.append)


def finished_layer(job: Job, layer: int) -> LayerFinished:
    """What a worker tells of a layer, with its file on disk."""
    written = write_safetensors(
        job.settings.output / f"model-layer-{layer:05d}.safetensors", {f"layer {layer}": torch.tensor([layer])}
    )
    task = job.plan.tasks[layer]
    record = replace(
        layer_record(layer),
        file=written.name,
        num_bytes=written.num_bytes,
        sha256=written.sha256,
        source_crc32=100 + layer,
        source_sample=job.source_sample(task.tensors.values()),
    )
    return LayerFinished(layer, record)


def chunks_of(layer: int) -> list[Tensor]:
    return [torch.full((4, 32, 64), layer + chunk / 8, dtype=torch.bfloat16) for chunk in range(2)]


def saved_snapshot(job: Job, layer: int) -> SnapshotSaved:
    named = ((chunk_name(index), chunk) for index, chunk in enumerate(chunks_of(layer)))
    lazy = [lazy_tensor(name, chunk, partial(torch.clone, chunk)) for name, chunk in named]
    return save_snapshot(job.settings.output / STATE, layer, lazy)


def interrupted(job: Job, layers: list[int], snapshots: list[int]) -> None:
    """Leaves a run behind in which so much was done."""
    with opened(job) as lead:
        lead.begin("local", 1)
        for layer in snapshots:
            lead.tell(saved_snapshot(job, layer), 0)
        for layer in layers:
            lead.tell(finished_layer(job, layer), 0)


def dealt(job: Job, num_workers: int = 1) -> list[Assignment]:
    with opened(job) as lead:
        return lead.assignments(num_workers)


def snapshot_files(job: Job) -> list[int]:
    return sorted(int(file.stem.rpartition("-")[2]) for file in (job.settings.output / STATE).glob("boundary-*"))


def logged(job: Job) -> list[Message]:
    """The lines of the log behind the first, which holds the fingerprint."""
    return list(read_log(log_file(job.settings.output)).messages)[1:]


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def kinds(messages: list[Message]) -> list[str]:
    return [type(message.event).__name__ for message in messages]


def test_a_new_run_deals_all_layers_from_the_embeddings_on(job: Job) -> None:
    first, second, third = dealt(job, 3)
    assert [a.worker for a in (first, second, third)] == [0, 1, 2]
    assert first.schedule == second.schedule == third.schedule
    schedule = first.schedule
    assert (schedule.first, schedule.stop, schedule.num_workers, schedule.num_chunks) == (0, NUM_LAYERS, 3, 2)
    assert schedule.forward_only == frozenset()
    assert (first.finished, first.snapshot) == ({}, None)
    assert [a.schedule.layers_of(a.worker) for a in (first, second, third)] == [[0, 3], [1], [2]]


def test_a_run_goes_on_from_the_newest_snapshot(job: Job) -> None:
    interrupted(job, [0, 1], [1, 2])
    (assignment,) = dealt(job)
    assert (assignment.schedule.first, assignment.schedule.stop) == (2, NUM_LAYERS)
    assert assignment.snapshot is not None
    assert assignment.snapshot.layer == 2
    loaded = load_snapshot(job.settings.output / STATE, assignment.snapshot)
    assert all(chunk.equal(expected) for chunk, expected in zip(loaded, chunks_of(2), strict=True))


def test_a_damaged_snapshot_is_passed_over_for_the_one_before_and_in_the_end_for_the_start(job: Job) -> None:
    interrupted(job, [0, 1, 2], [1, 2, 3])
    begins = []
    for layer in (3, 2, 1):
        begins.append(dealt(job)[0].schedule.first)
        damage(job.settings.output / STATE / saved_snapshot(job, layer).file)
    last = dealt(job)[0]
    assert [*begins, last.schedule.first] == [3, 2, 1, 0]
    assert last.snapshot is None
    assert last.finished == {0: 100, 1: 101, 2: 102}


def test_a_missing_snapshot_is_passed_over_too(job: Job) -> None:
    interrupted(job, [0, 1], [1, 2])
    (job.settings.output / STATE / saved_snapshot(job, 2).file).unlink()
    assert dealt(job)[0].schedule.first == 1


def test_a_snapshot_behind_a_layer_that_is_left_is_of_no_use(job: Job) -> None:
    interrupted(job, [1, 2], [1, 3])
    (assignment,) = dealt(job)
    assert assignment.schedule.first == 0
    assert assignment.snapshot is None


def test_finished_layers_are_only_forwarded_and_carry_the_checksums_of_their_weights(job: Job) -> None:
    interrupted(job, [0, 1, 3], [1])
    for assignment in dealt(job, 2):
        assert (assignment.schedule.first, assignment.schedule.stop) == (1, 3)
        assert {1} <= assignment.schedule.forward_only <= {0, 1, 3}
        assert assignment.finished == {0: 100, 1: 101, 3: 103}
    steps = [(step.kind, step.layer) for a in dealt(job, 2) for step in a.schedule.steps(a.worker)]
    assert [layer for kind, layer in steps if kind == "search"] == [2]
    assert {layer for kind, layer in steps if kind == "forward"} == {1, 2}


def test_layers_that_others_finish_meanwhile_are_not_dealt_again(job: Job) -> None:
    with opened(job) as lead:
        lead.begin("ray", 2)
        lead.tell(finished_layer(job, 1), 1)
        assert lead.assignments(2)[0].schedule.forward_only == {1}
        for layer in (0, 2):
            lead.tell(finished_layer(job, layer), 0)
        assert [a.schedule.layers_of(a.worker) for a in lead.assignments(4)] == [[0], [1], [2], [3]]
        lead.tell(finished_layer(job, 3), 1)
        assert lead.assignments(2) == []


def test_a_layer_whose_file_is_damaged_is_warned_of_and_done_again(job: Job) -> None:
    interrupted(job, [0, 1], [1, 2])
    damage(job.settings.output / "model-layer-00001.safetensors")
    heard: list[Message] = []
    with opened(job, heard) as lead:
        lead.begin("local", 1)
        schedule = lead.assignments(1)[0].schedule
    assert (schedule.first, schedule.forward_only) == (1, {0})
    assert kinds(heard) == ["RunStarted", "Warned"]
    assert isinstance(heard[1].event, Warned)
    assert "model-layer-00001.safetensors is missing or damaged" in heard[1].event.message


def test_the_beginning_of_a_run_tells_what_an_earlier_one_had_finished(job: Job) -> None:
    heard: list[Message] = []
    interrupted(job, [0, 2], [])
    with opened(job, heard) as lead:
        lead.begin("ray", 5)
    (message,) = heard
    assert message.worker is None
    assert isinstance(message.event, RunStarted)
    started = message.event
    assert (started.num_layers, started.num_finished_layers, started.num_tokens) == (NUM_LAYERS, 2, 8 * 32)
    assert (started.backend, started.num_workers) == ("ray", 5)


def test_a_layer_is_journaled_before_anybody_hears_of_it(job: Job) -> None:
    safe = []

    def listen(message: Message) -> None:
        if isinstance(message.event, LayerFinished):
            safe.append(message.event.layer in read_journal(job.settings.output).layers)

    with Leader(job, SAMPLES, listen) as lead:
        for layer in range(2):
            lead.tell(finished_layer(job, layer), 0)
    assert safe == [True, True]


def test_a_layer_that_is_told_twice_is_journaled_and_heard_of_once(job: Job) -> None:
    heard: list[Message] = []
    with opened(job, heard) as lead:
        message = Message(finished_layer(job, 0), 1, time.time())
        lead.observe(message)
        lead.observe(message)
        lead.observe(replace(message, worker=0))  # done again by a worker that did not know
    assert heard == logged(job) == [message]


def test_a_layer_that_was_finished_in_an_earlier_run_is_not_journaled_again(job: Job) -> None:
    interrupted(job, [0], [])
    before = logged(job)
    with opened(job) as lead:
        lead.tell(finished_layer(job, 0), 0)
    assert logged(job) == before


def test_an_error_of_the_journal_comes_out_and_nobody_hears_of_the_layer(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Message] = []
    with opened(job, heard) as lead:
        event = finished_layer(job, 0)
        with monkeypatch.context() as patched:
            patched.setattr("os.fsync", full)
            with pytest.raises(OutputError, match="no space left on the disk"):
                lead.tell(event, 0)
        assert heard == []
        lead.tell(event, 0)  # once there is room
    assert list(read_journal(job.settings.output).layers) == [0]


def full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_messages_are_heard_one_after_the_other_whoever_tells_them(job: Job) -> None:
    inside, overlaps, heard = threading.Lock(), [], []

    def listen(message: Message) -> None:
        overlaps.append(not inside.acquire(blocking=False))
        time.sleep(0.001)
        heard.append(message)
        inside.release()

    with Leader(job, SAMPLES, listen) as lead:

        def tell(worker: int) -> None:
            for layer in range(10):
                lead.tell(StageStarted(layer, "search"), worker)

        threads = [threading.Thread(target=tell, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not any(overlaps)
    assert len(heard) == 40
    assert logged(job) == heard


def test_snapshots_in_front_of_layers_that_others_have_yet_to_catch_up_with_are_kept(job: Job) -> None:
    with opened(job) as lead:
        for layer in (1, 2, 3):
            lead.tell(saved_snapshot(job, layer), layer % 2)
        assert snapshot_files(job) == [1, 2, 3]  # the first layer is still being searched
        lead.tell(finished_layer(job, 1), 1)
        lead.tell(saved_snapshot(job, 3), 1)
        assert snapshot_files(job) == [1, 2, 3]


def test_of_the_snapshots_from_which_a_run_can_go_on_the_newest_two_are_kept(job: Job) -> None:
    with opened(job) as lead:
        for layer in (1, 2):
            lead.tell(saved_snapshot(job, layer), 0)
        for layer in range(3):
            lead.tell(finished_layer(job, layer), 0)
        lead.tell(saved_snapshot(job, 3), 0)
        assert snapshot_files(job) == [2, 3]
        assert lead.assignments(1)[0].schedule.first == 3


def test_a_run_that_fails_says_so_in_the_last_line_of_its_events(job: Job) -> None:
    with pytest.raises(AwqdistError), opened(job):
        raise AwqdistError("layer 3: the input is not finite")
    lines = log_file(job.settings.output).read_text().splitlines()
    last = json.loads(lines[-1])
    assert (last["event"], last["reason"], last["worker"]) == ("RunFailed", "layer 3: the input is not finite", None)
    assert abs(last["time"] - time.time()) < 60


def test_a_run_that_is_interrupted_says_so_too(job: Job) -> None:
    with pytest.raises(KeyboardInterrupt), opened(job):
        raise KeyboardInterrupt
    (message,) = logged(job)
    assert message.event == RunFailed("KeyboardInterrupt")


def test_a_second_leader_on_a_folder_is_refused_and_disturbs_nothing(job: Job) -> None:
    with opened(job) as lead:
        lead.begin("local", 1)
        lead.tell(finished_layer(job, 0), 0)
        before = contents(job.settings.output)
        overwriting = replace(job, settings=replace(job.settings, overwrite=True))
        for other in (job, overwriting):
            with pytest.raises(OutputError, match="in use by another running awqdist"):
                opened(other)
        assert contents(job.settings.output) == before
        lead.tell(finished_layer(job, 1), 0)
    assert [a.finished for a in dealt(job)] == [{0: 100, 1: 101}]


def test_a_leader_that_could_not_begin_holds_no_lock(job: Job) -> None:
    file = log_file(job.settings.output)
    file.mkdir(parents=True)
    with pytest.raises(OutputError, match=r"cannot write .*log\.jsonl"):
        opened(job)
    file.rmdir()
    with opened(job):
        pass


def test_a_run_on_other_weights_than_those_of_the_finished_layers_is_refused(job: Job) -> None:
    with opened(job) as lead:
        event = finished_layer(job, 2)
        lead.tell(LayerFinished(2, replace(event.record, source_sample=event.record.source_sample ^ 1)), 0)
    with pytest.raises(OutputError, match=r"layer 2 of .* was made from other weights"):
        opened(job)


def test_a_run_with_workers_on_another_device_compares_with_theirs(job: Job) -> None:
    theirs = {"device": "cuda torch.bfloat16"}
    with Leader(job, SAMPLES, lambda message: None, theirs) as lead:
        lead.tell(finished_layer(job, 0), 0)
    with Leader(job, SAMPLES, lambda message: None, theirs):
        pass
    with pytest.raises(OutputError, match=r"device: cuda torch.bfloat16 then, cpu"):
        opened(job)


def test_a_model_is_refused_while_a_layer_is_missing(job: Job) -> None:
    with opened(job) as lead:
        lead.begin("local", 1)
        for layer in (0, 1, 3):
            lead.tell(finished_layer(job, layer), 0)
        with pytest.raises(OutputError, match="layer 2 is missing"):
            lead.finish()
    assert not (job.settings.output / "model.safetensors.index.json").exists()


def test_finished_layers_become_a_model_and_the_end_is_told(job: Job) -> None:
    heard: list[Message] = []
    with opened(job, heard) as lead:
        lead.begin("threads", 3)
        for layer in range(NUM_LAYERS):
            if layer:
                lead.tell(saved_snapshot(job, layer), 0)
            lead.tell(finished_layer(job, layer), layer % 3)
        summary = lead.finish()
    output = job.settings.output
    index = json.loads((output / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(output / file, "pt") as tensors:
            assert name in tensors.keys()  # noqa: SIM118  (safe_open is no mapping)
    assert {f"layer {layer}" for layer in range(NUM_LAYERS)} <= set(index["weight_map"])
    assert snapshot_files(job) == []
    assert (summary.num_workers, len(summary.layers)) == (3, NUM_LAYERS)
    end = heard[-1].event
    assert isinstance(end, RunFinished)
    assert (end.output, end.output_bytes) == (str(output), index["metadata"]["total_size"])
    assert kinds(logged(job)) == kinds(heard)


def test_the_time_of_a_resumed_run_includes_that_of_the_runs_before(job: Job) -> None:
    interrupted(job, list(range(NUM_LAYERS)), [])
    write_log(job.settings.output, timed([(start(), 1000.0), (StageStarted(0, "read"), 1500.0)]))
    first_s = seconds_of_runs(logged(job)[:-2])
    begun = time.perf_counter()
    with opened(job) as lead:
        lead.begin("local", 1)
        total = lead.finish().seconds["total"]
    assert 500.0 + first_s < total < 501.0 + first_s + time.perf_counter() - begun


def test_a_resumed_run_adds_to_the_log_and_survives_the_torn_line_of_the_one_before(job: Job) -> None:
    interrupted(job, [0], [])
    file = write_log(job.settings.output, [], tail=encode(Message(StageStarted(1, "read"), 0, 5.0))[:30])
    heard: list[Message] = []
    with opened(job, heard) as lead:
        lead.begin("local", 1)
    assert kinds(logged(job)) == ["RunStarted", "LayerFinished", "RunStarted", "Warned"]
    assert f"{file}: damaged lines 4; layers that only they told of are made again" in str(heard[-1].event)


def start() -> RunStarted:
    return RunStarted("model", "output", "cpu", 4, 0, 256)


def timed(events: list[tuple[Event, float]]) -> list[Message]:
    return [Message(event, None, at) for event, at in events]


STAGE = StageStarted(0, "search")


@pytest.mark.parametrize(
    ("events", "seconds"),
    [
        pytest.param([], 0.0, id="none"),
        pytest.param([(start(), 100.0)], 0.0, id="a run that only began"),
        pytest.param([(start(), 100.0), (STAGE, 110.0), (STAGE, 125.0)], 25.0, id="one run"),
        pytest.param([(start(), 100.0), (STAGE, 110.0), (start(), 500.0), (STAGE, 507.0)], 17.0, id="two runs"),
        pytest.param([(start(), 100.0), (STAGE, 130.0), (STAGE, 120.0)], 30.0, id="told late by another worker"),
        pytest.param([(start(), 100.0), (STAGE, 90.0)], 0.0, id="a worker whose clock is behind"),
        pytest.param(
            [(start(), 100.0), (STAGE, 110.0), (start(), 200.0), (start(), 300.0), (STAGE, 303.0)],
            13.0,
            id="three runs",
        ),
    ],
)
def test_the_seconds_of_runs_are_those_from_their_beginnings_to_their_last_messages(
    events: list[tuple[Event, float]], seconds: float
) -> None:
    assert seconds_of_runs(timed(events)) == pytest.approx(seconds)
