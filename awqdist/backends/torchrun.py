"""The torchrun backend: one worker in every rank of a launcher that sets the usual variables (torchrun, accelerate, deepspeed, srun).

Rank 0 is the leader and a worker as well. A rank that dies takes the others with it; the launcher may start all of them again, and the run
is resumed like any other.

Values and messages go through the launcher's key-value store. Its keys have a prefix of their own for each start of the ranks, so that
after a restart nobody reads what an earlier start left. Chunks go through process groups: every edge of the ring has one, with a thread
that sends and a thread that receives, so chunks arrive in the order in which they were sent, and no transfer waits for another. Chunks
travel as bytes, because gloo does not support bfloat16.
"""

from __future__ import annotations

import os
import pickle
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from socket import gethostname
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore, ProcessGroup, rendezvous

from awqdist.backends.remote_worker import Inbox, WorkerInfo, agreed_fingerprint
from awqdist.errors import AwqdistError
from awqdist.layer.records import RunSummary
from awqdist.offload.store import Store
from awqdist.recipe import Recipe
from awqdist.run.chunks import open_chunk_store, store_budget
from awqdist.run.device import choose_device, launcher_value
from awqdist.run.events import Event, Listen, Message
from awqdist.run.job import Job, fingerprint, prepare, token_chunks, with_threads
from awqdist.run.leader import Leader
from awqdist.run.output import answer_token, check_answers, check_free, offer_token
from awqdist.run.worker import Assignment, RingBroken, run_worker
from awqdist.settings import RunSettings

Begin = Callable[[], tuple[Job, Tensor]]
_PATIENCE = timedelta(days=30)  # a neighbour may search for hours; the launcher ends ranks whose neighbour died
_MESSAGES = "messages"
_POLL_S = 0.05
_LEAVE_S = 10.0  # how long the leader waits for the others to read its last value
T = TypeVar("T")


def run_torchrun(begin: Begin, recipe: Recipe, settings: RunSettings, listen: Listen) -> RunSummary:
    """Quantizes a model together with the other ranks, all of which call this, or resumes an interrupted run.

    Args:
        begin: checks the input and returns the job and the calibration samples (N, L) int64; called by the leader only.
        listen: called with every message, by the leader only.

    Returns:
        The same summary in all ranks.

    Raises:
        AwqdistError: in all ranks, if one of them fails.
    """
    ranks = _join_ranks()
    device = choose_device(settings.device)
    if device.type == "cuda":  # the GPU with this rank's number on its machine
        device = choose_device(f"cuda:{launcher_value('LOCAL_RANK') or 0}")
        torch.cuda.set_device(device)

    def decide() -> tuple[int | None, Tensor, str]:
        _, samples = begin()
        check_free(settings.output)
        return with_threads(settings, _cores_of_rank()).threads, samples, offer_token(settings.output)

    with _process_group(ranks, device):
        threads, samples, token = ranks.share(decide) if ranks.is_leader else ranks.shared()
        torch.set_num_threads(threads or 1)
        job = prepare(recipe, replace(settings, threads=threads, device=str(device)))
        answer_token(settings.output, token, ranks.rank)
        workers = ranks.gather(WorkerInfo(gethostname(), str(device), fingerprint(job, samples)))
        lead = ranks.is_leader
        summary = _lead(ranks, job, samples, workers, token, listen) if lead else _follow(ranks, job, samples)
        ranks.leave()
        return summary


def _lead(
    ranks: _RankStore, job: Job, samples: Tensor, workers: list[WorkerInfo], token: str, listen: Listen
) -> RunSummary:
    with ExitStack() as stack:

        def open_run() -> tuple[Leader, list[Assignment]]:
            check_answers(job.settings.output, token, range(ranks.num_ranks))
            agreed_fingerprint(workers)
            lead = stack.enter_context(Leader(job, samples, listen))
            lead.begin("torchrun", ranks.num_ranks)
            return lead, lead.assignments(ranks.num_ranks)

        lead, assignments = ranks.share(open_run, lambda opened: opened[1])
        if assignments:
            with _transport(job, samples, assignments[0]) as transport:
                receiver = _MessageReceiver(ranks, lead.observe, transport.break_off)
                try:
                    run_worker(job, samples, assignments[0], transport, lambda event: lead.tell(event, 0))
                    receiver.wait()
                except RingBroken as broken:
                    receiver.stop()
                    raise AwqdistError(receiver.failure or _resumable(broken)) from None
        return ranks.share(lead.finish)


