"""How the ranks of a launcher communicate: values and messages through the launcher's key-value store, chunks through process groups.

Keys have a prefix of their own for each start of the ranks, so that after a restart nobody reads what an earlier start left.
Every edge of the ring has a process group, a thread that sends and a thread that receives: chunks arrive in the order in which they were
sent, and no transfer waits for another. Chunks travel as bytes, because gloo does not support bfloat16.
"""

from __future__ import annotations

import os
import pickle
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore, ProcessGroup, rendezvous

from awqdist.backends.inbox import Inbox
from awqdist.errors import AwqdistError
from awqdist.offload.store import Store
from awqdist.run.device import launcher_value
from awqdist.run.events import Message
from awqdist.run.worker import Assignment

PATIENCE = timedelta(days=30)  # a neighbour may search for hours; the launcher ends ranks whose neighbour died
_MESSAGES = "messages"
_POLL_S = 0.05
_LEAVE_S = 10.0  # how long the leader waits for the others to read its last value
T = TypeVar("T")


class RankStore:
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


def joined_ranks() -> RankStore:
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
    return RankStore(PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store), rank, num_ranks)


class MessageSender:
    """Sends messages to the leader, in order, from any thread. The last one says how the rank ended."""

    def __init__(self, ranks: RankStore) -> None:
        self._store, self._rank = ranks.store.clone(), ranks.rank
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Sends a message."""
        self._push("message", message.to_json())

    def end(self, error: str | None) -> None:
        """Says that this rank has ended; error: None if all went well."""
        with suppress(distributed.DistError):
            self._push("end", error)

    def _push(self, kind: str, value: str | None) -> None:
        with self._lock:
            self._store.queue_push(_MESSAGES, pickle.dumps((self._rank, kind, value)))


class MessageReceiver:
    """The leader's thread that receives the messages of the other ranks until all of them have ended."""

    def __init__(
        self, ranks: RankStore, on_message: Callable[[Message], None], on_failure: Callable[[str], None]
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


class RankTransport:
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
            self._groups = [distributed.new_group([r, (r + 1) % count], timeout=PATIENCE) for r in range(count)]
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
