"""Where the chunks that a neighbour sends wait until the worker takes them."""

from __future__ import annotations

import threading

from torch import Tensor

from awqdist.errors import AwqdistError
from awqdist.offload.store import MemoryStore, Store
from awqdist.run.ring import RingBroken


class Inbox:
    """Chunks by (layer, chunk). Threads of a transport put, the worker takes. At most all chunks of the calibration set lie in it.

    store: belongs to the inbox; private memory of this process if not given.
    """

    def __init__(self, store: Store | None = None) -> None:
        self._store = store or MemoryStore()
        self._there: set[tuple[int, int]] = set()
        self._changed = threading.Condition()
        self.broken: str | None = None  # why nothing will come any more
        self._failure: AwqdistError | None = None
        self._closed = False

    def put(self, layer: int, chunk: int, hidden: Tensor) -> None:
        """May wait for a disk. What cannot be kept is told to the worker, not to the sender."""
        try:
            if not self._closed:
                self._store.put(_key(layer, chunk), hidden)
        except AwqdistError as error:
            self._failure = error
        with self._changed:
            self._there.add((layer, chunk))
            self._changed.notify_all()

    def take(self, layer: int, chunk: int) -> Tensor:
        """Waits for a chunk. Raises RingBroken once it will not come any more, and OffloadError if it could not be kept."""
        with self._changed:
            self._changed.wait_for(lambda: self.broken is not None or (layer, chunk) in self._there)
            self.check()
            if self._failure is not None:
                raise self._failure
            self._there.remove((layer, chunk))
        hidden = self._store.get(_key(layer, chunk))
        self._store.drop(_key(layer, chunk))
        self._store.prefetch(_key(layer, chunk + 1))
        return hidden

    def break_off(self, reason: str) -> None:
        """From now on nothing is waited for."""
        with self._changed:
            self.broken = self.broken or reason
            self._changed.notify_all()

    def check(self) -> None:
        """Raises RingBroken if it was broken off."""
        if self.broken is not None:
            raise RingBroken(self.broken)

    def close(self) -> None:
        """Nothing is taken any more; what still comes is thrown away."""
        self._closed = True
        self._store.close()


def _key(layer: int, chunk: int) -> str:
    return f"inbox-{layer:05d}-chunk-{chunk:06d}"
