"""Workers that are called from afar, wired to each other by function calls in this process: what Ray's actors are made of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.command_line import model_files
from support.tiny_llama import NUM_LAYERS, Tiny
from torch import Tensor

from awqdist.backends.local import run_local
from awqdist.backends.remote_worker import (
    Allocation,
    Inbox,
    RemoteWorker,
    WorkerInfo,
    WorkerSpec,
    agreed_fingerprint,
    worker_spec,
)
from awqdist.errors import AwqdistError, CheckpointError, OutputError
from awqdist.model.families import register_mappings, registered_mappings
from awqdist.recipe import MappingPattern, load_recipe
from awqdist.run import output as output_folder
from awqdist.run.events import ChunkForwarded, Event, LayerFinished, Message, StageStarted
from awqdist.run.job import Job, fingerprint, prepare
from awqdist.run.leader import Leader
from awqdist.run.output import check_answers, offer_token
from awqdist.run.schedule import Schedule
from awqdist.run.worker import Assignment, RingBroken
from awqdist.settings import RunSettings

NUM_CHUNKS = 2
ALLOCATION = Allocation(2, 1.0, on_gpu=False)
SAMPLES = torch.randint(0, 128, (8, 32), generator=torch.Generator().manual_seed(0))
TIMEOUT_S = 30.0
React = Callable[["Worker", Event], None]


class Worker(RemoteWorker):
    """react: called with every event, in the thread that emits it."""

    def __init__(self, number: int, spec: WorkerSpec, react: React = lambda worker, event: None) -> None:
        super().__init__(number, spec, SAMPLES)
        self.react = react

    def emit(self, event: Event) -> None:
        super().emit(event)
        self.react(self, event)


def introduced(number: int, spec: WorkerSpec, react: React = lambda worker, event: None) -> Worker:
    """A worker that is ready to work."""
    worker, output = Worker(number, spec, react), spec.settings.output
    token = offer_token(output)
    worker.introduce(token)
    check_answers(output, token, [number])
    return worker


def job_of(tiny: Tiny, output: Path) -> Job:
    settings = RunSettings(tiny.model, output, device="cpu", chunk_tokens=128, snapshot_every=2, threads=1)
    return prepare(load_recipe(tiny.recipe), settings)


@pytest.fixture(scope="module")
def alone(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the local backend. Not to be changed."""
    output = tmp_path_factory.mktemp("alone") / "output"
    run_local(job_of(tiny, output), SAMPLES, lambda message: None)
    return output


@pytest.fixture(scope="module")
def inputs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Tensor]:
    """What the first of two workers sends to the second: the inputs of layer 1."""
    output = tmp_path_factory.mktemp("sent")
    sent: dict[tuple[int, int], Tensor] = {}
    worker = introduced(0, worker_spec(job_of(tiny, output), ALLOCATION))
    worker.work_and_deliver(
        1, assignment(0, stop=2), lambda layer, chunk, hidden: sent.update({(layer, chunk): hidden})
    )
    assert sorted(sent) == [(1, 0), (1, 1)]
    return sent


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "output" / ".awqdist").mkdir(parents=True)
    return tmp_path / "output"


def assignment(number: int, *, stop: int = NUM_LAYERS) -> Assignment:
    """What one of two workers is to do from the beginning."""
    return Assignment(number, Schedule(0, stop, 2, NUM_CHUNKS), {}, None)


def second(tiny: Tiny, output: Path, react: React = lambda worker, event: None) -> Worker:
    return introduced(1, worker_spec(job_of(tiny, output), ALLOCATION), react)


def nowhere(layer: int, chunk: int, hidden: Tensor) -> None:
    """Chunks that nobody waits for."""


def put_all(worker: RemoteWorker, attempt: int, inputs: dict[tuple[int, int], Tensor]) -> None:
    for (layer, chunk), hidden in inputs.items():
        worker.put(attempt, layer, chunk, hidden)


def finished(messages: list[Message]) -> list[int]:
    return [message.event.layer for message in messages if isinstance(message.event, LayerFinished)]


def assert_written(output: Path, alone: Path, *layers: int) -> None:
    names = [f"model-layer-{layer:05d}.safetensors" for layer in layers]
    assert sorted(file.name for file in output.glob("model-layer-*")) == names
    for name in names:
        assert (output / name).read_bytes() == (alone / name).read_bytes()


