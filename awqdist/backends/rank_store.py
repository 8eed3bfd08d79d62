"""What the ranks of a launcher tell each other besides chunks: values that the leader shares, values that it gathers, and messages. All of
it goes through the launcher's key-value store, under a prefix of this start: after a restart nobody reads what an earlier one left."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from torch import distributed
from torch.distributed import PrefixStore, rendezvous

from awqdist.backends.room import launcher_value
from awqdist.errors import AwqdistError
from awqdist.run.events import Message

_MESSAGES = "messages"
_POLL_S = 0.05
_LEAVING_S = 10.0  # how long a leader waits for the others' last word
T = TypeVar("T")


class RankStore:
    """The store as one rank sees it. Raises AwqdistError where the leader is gone."""

    def __init__(
        self, store: Any, rank: int, num_ranks: int
    ) -> None:  # a Store; its stubs know neither bytes nor queues
        self.store, self.rank, self.num_ranks = store, rank, num_ranks
        self._num_shared = 0

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def share(self, make: Callable[[], T], part: Callable[[T], Any] = lambda value: value) -> T:
        """Leader: makes something, and shares it, or a part of it, with all ranks. An error of `make` is theirs as well."""
        key = self._next_key()
        try:
            value = make()
        except AwqdistError as error:
            self.store.set(key, pickle.dumps((None, str(error))))
            self._await_readers(key)
            raise
        self.store.set(key, pickle.dumps((part(value), None)))
        return value

    def leave(self) -> None:
        """Called by all when nothing more will be shared. The leader's process may hold the store: it leaves last."""
        key = self._next_key()
        if self.is_leader:
            self._await_readers(key)
        else:
            self.store.set(f"{key}/{self.rank}", b"")

    def shared(self) -> Any:
        """Others: what the leader shares next. Raises AwqdistError if making it failed there."""
        key = self._next_key()
        value, reason = pickle.loads(self._await(key))
        if reason is not None:
            self.store.set(f"{key}/{self.rank}", b"")
            raise AwqdistError(f"rank 0 gave up: {reason}")
        return value

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in the leader, an empty list elsewhere."""
        key = self._next_key()
        self.store.set(f"{key}/{self.rank}", pickle.dumps(value))
        ranks = range(self.num_ranks) if self.is_leader else ()
        return [pickle.loads(self._await(f"{key}/{rank}")) for rank in ranks]

    def _await_readers(self, key: str) -> None:
        """Waits a while until all others have set theirs; who does not is gone."""
        until = time.monotonic() + _LEAVING_S
        theirs = [f"{key}/{rank}" for rank in range(1, self.num_ranks)]
        while theirs and not self.store.check(theirs) and time.monotonic() < until:
            time.sleep(_POLL_S)

    def _next_key(self) -> str:
        """All ranks share and gather in the same order."""
        self._num_shared += 1
        return f"shared/{self._num_shared}"

    def _await(self, key: str) -> bytes:
        try:
            while not self.store.check([key]):
                time.sleep(_POLL_S)
            return bytes(self.store.get(key))
        except distributed.DistError as error:
            raise AwqdistError(f"the launcher's store is gone: {error}; the same command resumes") from None


class Teller:
    """Sends messages to the leader, in order, from any thread. The last thing it sends is how the rank ended."""

    def __init__(self, ranks: RankStore) -> None:
        self._store, self._rank = ranks.store.clone(), ranks.rank
        self._lock = threading.Lock()

    def tell(self, message: Message) -> None:
        self._push("message", message.to_json())

    def end(self, error: str | None) -> None:
        with suppress(distributed.DistError):
            self._push("end", error)

    def _push(self, kind: str, value: str | None) -> None:
        with self._lock:
            self._store.queue_push(_MESSAGES, pickle.dumps((self._rank, kind, value)))


class Listener:
    """The leader's thread that takes the messages of the other ranks until all have ended.

    on_message: given each of them; on_failure: told once, if a rank ended with an error or `on_message` raised one.
    """

    def __init__(
        self, ranks: RankStore, on_message: Callable[[Message], None], on_failure: Callable[[str], None]
    ) -> None:
        self._store = ranks.store.clone()
        self._waited_for = set(range(1, ranks.num_ranks))
        self._on_message, self._on_failure = on_message, on_failure
        self.failure: str | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until all ranks have ended. Raises AwqdistError if one of them failed."""
        self._thread.join()
        if self.failure is not None:
            raise AwqdistError(self.failure)

    def stop(self) -> None:
        """Takes what has come, and no more."""
        self._over.set()
        self._thread.join()

    def _listen(self) -> None:
        try:
            while self._waited_for:
                if not self._take_one() and self._over.wait(_POLL_S):
                    return
        except (AwqdistError, distributed.DistError) as error:
            self._fail(str(error))

    def _take_one(self) -> bool:
        if not self._store.queue_len(_MESSAGES):
            return False
        rank, kind, value = pickle.loads(self._store.queue_pop(_MESSAGES, block=False))
        if kind == "message":
            self._on_message(Message.from_json(value))
            return True
        self._waited_for.discard(rank)
        if value is not None:
            self._fail(value)
        return True

    def _fail(self, reason: str) -> None:
        self.failure = self.failure or reason
        self._on_failure(reason)


def joined_ranks() -> RankStore:
    """The ranks that a launcher's variables speak of. Raises AwqdistError if they are incomplete."""
    values = {name: launcher_value(name) for name in ("RANK", "WORLD_SIZE")}
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    missing += [name for name, value in values.items() if value is None]
    if missing:
        raise AwqdistError(
            f"the torchrun backend needs a launcher: {', '.join(missing)} not set; see launch/torchrun.sh, or give --backend local"
        )
    rank, num_ranks = int(values["RANK"] or 0), int(values["WORLD_SIZE"] or 1)
    store, _, _ = next(rendezvous("env://", rank, num_ranks))
    return RankStore(PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store), rank, num_ranks)
