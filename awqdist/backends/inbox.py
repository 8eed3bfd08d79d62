"""Where the chunks that a neighbour sends wait until the worker takes them: in the private memory of its process."""

from __future__ import annotations

import threading

from torch import Tensor

from awqdist.run.ring import RingBroken


class Inbox:
    """Chunks by (layer, chunk). Threads of a transport put, the worker takes. At most all chunks of the calibration set lie in it."""

    def __init__(self) -> None:
        self._chunks: dict[tuple[int, int], Tensor] = {}
        self._changed = threading.Condition()
        self.broken: str | None = None  # why nothing will come any more

    def put(self, layer: int, chunk: int, hidden: Tensor) -> None:
        with self._changed:
            self._chunks[layer, chunk] = hidden
            self._changed.notify_all()

    def take(self, layer: int, chunk: int) -> Tensor:
        """Waits for a chunk. Raises RingBroken once it will not come any more."""
        with self._changed:
            self._changed.wait_for(lambda: self.broken is not None or (layer, chunk) in self._chunks)
            self.check()
            return self._chunks.pop((layer, chunk))

    def break_off(self, reason: str) -> None:
        """From now on nothing is waited for."""
        with self._changed:
            self.broken = self.broken or reason
            self._changed.notify_all()

    def check(self) -> None:
        """Raises RingBroken if it was broken off."""
        if self.broken is not None:
            raise RingBroken(self.broken)