def deliver_to(peer: RemoteWorker, attempt: int) -> Callable[[int, int, Tensor], None]:
    """A copy, as a chunk that went through a network."""
    return lambda layer, chunk, hidden: peer.put(attempt, layer, chunk, hidden.clone())


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_wired_to_a_ring_write_the_bytes_of_one_worker(
    tiny: Tiny, alone: Path, tmp_path: Path, num_workers: int
) -> None:
    job = job_of(tiny, tmp_path / "output")
    workers = [introduced(number, worker_spec(job, ALLOCATION)) for number in range(num_workers)]
    with Leader(job, SAMPLES, lambda message: None) as lead, ThreadPoolExecutor(num_workers) as pool:
        lead.begin("threads", num_workers)
        works = [
            pool.submit(worker.work_and_deliver, 1, assigned, deliver_to(workers[(place + 1) % num_workers], 1))
            for place, (worker, assigned) in enumerate(zip(workers, lead.assignments(num_workers), strict=True))
        ]
        assert [work.result(TIMEOUT_S) for work in works] == [None] * num_workers
        messages = [worker.messages(0.0) for worker in workers]
        for message in sorted((m for told in messages for m in told), key=lambda m: m.time):
            lead.observe(message)
        lead.finish()
    assert model_files(tmp_path / "output") == model_files(alone)
    for number, told in enumerate(messages):
        assert {message.worker for message in told} == {number}
        assert finished(told) == list(range(number, NUM_LAYERS, num_workers))


def test_chunks_of_an_earlier_attempt_are_thrown_away(
    tiny: Tiny, output: Path, alone: Path, inputs: dict[tuple[int, int], Tensor]
) -> None:
    spoiled = {at: torch.full_like(hidden, 7.0) for at, hidden in inputs.items()}
    worker = second(tiny, output)
    put_all(worker, 1, spoiled)  # of an attempt that came to nothing
    put_all(worker, 2, inputs)
    put_all(worker, 1, spoiled)  # and some that come late
    assert worker.work_and_deliver(2, assignment(1, stop=2), nowhere) is None
    assert_written(output, alone, 1)


def test_chunks_may_come_before_the_attempt_begins_or_long_after_and_in_any_order(
    tiny: Tiny, output: Path, alone: Path, inputs: dict[tuple[int, int], Tensor]
) -> None:
    worker = second(tiny, output)
    worker.put(1, 1, 1, inputs[1, 1])
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(worker.work_and_deliver, 1, assignment(1, stop=2), nowhere)
        assert not threading.Event().wait(0.2)
        assert not work.done()
        worker.put(1, 1, 0, inputs[1, 0])
        assert work.result(TIMEOUT_S) is None
    assert_written(output, alone, 1)


@pytest.mark.parametrize("stage", ["search", "round", "write"])
def test_a_stop_lets_the_layer_that_is_being_searched_be_written_and_told(
    tiny: Tiny, output: Path, alone: Path, inputs: dict[tuple[int, int], Tensor], stage: str
) -> None:
    def stop(worker: Worker, event: Event) -> None:
        if event == StageStarted(1, stage):
            worker.stop(5)

    worker = second(tiny, output, stop)
    put_all(worker, 5, inputs)
    assert worker.work_and_deliver(5, assignment(1), nowhere) is not None
    assert finished(worker.messages(0.0)) == [1]
    assert_written(output, alone, 1)


def test_a_stop_before_a_search_begins_ends_the_attempt_at_once(
    tiny: Tiny, output: Path, alone: Path, inputs: dict[tuple[int, int], Tensor]
) -> None:
    def stop(worker: Worker, event: Event) -> None:
        if isinstance(event, ChunkForwarded):
            worker.stop(1)

    worker = second(tiny, output, stop)
    put_all(worker, 1, inputs)
    assert worker.work_and_deliver(1, assignment(1), nowhere) is not None
    assert finished(worker.messages(0.0)) == []
    assert_written(output, alone)


def test_a_worker_that_waits_for_a_chunk_is_stopped_and_goes_on_in_the_next_attempt(
    tiny: Tiny, output: Path, alone: Path, inputs: dict[tuple[int, int], Tensor]
) -> None:
    worker = second(tiny, output)
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(worker.work_and_deliver, 1, assignment(1), nowhere)
        assert not threading.Event().wait(0.2)
        worker.stop(1)
        assert work.result(TIMEOUT_S) == "the attempt was stopped"
    put_all(worker, 2, inputs)
    worker.stop(1)  # comes late, and is not meant for the second attempt
    assert worker.work_and_deliver(2, assignment(1, stop=2), nowhere) is None
    assert_written(output, alone, 1)


def test_an_attempt_that_is_stopped_before_it_begins_does_nothing(tiny: Tiny, output: Path, alone: Path) -> None:
    worker = second(tiny, output)
    worker.stop(1)
    assert worker.work_and_deliver(1, assignment(1), nowhere) is not None
    assert_written(output, alone)


