"""Memory first, and below it a disk: what does not fit the budget of the one lies in the other."""

from __future__ import annotations

from torch import Tensor

from awqdist.offload.ram import RamStore
from awqdist.offload.store import Store


class TieredStore:
    """Keeps in `ram` what fits, and moves the rest down to `below`.

    Chunks come round: they are needed in the order in which they were put. So when memory is full it is the newest that is needed least
    soon, and the newest that goes down. Of C chunks, k of which fit, each layer moves C - k; making room by putting the oldest down, as
    caches do, would move all of them.
    """

    def __init__(self, ram: RamStore, below: Store) -> None:
        self._ram, self._below = ram, below

    def put(self, key: str, tensor: Tensor) -> None:
        if self._ram.put_if_it_fits(key, tensor):
            self._below.drop(key)
        else:
            self._below.put(key, tensor)

    def get(self, key: str) -> Tensor:
        tensor = self._ram.find(key)
        return self._below.get(key) if tensor is None else tensor

    def prefetch(self, key: str) -> None:
        if self._ram.find(key) is None:
            self._below.prefetch(key)

    def drop(self, key: str) -> None:
        self._ram.drop(key)
        self._below.drop(key)

    @property
    def num_bytes(self) -> int:
        return self._ram.num_bytes + self._below.num_bytes

    def close(self) -> None:
        self._ram.close()
        self._below.close()
