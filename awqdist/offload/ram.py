"""Host memory as a store, up to a budget."""

from __future__ import annotations

import threading

from torch import Tensor

from awqdist.errors import OffloadError
from awqdist.offload.store import size_of


class RamStore:
    """budget_bytes: None for no limit; pinned: page-locked, so that a GPU copies from it without a detour."""

    def __init__(self, budget_bytes: int | None = None, *, pinned: bool = False) -> None:
        self._budget_bytes, self._pinned = budget_bytes, pinned
        self._tensors: dict[str, Tensor] = {}
        self._num_bytes = 0
        self._lock = threading.Lock()

    def put(self, key: str, tensor: Tensor) -> None:
        if not self.put_if_it_fits(key, tensor):
            raise OffloadError(
                f"{key} of {size_of(tensor):,} bytes does not fit into memory: {self._num_bytes:,} of {self._budget_bytes:,} bytes"
                " are taken; give more --cpu-memory, or use --offload disk"
            )

    def put_if_it_fits(self, key: str, tensor: Tensor) -> bool:
        """Keeps the tensor and returns True, or returns False. Whatever had the key before is dropped in either case."""
        self.drop(key)
        num_bytes = size_of(tensor)
        with self._lock:
            if self._budget_bytes is not None and self._num_bytes + num_bytes > self._budget_bytes:
                return False
            self._num_bytes += num_bytes
            self._tensors[key] = tensor.pin_memory() if self._pinned else tensor
        return True

    def get(self, key: str) -> Tensor:
        tensor = self.find(key)
        if tensor is None:
            raise OffloadError(f"{key} is not kept in memory; this is a bug of awqdist")
        return tensor

    def find(self, key: str) -> Tensor | None:
        with self._lock:
            return self._tensors.get(key)

    def prefetch(self, key: str) -> None:
        """It is here."""

    def drop(self, key: str) -> None:
        with self._lock:
            tensor = self._tensors.pop(key, None)
            if tensor is not None:
                self._num_bytes -= size_of(tensor)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def close(self) -> None:
        with self._lock:
            self._tensors, self._num_bytes = {}, 0