def test_a_chunk_that_cannot_be_delivered_ends_the_attempt_and_what_is_searched_is_written(
    tiny: Tiny, output: Path, alone: Path, inputs: dict[tuple[int, int], Tensor]
) -> None:
    searching = threading.Event()

    def note(worker: Worker, event: Event) -> None:
        if event == StageStarted(1, "search"):
            searching.set()

    def refuse(layer: int, chunk: int, hidden: Tensor) -> None:
        assert searching.wait(TIMEOUT_S)
        raise ConnectionError("the neighbour is gone")

    worker = second(tiny, output, note)
    put_all(worker, 1, inputs)
    assert worker.work_and_deliver(1, assignment(1), refuse) is not None
    assert finished(worker.messages(0.0)) == [1]
    assert_written(output, alone, 1)


def test_a_worker_whose_last_chunk_cannot_be_delivered_says_so(
    tiny: Tiny, output: Path, inputs: dict[tuple[int, int], Tensor]
) -> None:
    def refuse(layer: int, chunk: int, hidden: Tensor) -> None:
        if (layer, chunk) == (2, 1):
            raise OSError("the object store is full")

    worker = second(tiny, output)
    put_all(worker, 1, inputs)
    reason = worker.work_and_deliver(1, assignment(1, stop=3), refuse)
    assert reason == "a chunk could not be delivered: the object store is full"


def test_no_more_than_two_chunks_are_on_their_way_and_waiting_for_them_holds_up_nothing(
    tiny: Tiny, output: Path
) -> None:
    """The first worker does its first layer to the end while none of its chunks is taken."""
    searched, on_their_way, most = threading.Event(), 0, 0
    lock = threading.Lock()

    def slow(layer: int, chunk: int, hidden: Tensor) -> None:
        nonlocal on_their_way, most
        with lock:
            on_their_way += 1
            most = max(most, on_their_way)
        assert searched.wait(TIMEOUT_S)
        with lock:
            on_their_way -= 1

    def note(worker: Worker, event: Event) -> None:
        if isinstance(event, LayerFinished):
            searched.set()

    settings = replace(worker_spec(job_of(tiny, output), ALLOCATION).settings, chunk_tokens=32)  # 8 chunks
    worker = introduced(0, replace(worker_spec(job_of(tiny, output), ALLOCATION), settings=settings), note)
    assert worker.work_and_deliver(1, Assignment(0, Schedule(0, 2, 2, 8), {}, None), slow) is None
    assert most == 2


def test_messages_are_waited_for_and_given_once_in_the_order_in_which_they_were_told(tiny: Tiny, output: Path) -> None:
    worker = second(tiny, output)
    assert worker.messages(0.05) == []
    threading.Timer(0.1, lambda: worker.emit(StageStarted(1, "read"))).start()
    first = worker.messages(TIMEOUT_S)
    for stage in ("forward", "search", "write"):
        worker.emit(StageStarted(1, stage))
    told = [*first, *worker.messages(0.0)]
    assert [message.event for message in told] == [StageStarted(1, s) for s in ("read", "forward", "search", "write")]
    assert [message.worker for message in told] == [1] * 4
    assert sorted(message.time for message in told) == [message.time for message in told]
    assert worker.messages(0.0) == []


def test_a_worker_introduces_itself_with_its_answer_and_what_decides_the_bytes(tiny: Tiny, output: Path) -> None:
    job = job_of(tiny, output)
    token = offer_token(output)
    found = Worker(1, worker_spec(job, ALLOCATION)).introduce(token)
    check_answers(output, token, [1])
    assert found.device == "cpu"
    assert found.fingerprint == fingerprint(job, SAMPLES)


def test_a_worker_that_sees_another_output_does_not_introduce_itself(
    tiny: Tiny, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_folder, "_PATIENCE_S", 0.1)
    worker = Worker(1, worker_spec(job_of(tiny, tmp_path / "other"), ALLOCATION))
    with pytest.raises(OutputError, match=r"not visible to worker 1 on "):
        worker.introduce(offer_token(output))


def test_a_worker_on_whose_machine_the_model_is_missing_says_so_when_it_introduces_itself(
    tiny: Tiny, output: Path, tmp_path: Path
) -> None:
    spec = worker_spec(job_of(tiny, output), ALLOCATION)
    worker = Worker(1, replace(spec, settings=replace(spec.settings, model=tmp_path / "nowhere")))
    with pytest.raises(AwqdistError, match="nowhere"):
        worker.introduce(offer_token(output))


def info(host: str, **differences: str) -> WorkerInfo:
    return WorkerInfo(host, "cpu", {"source": "ab", "recipe": "r", "versions": "torch 2.10", **differences})


