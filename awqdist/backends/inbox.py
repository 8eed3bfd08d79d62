"""Holds the chunks that a neighbour has sent until the worker takes them."""

from __future__ import annotations

import threading

from torch import Tensor

from awqdist.errors import AwqdistError
from awqdist.offload.store import MemoryStore, Store
from awqdist.run.worker import RingBroken


class Inbox:
    """Chunks by (layer, chunk). Transport threads call `put`, the worker calls `take`."""

    def __init__(self, store: Store | None = None) -> None:
        """store: where chunks wait, closed with the inbox; None for host memory."""
        self._store = store or MemoryStore()
        self._arrived: set[tuple[int, int]] = set()
        self._changed = threading.Condition()
        self._failure: AwqdistError | None = None
        self._closed = False
        self.broken: str | None = None  # why no more chunks will come

    def put(self, layer: int, chunk: int, hidden: Tensor) -> None:
        """Stores an input of `layer`, (B, L, H) on the CPU; may wait for a disk. If that fails, `take` raises the error, not `put`."""
        try:
            if not self._closed:
                self._store.put(_key(layer, chunk), hidden)
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
        hidden = self._store.get(_key(layer, chunk))
        self._store.drop(_key(layer, chunk))
        self._store.prefetch(_key(layer, chunk + 1))
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


def _key(layer: int, chunk: int) -> str:
    return f"inbox-{layer:05d}-chunk-{chunk:06d}"
