"""A worker among neighbours that are not there: what it sends, in which order it reads and writes, and how it ends."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_llama import NUM_LAYERS, Tiny
from torch import Tensor
from transformers import LlamaForCausalLM

from awqdist.errors import CheckpointError, OutputError
from awqdist.recipe import load_recipe
from awqdist.run.events import (
    ChunkForwarded,
    Event,
    LayerFinished,
    LayerForwarded,
    SnapshotSaved,
    StageEnded,
    StageStarted,
    WorkerStarted,
    WorkerStatus,
)
from awqdist.run.job import Job, prepare
from awqdist.run.schedule import Schedule
from awqdist.run.worker import Assignment, RingBroken, run_worker
from awqdist.settings import RunSettings

NUM_CHUNKS = 2
SAMPLES = torch.randint(0, 128, (8, 32), generator=torch.Generator().manual_seed(0))
PATIENCE_S = 20.0  # for what comes in milliseconds


@dataclass
class Told:
    """The events of a worker. react: called with each of them before it is noted, in the thread that told it."""

    react: Callable[[Event], None] = lambda event: None
    events: list[Event] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, event: Event) -> None:
        self.react(event)
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait_for(self, *events: tuple[object, ...]) -> bool:
        """Whether all of them come in time. Events are named as in `place`."""
        with self._changed:
            return self._changed.wait_for(lambda: all(self._has(event) for event in events), PATIENCE_S)

    def place(self, *event: object) -> int:
        """Where an event, named by its type and the values of its first fields, comes for the first time."""
        return next(place for place, found in enumerate(self.events) if _is(found, event))

    def layers(self, kind: type) -> list[int]:
        return [event.layer for event in self.events if isinstance(event, kind)]  # type: ignore[union-attr]

    def _has(self, event: tuple[object, ...]) -> bool:
        return any(_is(found, event) for found in self.events)


def _is(found: Event, event: tuple[object, ...]) -> bool:
    kind, *values = event
    fields = [getattr(found, name) for name in type(found).__slots__]
    return type(found) is kind and fields[: len(values)] == values


@dataclass
class Neighbours:
    """The others in the ring. inputs: what they send, by layer; broken: the ring breaks once it is set."""

    inputs: list[list[Tensor]] = field(default_factory=list)
    sent: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    broken: bool = False

    def send(self, layer: int, chunk: int, hidden: Tensor) -> None:
        self.sent[layer, chunk] = hidden

    def receive(self, layer: int, chunk: int) -> Tensor:
        self.check()
        return self.inputs[layer][chunk]

    def check(self) -> None:
        if self.broken:
            raise RingBroken


def job_of(tiny: Tiny, output: Path, *, snapshot_every: int = 100) -> Job:
    settings = RunSettings(tiny.model, output, device="cpu", chunk_tokens=128, snapshot_every=snapshot_every, threads=1)
    return prepare(load_recipe(tiny.recipe), settings)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "output" / ".awqdist").mkdir(parents=True)
    return tmp_path / "output"


@pytest.fixture(scope="module")
def inputs(tiny: Tiny) -> list[list[Tensor]]:
    """The inputs of every layer in chunks (4, 32, H), as transformers computes them in float32."""
    model = LlamaForCausalLM.from_pretrained(tiny.model, dtype=torch.float32)
    with torch.no_grad():
        hidden = model(SAMPLES, output_hidden_states=True).hidden_states
    return [list(layer.to(torch.bfloat16).split(4)) for layer in hidden[:NUM_LAYERS]]


def assignment(
    worker: int,
    num_workers: int,
    *,
    layers: Sequence[int] = range(NUM_LAYERS),
    finished: dict[int, int] | None = None,
    snapshot: SnapshotSaved | None = None,
) -> Assignment:
    finished = finished or {}
    schedule = Schedule(layers[0], layers[-1] + 1, num_workers, NUM_CHUNKS, forward_only=frozenset(finished))
    return Assignment(worker, schedule, finished, snapshot)


def alone(job: Job, told: Told, **what: object) -> None:
    run_worker(job, SAMPLES, assignment(0, 1, **what), Neighbours(), told)  # type: ignore[arg-type]


def layer_files(output: Path) -> list[str]:
    return sorted(file.name for file in output.glob("model-layer-*"))


def name_of(layer: int) -> str:
    return f"model-layer-{layer:05d}.safetensors"


def assert_close(chunk: Tensor, expected: Tensor) -> None:
    """But for roundings to bfloat16 between layers."""
    assert chunk.dtype == expected.dtype
    difference = (chunk.float() - expected.float()).norm() / expected.float().norm()
    assert difference < 0.01


@pytest.mark.parametrize("worker", [0, 1])
def test_a_worker_does_the_layers_of_its_turn_and_sends_what_the_model_computes(
    tiny: Tiny, output: Path, inputs: list[list[Tensor]], worker: int
) -> None:
    told, neighbours = Told(), Neighbours(inputs)
    run_worker(job_of(tiny, output), SAMPLES, assignment(worker, 2), neighbours, told)
    mine = [worker, worker + 2]
    started = told.events[0]
    assert isinstance(started, WorkerStarted)
    assert started.layers == tuple(mine)
    assert told.layers(LayerFinished) == mine
    assert layer_files(output) == [name_of(layer) for layer in mine]
    behind = [layer + 1 for layer in mine if layer + 1 < NUM_LAYERS]
    assert list(neighbours.sent) == [(layer, chunk) for layer in behind for chunk in range(NUM_CHUNKS)]
    for (layer, chunk), hidden in neighbours.sent.items():
        assert_close(hidden, inputs[layer][chunk])


def test_a_worker_without_layers_only_says_that_it_is_there(tiny: Tiny, output: Path) -> None:
    told = Told()
    run_worker(job_of(tiny, output), SAMPLES, assignment(2, 3, layers=[0]), Neighbours(), told)
    assert [type(event) for event in told.events] == [WorkerStarted]
    assert layer_files(output) == []


def test_how_a_worker_is_doing_is_told_from_its_beginning_on(tiny: Tiny, output: Path) -> None:
    told = Told()
    alone(job_of(tiny, output), told, layers=[0])
    statuses = [event for event in told.events if isinstance(event, WorkerStatus)]
    assert statuses[0].memory_bytes > 2**20


def test_the_next_layer_is_read_while_one_is_searched(tiny: Tiny, output: Path) -> None:
    came = []

    def hold(event: Event) -> None:
        if _is(event, (StageStarted, 0, "search")):
            came.append(told.wait_for((StageEnded, 1, "read")))

    told = Told(hold)
    alone(job_of(tiny, output), told, layers=[0, 1])
    assert came == [True]
    assert told.place(StageEnded, 1, "read") < told.place(StageStarted, 0, "search")


def test_no_more_than_one_layer_is_read_ahead(tiny: Tiny, output: Path) -> None:
    told = Told()
    alone(job_of(tiny, output), told)
    for layer in range(NUM_LAYERS - 2):
        forwarded = told.place(ChunkForwarded, layer + 1, NUM_CHUNKS - 1)
        assert told.place(StageStarted, layer + 2, "read") > forwarded > told.place(StageEnded, layer + 1, "read")


def test_writing_holds_up_no_forward_and_no_search_but_the_next_write(tiny: Tiny, output: Path) -> None:
    """While the first layer is being written, the second is done, and then the worker waits: one write at a time."""
    meanwhile: list[Event] = []

    def hold(event: Event) -> None:
        if _is(event, (StageEnded, 0, "write")):
            assert told.wait_for((StageEnded, 1, "search"), (StageEnded, 1, "round"))
            time.sleep(0.3)
            meanwhile.extend(told.events)

    told = Told(hold)
    alone(job_of(tiny, output), told)
    assert not any(_is(event, (StageStarted, 2, "forward")) for event in meanwhile)
    assert not any(_is(event, (StageStarted, 1, "write")) for event in meanwhile)
    assert told.layers(LayerFinished) == list(range(NUM_LAYERS))
    for layer in range(NUM_LAYERS - 1):
        assert told.place(LayerFinished, layer) < told.place(StageStarted, layer + 1, "write")


def test_work_ends_only_when_its_last_layer_is_written(tiny: Tiny, output: Path) -> None:
    def dawdle(event: Event) -> None:
        if _is(event, (StageStarted, 1, "write")):
            time.sleep(0.3)

    told = Told(dawdle)
    alone(job_of(tiny, output), told, layers=[0, 1])
    assert isinstance(told.events[told.place(LayerFinished, 1)], LayerFinished)
    assert layer_files(output) == [name_of(0), name_of(1)]


def test_a_write_that_fails_ends_the_work_at_the_next_step(tiny: Tiny, output: Path) -> None:
    def hold(event: Event) -> None:
        if _is(event, (StageStarted, 0, "write")):
            shutil.rmtree(output)
        elif _is(event, (ChunkForwarded, 1, 0)):
            assert told.wait_for((StageStarted, 0, "write"))
            time.sleep(0.5)

    told = Told(hold)
    with pytest.raises(OutputError, match=r"cannot write .*model-layer-00000"):
        alone(job_of(tiny, output), told)
    assert [e.chunk for e in told.events if isinstance(e, ChunkForwarded) and e.layer == 1] == [0]
    assert told.layers(LayerFinished) == []


def test_a_last_write_that_fails_ends_the_work_with_its_error(tiny: Tiny, output: Path) -> None:
    told = Told()
    shutil.rmtree(output)
    with pytest.raises(OutputError, match=r"cannot write .*model-layer-00000"):
        alone(job_of(tiny, output), told, layers=[0])
    assert told.layers(LayerFinished) == []


def test_an_error_of_the_leader_who_hears_of_a_layer_ends_the_work(tiny: Tiny, output: Path) -> None:
    def refuse(event: Event) -> None:
        if isinstance(event, LayerFinished):
            raise OutputError("the journal cannot be written")

    with pytest.raises(OutputError, match="journal"):
        alone(job_of(tiny, output), Told(refuse), layers=[0])


def test_a_layer_that_cannot_be_used_ends_the_work_and_the_one_before_is_written_all_the_same(
    tiny: Tiny, output: Path, copied: Callable[..., Path]
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")

    told = Told()
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        alone(job_of(Tiny(copied(spoil), tiny.text, tiny.recipe), output), told)
    assert told.layers(LayerFinished) == [0]


@pytest.mark.parametrize("stage", ["search", "round"])
def test_a_ring_that_breaks_while_a_layer_is_searched_leaves_it_written(
    tiny: Tiny, output: Path, inputs: list[list[Tensor]], stage: str
) -> None:
    neighbours = Neighbours(inputs)

    def break_off(event: Event) -> None:
        neighbours.broken |= _is(event, (StageStarted, 1, stage))

    told = Told(break_off)
    with pytest.raises(RingBroken):
        run_worker(job_of(tiny, output), SAMPLES, assignment(1, 2), neighbours, told)
    assert told.layers(LayerFinished) == [1]
    assert layer_files(output) == [name_of(1)]
    assert not any(isinstance(event, ChunkForwarded) and event.layer == 3 for event in told.events)


def test_a_ring_that_breaks_before_a_search_begins_no_more_of_it(tiny: Tiny, output: Path) -> None:
    neighbours = Neighbours()

    def break_off(event: Event) -> None:
        neighbours.broken |= _is(event, (ChunkForwarded, 0, 0))

    told = Told(break_off)
    with pytest.raises(RingBroken):
        run_worker(job_of(tiny, output), SAMPLES, assignment(0, 2), neighbours, told)
    assert layer_files(output) == []
    assert [event.chunk for event in told.events if isinstance(event, ChunkForwarded)] == [0]


def test_no_thread_outlives_the_work(tiny: Tiny, output: Path) -> None:
    before = set(threading.enumerate())
    neighbours = Neighbours(broken=True)
    with pytest.raises(RingBroken):
        run_worker(job_of(tiny, output), SAMPLES, assignment(0, 2), neighbours, Told())
    alone(job_of(tiny, output), Told(), layers=[0])
    assert set(threading.enumerate()) <= before


def test_finished_layers_are_forwarded_and_not_searched_and_the_others_come_out_the_same(
    tiny: Tiny, output: Path, tmp_path: Path
) -> None:
    first, second = Told(), Told()
    alone(job_of(tiny, output), first)
    checksums = {event.layer: event.record.source_crc32 for event in first.events if isinstance(event, LayerFinished)}
    again = tmp_path / "again"
    again.mkdir()
    finished = {layer: checksums[layer] for layer in (0, 2)}
    alone(job_of(tiny, again), second, finished=finished)
    assert second.layers(LayerForwarded) == [0, 2]
    assert second.layers(LayerFinished) == [1, 3]
    assert {e.layer for e in second.events if isinstance(e, StageStarted) and e.stage == "search"} == {1, 3}
    for layer in (1, 3):
        assert (again / name_of(layer)).read_bytes() == (output / name_of(layer)).read_bytes()


def test_a_finished_layer_that_was_made_from_other_weights_is_noticed(tiny: Tiny, output: Path) -> None:
    with pytest.raises(OutputError, match=r"layer 1 of .* was made from other weights"):
        alone(job_of(tiny, output), Told(), layers=[0, 1, 2], finished={1: 12345})


def test_snapshots_hold_the_inputs_of_every_so_manieth_layer_and_work_goes_on_from_them(
    tiny: Tiny, output: Path, tmp_path: Path, inputs: list[list[Tensor]]
) -> None:
    told = Told()
    alone(job_of(tiny, output, snapshot_every=2), told)
    assert told.layers(SnapshotSaved) == [2]  # never in front of the first
    saved = told.events[told.place(SnapshotSaved, 2)]
    assert isinstance(saved, SnapshotSaved)
    stored = load_file(output / ".awqdist" / saved.file)
    for hidden, expected in zip((stored[name] for name in sorted(stored)), inputs[2], strict=True):
        assert_close(hidden, expected)

    again = tmp_path / "again"
    shutil.copytree(output / ".awqdist", again / ".awqdist")
    record = SnapshotSaved(2, saved.file, saved.sha256)
    alone(job_of(tiny, again), Told(), layers=[2, 3], snapshot=record)
    assert layer_files(again) == [name_of(2), name_of(3)]
    for layer in (2, 3):
        assert (again / name_of(layer)).read_bytes() == (output / name_of(layer)).read_bytes()