def test_workers_agree_if_all_fingerprints_are_equal() -> None:
    assert agreed_fingerprint([info(host) for host in "abc"]) == info("a").fingerprint


@pytest.mark.parametrize(
    ("different", "words"),
    [
        ({"source": "cd"}, "on a and c do not agree on source: ab and cd"),
        ({"versions": "torch 2.11"}, "on a and c do not agree on versions: torch 2.10 and torch 2.11"),
        ({"recipe": "q", "versions": "x"}, "on a and c do not agree on recipe: r and q"),
    ],
)
def test_workers_that_do_not_agree_are_named_with_what_differs(different: dict[str, str], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        agreed_fingerprint([info("a"), info("b"), info("c", **different)])


def test_workers_on_another_kind_of_device_do_not_agree() -> None:
    gpu = {"device": "cuda torch.bfloat16"}
    cpu = {"device": "cpu torch.bfloat16", "threads": "1"}
    for first, other in ((gpu, cpu), (cpu, gpu)):
        with pytest.raises(CheckpointError, match="do not agree on device"):
            agreed_fingerprint([info("a", **first), info("b", **other)])


def test_a_worker_spec_holds_paths_from_anywhere_and_settles_device_and_threads(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny.model)
    job = prepare(load_recipe(tiny.recipe), RunSettings(Path("model"), Path("output"), device="auto"))
    spec = worker_spec(job, Allocation(3, 5.5, on_gpu=True))
    assert spec.settings.model == tiny.model.resolve()
    assert spec.settings.output == tmp_path / "output"
    assert spec.settings.device == "cuda"
    assert spec.settings.threads == 5
    assert worker_spec(job, Allocation(3, 0.66, on_gpu=False)).settings.threads == 1
    given = replace(job, settings=replace(job.settings, threads=2))
    assert worker_spec(given, Allocation(3, 5.5, on_gpu=False)).settings.threads == 2


@pytest.fixture
def unregistered(tiny: Tiny, output: Path) -> Iterator[Callable[[], None]]:
    """Forgets what a test registered for Llama, as in another process; at the end anyway."""
    config = job_of(tiny, output).skeleton.model.config
    before = registered_mappings("LlamaForCausalLM", config)
    assert before is not None

    def forget() -> None:
        register_mappings("LlamaForCausalLM", before)

    yield forget
    forget()


def test_registered_mappings_reach_the_workers(
    tiny: Tiny, output: Path, inputs: dict[tuple[int, int], Tensor], unregistered: Callable[[], None]
) -> None:
    register_mappings("LlamaForCausalLM", [MappingPattern("re:.*up_proj$", ("re:.*down_proj$",))])
    job = job_of(tiny, output)
    spec = worker_spec(job, ALLOCATION)
    unregistered()
    worker = Worker(1, spec)
    assert worker.introduce(offer_token(output)).fingerprint == fingerprint(job, SAMPLES)
    put_all(worker, 1, inputs)
    assert worker.work_and_deliver(1, assignment(1, stop=2), nowhere) is None
    records = [m.event.record for m in worker.messages(0.0) if isinstance(m.event, LayerFinished)]
    names = [(mapping.smooth_layer, mapping.balance_layers) for mapping in records[0].mappings]
    assert len(names) == 1
    assert names[0][0].endswith("up_proj")
    assert [name.rpartition(".")[2] for name in names[0][1]] == ["down_proj"]


def test_an_inbox_gives_every_chunk_once_to_the_one_who_waits_for_it() -> None:
    inbox, chunks = Inbox(), {(layer, chunk): torch.zeros(1) for layer in (3, 4) for chunk in range(2)}
    with ThreadPoolExecutor(4) as pool:
        taken = {at: pool.submit(inbox.take, *at) for at in chunks}
        for at, chunk in reversed(chunks.items()):
            inbox.put(*at, chunk)
        assert all(taken[at].result(TIMEOUT_S) is chunk for at, chunk in chunks.items())
        again = pool.submit(inbox.take, 3, 0)
        assert not threading.Event().wait(0.1)
        assert not again.done()
        inbox.break_off("enough")


def test_an_inbox_that_is_broken_off_gives_nothing_any_more() -> None:
    inbox = Inbox()
    inbox.check()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(inbox.take, 0, 0)
        inbox.put(0, 1, torch.zeros(1))
        inbox.break_off("rank 2 is gone")
        inbox.break_off("and so is rank 3")
        with pytest.raises(RingBroken, match="rank 2 is gone"):
            waiting.result(TIMEOUT_S)
    for call in (inbox.check, lambda: inbox.take(0, 1), lambda: inbox.take(0, 0)):
        with pytest.raises(RingBroken, match="rank 2 is gone"):
            call()