def _follow(ranks: _RankStore, job: Job, samples: Tensor) -> RunSummary:
    assignments: list[Assignment] = ranks.shared()
    if assignments:
        store, lock = ranks.store.clone(), threading.Lock()

        def push(kind: str, value: str | None) -> None:
            with lock:  # events come from several threads
                store.queue_push(_MESSAGES, pickle.dumps((ranks.rank, kind, value)))

        def emit(event: Event) -> None:
            push("message", Message(event, ranks.rank, time.time()).to_json())

        def end(error: str | None) -> None:
            with suppress(distributed.DistError):
                push("end", error)

        try:
            with _transport(job, samples, assignments[ranks.rank]) as transport:
                run_worker(job, samples, assignments[ranks.rank], transport, emit)
        except RingBroken as broken:
            end(_resumable(broken))
            raise AwqdistError(_resumable(broken)) from None
        except BaseException as error:
            end(str(error) or type(error).__name__)
            raise
        end(None)
    summary: RunSummary = ranks.shared()
    return summary


def _resumable(broken: RingBroken) -> str:
    return f"{broken}; finished layers are kept, the same command resumes"


@contextmanager
def _transport(job: Job, samples: Tensor, assignment: Assignment) -> Iterator[_RankTransport]:
    """Opens the transport of an assignment; all ranks call it together. After a failure it is left as it is."""
    width = job.skeleton.model.config.get_text_config(decoder=True).hidden_size
    shapes = [(*tokens.shape, width) for tokens in token_chunks(job.settings, samples)]
    store = open_chunk_store(job, store_budget(job, assignment.schedule.num_workers))
    transport = _RankTransport(assignment, shapes, job.skeleton.dtype, job.device, store)
    yield transport
    transport.close()


@contextmanager
def _process_group(ranks: _RankStore, device: torch.device) -> Iterator[None]:
    """Opens the default process group. After a failure it is left as it is: its threads may wait forever for ranks that died."""
    if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost") and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend, store = "nccl" if device.type == "cuda" else "gloo", PrefixStore("group", ranks.store)
    distributed.init_process_group(backend, timeout=_PATIENCE, store=store, world_size=ranks.num_ranks, rank=ranks.rank)
    yield
    distributed.destroy_process_group()


def _cores_of_rank() -> int:
    """Returns this rank's share of the cores of its machine."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")  # torchrun, deepspeed, srun
    counts = [int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()]
    num_local = (counts or [int(launcher_value("WORLD_SIZE") or 1)])[0]
    return max(1, len(os.sched_getaffinity(0)) // num_local)


class _RankStore:
    """The launcher's key-value store as one rank sees it. Methods raise AwqdistError if the store is gone."""

    def __init__(self, store: Any, rank: int, num_ranks: int) -> None:
        """store: a torch.distributed.Store, whose type stubs know neither bytes nor queues."""
        self.store, self.rank, self.num_ranks = store, rank, num_ranks
        self._num_shared = 0  # all ranks share and gather in the same order

    @property
    def is_leader(self) -> bool:
        """Returns whether this is rank 0."""
        return self.rank == 0

    def share(self, make: Callable[[], T], part: Callable[[T], Any] = lambda value: value) -> T:
        """On the leader: calls `make` and shares its result with all ranks.

        Args:
            part: selects what is shared, if not the whole result.

        Raises:
            AwqdistError: `make` raised it; `shared` then raises it in all ranks.
        """
        key = self._next_key()
        try:
            value = make()
        except AwqdistError as error:
            self.store.set(key, pickle.dumps((None, str(error))))
            self._await_readers(key)
            raise
        self.store.set(key, pickle.dumps((part(value), None)))
        return value

    def shared(self) -> Any:
        """On the other ranks: waits for the next shared value and returns it. Raises AwqdistError if the leader failed to make it."""
        key = self._next_key()
        value, reason = pickle.loads(self._await(key))
        if reason is not None:
            self.store.set(f"{key}/{self.rank}", b"")
            raise AwqdistError(f"rank 0 gave up: {reason}")
        return value

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks on the leader, an empty list elsewhere."""
        key = self._next_key()
        self.store.set(f"{key}/{self.rank}", pickle.dumps(value))
        ranks = range(self.num_ranks) if self.is_leader else ()
        return [pickle.loads(self._await(f"{key}/{rank}")) for rank in ranks]

    def leave(self) -> None:
        """Ends the communication, in all ranks. The leader's process may host the store, so it leaves last."""
        key = self._next_key()
        if self.is_leader:
            self._await_readers(key)
        else:
            self.store.set(f"{key}/{self.rank}", b"")

    def _await_readers(self, key: str) -> None:
        """Waits until all other ranks have answered. A rank that does not answer in time has died."""
        deadline = time.monotonic() + _LEAVE_S
        answers = [f"{key}/{rank}" for rank in range(1, self.num_ranks)]
        while answers and not self.store.check(answers) and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _next_key(self) -> str:
        self._num_shared += 1
        return f"shared/{self._num_shared}"

    def _await(self, key: str) -> bytes:
        try:
            while not self.store.check([key]):
                time.sleep(_POLL_S)
            return bytes(self.store.get(key))
        except distributed.DistError as error:
            raise AwqdistError(f"the launcher's store is gone: {error}; the same command resumes") from None


