"""Workers in other processes: what each may use of a cluster, the worker that a driver controls, and the inbox for its neighbour's chunks.

The driver assigns layers and collects messages, a neighbour delivers chunks.
A run may take several attempts: when a worker is lost, the others are stopped, keep their process, and start again with another assignment.
Chunks that arrive late from an earlier attempt are discarded. How calls travel is the backend's business; Ray's actors are made of it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import ceil, floor
from socket import gethostname

import torch
from torch import Tensor

from awqdist.errors import AwqdistError, CheckpointError
from awqdist.model.families import register_mappings, registered_mappings
from awqdist.offload.store import Store
from awqdist.recipe import MappingPattern, Recipe
from awqdist.run.chunks import open_chunk_store, store_budget
from awqdist.run.events import Event, Message
from awqdist.run.job import Job, fingerprint, prepare, with_threads
from awqdist.run.output import answer_token
from awqdist.run.worker import Assignment, RingBroken, run_worker
from awqdist.settings import RunSettings

Deliver = Callable[[int, int, Tensor], None]  # (layer, chunk, hidden); returns when the neighbour has it

_MAX_CHUNKS_IN_FLIGHT = 2  # from one worker to the next


@dataclass(frozen=True, slots=True)
class Allocation:
    """The workers of a run, each with `cpus` CPUs (less than one where several share it) and perhaps a GPU."""

    num_workers: int
    cpus: float
    on_gpu: bool

    @property
    def threads(self) -> int:
        """Returns how many threads each worker may use."""
        return max(1, int(self.cpus))

    @property
    def bundle(self) -> dict[str, float]:
        """Returns the resources that Ray reserves for one worker."""
        return {"CPU": self.cpus, **({"GPU": 1.0} if self.on_gpu else {})}


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Where a worker runs, and the fingerprint of its job, which must be the same for all workers."""

    host: str
    device: str
    fingerprint: dict[str, str]


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What all workers of a run are given. patterns: the mappings of `architecture`, which the user may have registered."""

    recipe: Recipe
    settings: RunSettings
    architecture: str
    patterns: tuple[MappingPattern, ...] | None
    num_workers: int


class Inbox:
    """Chunks by (layer, chunk). Transport threads call `put`, the worker calls `take`."""

    def __init__(self, store: Store | None = None) -> None:
        """store: where chunks wait, closed with the inbox; None for host memory."""
        self._store = store or Store()
        self._arrived: set[tuple[int, int]] = set()
        self._changed = threading.Condition()
        self._failure: AwqdistError | None = None
        self._closed = False
        self.broken: str | None = None  # why no more chunks will come

    def put(self, layer: int, chunk: int, hidden: Tensor) -> None:
        """Stores an input of `layer`, (B, L, H) on the CPU; may wait for a disk. If that fails, `take` raises the error, not `put`."""
        try:
            if not self._closed:
                self._store.put(_chunk_key(layer, chunk), hidden)
        except AwqdistError as error:
            self._failure = error
        with self._changed:
            self._arrived.add((layer, chunk))
            self._changed.notify_all()

    def take(self, layer: int, chunk: int) -> Tensor:
        """Waits for a chunk and removes it. Raises RingBroken if it will not come, OffloadError if it could not be stored."""
        with self._changed:
            self._changed.wait_for(lambda: self.broken is not None or (layer, chunk) in self._arrived)
            self.check()
            if self._failure is not None:
                raise self._failure
            self._arrived.remove((layer, chunk))
        hidden = self._store.get(_chunk_key(layer, chunk))
        self._store.drop(_chunk_key(layer, chunk))
        self._store.prefetch(_chunk_key(layer, chunk + 1))
        return hidden

    def break_off(self, reason: str) -> None:
        """Ends all waiting, now and later; `take` and `check` raise RingBroken with the first reason given."""
        with self._changed:
            self.broken = self.broken or reason
            self._changed.notify_all()

    def check(self) -> None:
        """Raises RingBroken if `break_off` was called."""
        if self.broken is not None:
            raise RingBroken(self.broken)

    def close(self) -> None:
        """Discards all chunks, and those that still arrive."""
        self._closed = True
        self._store.close()


def _chunk_key(layer: int, chunk: int) -> str:
    return f"inbox-{layer:05d}-chunk-{chunk:06d}"


class RemoteWorker:
    """The one worker of a process. `work_and_deliver` runs in one thread, the other methods in others."""

    def __init__(self, number: int, spec: WorkerSpec, samples: Tensor) -> None:
        """samples: calibration samples (N, L), the same for all workers."""
        if spec.settings.threads:
            torch.set_num_threads(spec.settings.threads)
        if spec.patterns is not None:
            register_mappings(spec.architecture, spec.patterns)
        self._number, self._spec, self._samples = number, spec, samples
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._inboxes: dict[int, Inbox] = {}  # of the newest attempt
        self._lock = threading.Lock()

    def introduce(self, token: str) -> WorkerInfo:
        """Opens the model and answers the leader's token in the output folder. Raises AwqdistError if either is not visible here."""
        self._job: Job = prepare(self._spec.recipe, self._spec.settings)
        self._budget_bytes = store_budget(self._job, self._spec.num_workers)
        answer_token(self._job.settings.output, token, self._number)
        return WorkerInfo(gethostname(), str(self._job.device), fingerprint(self._job, self._samples))

    def work_and_deliver(self, attempt: int, assignment: Assignment, deliver: Deliver) -> str | None:
        """Carries out an assignment.

        Args:
            deliver: hands a chunk to the next worker; called from a few threads.

        Returns:
            None, or why the assignment was not completed: the attempt was stopped, or a chunk could not be delivered.
        """
        inbox = self._inbox(attempt)
        with ThreadPoolExecutor(_MAX_CHUNKS_IN_FLIGHT) as outbox:
            try:
                run_worker(self._job, self._samples, assignment, _Transport(inbox, outbox, deliver), self.emit)
            except RingBroken as broken:
                outbox.shutdown(wait=False, cancel_futures=True)
                return str(broken)
            finally:
                inbox.close()
        return inbox.broken  # by one of the last chunks, for which the worker did not wait

    def put(self, attempt: int, layer: int, chunk: int, hidden: Tensor) -> None:
        """Receives a chunk (B, L, H) for this or a coming attempt; nobody else may use its memory."""
        self._inbox(attempt).put(layer, chunk, hidden)

    def stop(self, attempt: int) -> None:
        """Ends an attempt as soon as the layer that is being searched is written."""
        self._inbox(attempt).break_off("the attempt was stopped")

    def messages(self, patience_s: float) -> list[Message]:
        """Returns the messages since the last call; waits up to `patience_s` for the first."""
        found: list[Message] = []
        try:
            found.append(self._messages.get(timeout=patience_s) if patience_s else self._messages.get_nowait())
            while True:
                found.append(self._messages.get_nowait())
        except queue.Empty:
            return found

    def emit(self, event: Event) -> None:
        """Queues an event for `messages`."""
        self._messages.put(Message(event, self._number, time.time()))

    def _inbox(self, attempt: int) -> Inbox:
        with self._lock:
            newest = max(self._inboxes, default=0)
            if attempt < newest:
                return Inbox()  # nobody reads it
            if attempt not in self._inboxes:
                for old in self._inboxes.values():
                    old.close()
                self._inboxes = {attempt: Inbox(open_chunk_store(self._job, self._budget_bytes))}
            return self._inboxes[attempt]


