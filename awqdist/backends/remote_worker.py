"""A worker that is called from afar: by a driver that deals its layers and listens, and by the neighbour that delivers chunks.

A run may take several attempts: when a worker is lost, the others are stopped, keep their process, and begin again with another assignment.
Chunks that still come from an earlier attempt are thrown away.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from socket import gethostname

import torch
from torch import Tensor

from awqdist.backends.inbox import Inbox
from awqdist.backends.room import Room
from awqdist.errors import CheckpointError
from awqdist.model.registry import register_mappings, registered_mappings
from awqdist.recipe import MappingPattern, Recipe
from awqdist.run.chunks import open_chunk_store
from awqdist.run.events import Event, Message
from awqdist.run.job import Job, fingerprint, prepare, with_threads
from awqdist.run.ring import Assignment, RingBroken, work
from awqdist.run.shared_folder import answer_token
from awqdist.settings import RunSettings

Deliver = Callable[[int, int, Tensor], None]  # layer, chunk, hidden -> the neighbour has it

_CHUNKS_ON_THEIR_WAY = 2  # from one worker to the next


@dataclass(frozen=True, slots=True)
class Introduction:
    """Who a worker is. fingerprint: of its job, which must be the same for all."""

    host: str
    device: str
    fingerprint: dict[str, str]


@dataclass(frozen=True, slots=True)
class Order:
    """What the workers of one run have in common. patterns: of an architecture that the user registered mappings for."""

    recipe: Recipe
    settings: RunSettings
    architecture: str
    patterns: tuple[MappingPattern, ...] | None
    num_workers: int


class RemoteWorker:
    """One per process. `work` runs in one thread, everything else in others. samples: (N, L), the same for all."""

    def __init__(self, number: int, order: Order, samples: Tensor) -> None:
        if order.settings.threads:
            torch.set_num_threads(order.settings.threads)
        if order.patterns is not None:
            register_mappings(order.architecture, order.patterns)
        self._number, self._order, self._samples = number, order, samples
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._inboxes: dict[int, Inbox] = {}
        self._lock = threading.Lock()

    def introduce(self, token: str) -> Introduction:
        """Proves that the model and the leader's output folder are in sight. Raises AwqdistError."""
        self._job: Job = prepare(self._order.recipe, self._order.settings)
        answer_token(self._job.settings.output, token, self._number)
        return Introduction(gethostname(), str(self._job.device), fingerprint(self._job, self._samples))

    def work_and_deliver(self, attempt: int, assignment: Assignment, deliver: Deliver) -> str | None:
        """Does an assignment. Returns None, or why it did not come to its end: the attempt was stopped, or a chunk could not be delivered.

        Raises AwqdistError.
        """
        inbox = self._inbox(attempt)
        with ThreadPoolExecutor(_CHUNKS_ON_THEIR_WAY) as outbox:
            try:
                work(self._job, self._samples, assignment, _Outlet(inbox, outbox, deliver), self.emit)
            except RingBroken as broken:
                outbox.shutdown(wait=False, cancel_futures=True)
                return str(broken)
            finally:
                inbox.close()
        return inbox.broken  # by the last chunks, for which the worker did not wait

    def put(self, attempt: int, layer: int, chunk: int, hidden: Tensor) -> None:
        """Takes a chunk in for this or a coming attempt. hidden: (B, L, H), private."""
        self._inbox(attempt).put(layer, chunk, hidden)

    def stop(self, attempt: int) -> None:
        """Ends an attempt as soon as what is being searched is written."""
        self._inbox(attempt).break_off("the attempt was stopped")

    def messages(self, patience_s: float) -> list[Message]:
        """The messages since the last call; waits up to `patience_s` for the first."""
        found: list[Message] = []
        try:
            found.append(self._messages.get(timeout=patience_s) if patience_s else self._messages.get_nowait())
            while True:
                found.append(self._messages.get_nowait())
        except queue.Empty:
            return found

    def emit(self, event: Event) -> None:
        self._messages.put(Message(event, self._number, time.time()))

    def _inbox(self, attempt: int) -> Inbox:
        with self._lock:
            newest = max(self._inboxes, default=0)
            if attempt < newest:
                return Inbox()  # nobody will look into it
            if attempt not in self._inboxes:
                for old in self._inboxes.values():
                    old.close()
                store = open_chunk_store(self._job, self._order.num_workers)  # the worker's own store warns
                self._inboxes = {attempt: Inbox(store)}
            return self._inboxes[attempt]


class _Outlet:
    """The transport: chunks that come in lie in the inbox; those that go out wait for one of a few threads to deliver them."""

    def __init__(self, inbox: Inbox, outbox: ThreadPoolExecutor, deliver: Deliver) -> None:
        self._inbox, self._outbox, self._deliver = inbox, outbox, deliver
        self.receive, self.check = inbox.take, inbox.check

    def send(self, layer: int, chunk: int, hidden: Tensor) -> None:
        self._outbox.submit(self._delivered, layer, chunk, hidden)

    def _delivered(self, layer: int, chunk: int, hidden: Tensor) -> None:
        try:
            self._deliver(layer, chunk, hidden)
        except Exception as error:  # whatever it is: the neighbour will wait in vain, and so does the ring
            self._inbox.break_off(f"a chunk could not be delivered: {error}")
            raise


def order_for(job: Job, room: Room) -> Order:
    """The job for all workers: paths that hold from anywhere, and device and number of threads settled."""
    settings = replace(
        with_threads(job.settings, room.threads),
        device="cuda" if room.on_gpu else "cpu",
        model=job.settings.model.resolve(),
        output=job.settings.output.resolve(),
        offload_dir=job.settings.offload_dir and job.settings.offload_dir.absolute(),
    )
    architecture = job.skeleton.architecture
    config = job.skeleton.model.config.get_text_config(decoder=True)
    return Order(job.recipe, settings, architecture, registered_mappings(architecture, config), room.num_workers)


def agreed(introductions: list[Introduction]) -> dict[str, str]:
    """The fingerprint of all workers. Raises CheckpointError if they do not have the same source, recipe or library versions."""
    first = introductions[0]
    for other in introductions[1:]:
        for key, value in first.fingerprint.items():
            if other.fingerprint.get(key) != value:
                raise CheckpointError(
                    f"the workers on {first.host} and {other.host} do not agree on {key}: {value} and {other.fingerprint.get(key)};"
                    " give all of them the same model, libraries and kind of device"
                )
    return first.fingerprint


def with_device(job: Job, kind: str) -> Job:
    """The job as the workers see it, for a leader that may have no such device itself."""
    return replace(job, device=torch.device(kind))