def _join_ranks() -> _RankStore:
    """Joins the ranks that the launcher's environment variables describe. Raises AwqdistError if variables are missing."""
    values = {name: launcher_value(name) for name in ("RANK", "WORLD_SIZE")}
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    missing += [name for name, value in values.items() if value is None]
    if missing:
        raise AwqdistError(
            f"the torchrun backend needs a launcher: {', '.join(missing)} not set; see launch/torchrun.sh, or use --backend local"
        )
    rank, num_ranks = int(values["RANK"] or 0), int(values["WORLD_SIZE"] or 1)
    store, _, _ = next(rendezvous("env://", rank, num_ranks))
    return _RankStore(
        PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store), rank, num_ranks
    )


class _MessageReceiver:
    """The leader's thread that receives the messages of the other ranks until all of them have ended."""

    def __init__(
        self, ranks: _RankStore, on_message: Callable[[Message], None], on_failure: Callable[[str], None]
    ) -> None:
        """
        Args:
            on_message: called with each message.
            on_failure: called with the reason if a rank ended with an error, or `on_message` raised one.
        """
        self._store = ranks.store.clone()
        self._running = set(range(1, ranks.num_ranks))
        self._on_message, self._on_failure = on_message, on_failure
        self.failure: str | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._receive_all, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until all ranks have ended. Raises AwqdistError if one of them failed."""
        self._thread.join()
        if self.failure is not None:
            raise AwqdistError(self.failure)

    def stop(self) -> None:
        """Takes the messages that have arrived, and no more."""
        self._over.set()
        self._thread.join()

    def _receive_all(self) -> None:
        try:
            while self._running:
                if self._store.queue_len(_MESSAGES):
                    self._receive_one()
                elif self._over.wait(_POLL_S):
                    return
        except (AwqdistError, distributed.DistError) as error:
            self._fail(str(error))

    def _receive_one(self) -> None:
        rank, kind, value = pickle.loads(self._store.queue_pop(_MESSAGES, block=False))
        if kind == "message":
            self._on_message(Message.from_json(value))
            return
        self._running.discard(rank)
        if value is not None:
            self._fail(value)

    def _fail(self, reason: str) -> None:
        self.failure = self.failure or reason
        self._on_failure(reason)


class _RankTransport:
    """Carries the chunks of one rank for one assignment. `receive`, `check` and `break_off` are those of its inbox."""

    def __init__(
        self,
        assignment: Assignment,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
        store: Store,
    ) -> None:
        """Opens the edges of the ring; all ranks call it together.

        Args:
            shapes: (B, L, H) of every chunk.
            dtype: of the activations.
            device: on which bytes are sent and received.
            store: where chunks wait, closed with the transport.
        """
        self._rank, self._schedule = assignment.worker, assignment.schedule
        self._shapes, self._dtype, self._device = shapes, dtype, device
        count = self._schedule.num_workers
        self._groups: list[ProcessGroup | None] = [None]  # by the rank at which the edge begins
        if count > 1:
            self._groups = [distributed.new_group([r, (r + 1) % count], timeout=_PATIENCE) for r in range(count)]
        self._inbox = Inbox(store)
        self._outbox: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        self.receive, self.check, self.break_off = self._inbox.take, self._inbox.check, self._inbox.break_off
        self._threads = [
            threading.Thread(target=self._guarded, args=(f,), daemon=True) for f in (self._send_all, self._receive_all)
        ]
        for thread in self._threads:
            thread.start()

    def send(self, layer: int, chunk: int, hidden: Tensor) -> None:
        """Queues a chunk. Only its bytes are sent: the neighbour's schedule tells it which chunk comes next."""
        self._outbox.put(hidden)

    def close(self) -> None:
        """Waits until all chunks are sent and received."""
        self._outbox.put(None)
        for thread in self._threads:
            thread.join()
        self._inbox.close()

    def _send_all(self) -> None:
        peer, group = (self._rank + 1) % self._schedule.num_workers, self._groups[self._rank]
        while (hidden := self._outbox.get()) is not None:
            distributed.send(hidden.contiguous().view(torch.uint8).to(self._device), peer, group)

    def _receive_all(self) -> None:
        peer = (self._rank - 1) % self._schedule.num_workers
        group = self._groups[peer]
        for step in self._schedule.steps(self._rank):
            if step.kind == "receive":
                *batch, width = self._shapes[step.chunk]
                data = torch.empty(*batch, width * self._dtype.itemsize, dtype=torch.uint8, device=self._device)
                distributed.recv(data, peer, group)
                self._inbox.put(step.layer, step.chunk, data.cpu().view(self._dtype))

    def _guarded(self, function: Callable[[], None]) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            function()
        except Exception as error:  # whatever the process group raises: no more chunks will come
            self._inbox.break_off(f"a neighbour of rank {self._rank} is gone: {str(error).splitlines()[0]}")