class _Transport:
    """Takes incoming chunks from the inbox and delivers outgoing ones from a few threads."""

    def __init__(self, inbox: Inbox, outbox: ThreadPoolExecutor, deliver: Deliver) -> None:
        self._inbox, self._outbox, self._deliver = inbox, outbox, deliver
        self.receive, self.check = inbox.take, inbox.check

    def send(self, layer: int, chunk: int, hidden: Tensor) -> None:
        def delivered() -> None:
            try:
                self._deliver(layer, chunk, hidden)
            except Exception as error:  # of any kind: the neighbour will wait in vain, and so does the ring
                self._inbox.break_off(f"a chunk could not be delivered: {error}")
                raise

        self._outbox.submit(delivered)


def allocate(nodes: Sequence[dict[str, float]], num_workers: int | None, device: str) -> Allocation:
    """Divides a Ray cluster among workers.

    Args:
        nodes: resources of every node ("CPU", "GPU").
        num_workers: None for one per GPU, or one per node if there is no GPU.
        device: "auto", "cpu" or "cuda".

    Raises:
        AwqdistError: there are too few GPUs, or no node can hold a worker.
    """
    on_gpu = device != "cpu" and any(node.get("GPU", 0) for node in nodes)
    if device.startswith("cuda") and not on_gpu:
        raise AwqdistError("the Ray cluster has no GPU; use --device cpu")
    kind = "GPU" if on_gpu else "CPU"
    able = [node for node in nodes if node.get(kind, 0) >= 1 and node.get("CPU", 0) >= 1]
    if not able:
        raise AwqdistError(
            f"the Ray cluster has no node with a {kind} and a CPU for the worker; start one with `ray start`"
        )
    if on_gpu:
        num_gpus = int(sum(node["GPU"] for node in able))
        count = num_workers or num_gpus
        if count > num_gpus:
            raise AwqdistError(
                f"{count} workers need one GPU each, the Ray cluster has {num_gpus}; use fewer --num-workers"
            )
        return Allocation(count, float(max(1, min(int(node["CPU"] // node["GPU"]) for node in able))), True)
    count = num_workers or len(able)
    share = min(node["CPU"] for node in able) / ceil(count / len(able))
    return Allocation(count, float(int(share)) if share >= 1 else max(floor(share * 100) / 100, 0.01), False)


def worker_spec(job: Job, allocation: Allocation) -> WorkerSpec:
    """Returns what the workers of `job` are given: absolute paths, and a fixed device and number of threads."""
    settings = replace(
        with_threads(job.settings, allocation.threads),
        device="cuda" if allocation.on_gpu else "cpu",
        model=job.settings.model.resolve(),
        output=job.settings.output.resolve(),
        offload_dir=job.settings.offload_dir and job.settings.offload_dir.absolute(),
    )
    architecture = job.skeleton.architecture
    config = job.skeleton.model.config.get_text_config(decoder=True)
    patterns = registered_mappings(architecture, config)
    return WorkerSpec(job.recipe, settings, architecture, patterns, allocation.num_workers)


def agreed_fingerprint(workers: list[WorkerInfo]) -> dict[str, str]:
    """Returns the fingerprint that all workers share. Raises CheckpointError if their source, recipe or library versions differ."""
    first = workers[0]
    for other in workers[1:]:
        for key, value in first.fingerprint.items():
            if other.fingerprint.get(key) != value:
                raise CheckpointError(
                    f"the workers on {first.host} and {other.host} do not agree on {key}: {value} and {other.fingerprint.get(key)};"
                    " give all of them the same model, libraries and kind of device"
                )
    return first.fingerprint
