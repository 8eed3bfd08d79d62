"""Where a worker keeps the activations that wait for their turn: host memory up to a budget, then files on a disk.

A store lives as long as its process. It holds no resume state: nothing is synced, and what a killed process leaves behind is garbage.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from awqdist.errors import OffloadError
from awqdist.offload.files import FileStore, Medium, OwnFolder, PlainFiles
from awqdist.offload.nvme import DeepNvme


class Store(Protocol):
    """Tensors by key. Keys become file names: letters, digits, dots and dashes. All methods may be called from several threads."""

    def put(self, key: str, tensor: Tensor) -> None:
        """Stores a tensor in place of what the key held before.

        Args:
            tensor: on the CPU, of any dtype and shape; not modified by anyone from now on.

        Raises:
            OffloadError: it does not fit. A store that writes in the background may raise for an earlier tensor.
        """

    def get(self, key: str) -> Tensor:
        """Returns the tensor, bit for bit. It stays in the store and must not be modified. Raises OffloadError if damaged or missing."""

    def prefetch(self, key: str) -> None:
        """Starts reading a tensor that `get` will ask for soon. Does not wait; ignores unknown keys."""

    def drop(self, key: str) -> None:
        """Removes a tensor; ignores unknown keys."""

    @property
    def num_bytes(self) -> int:
        """Returns the total size of the stored tensors, in bytes."""

    def close(self) -> None:
        """Removes everything. Tensors that are put afterwards are discarded."""


class MemoryStore:
    """Keeps tensors in host memory up to a budget and moves the rest to another store, if there is one.

    Chunks are needed in the order in which they were put. When memory is full, the newest is therefore needed last, and the newest
    goes to disk: of C chunks, k of which fit, each layer moves C - k. Evicting the oldest, as caches do, would move all of them.
    """

    def __init__(self, budget_bytes: int | None = None, below: Store | None = None, *, pinned: bool = False) -> None:
        """
        Args:
            budget_bytes: of host memory; None for no limit.
            below: takes what does not fit; closed with this store.
            pinned: use page-locked memory, from which a GPU copies directly.
        """
        self._budget_bytes, self._below, self._pinned = budget_bytes, below, pinned
        self._tensors: dict[str, Tensor] = {}
        self._num_bytes = 0
        self._lock = threading.Lock()

    def put(self, key: str, tensor: Tensor) -> None:
        self.drop(key)
        with self._lock:
            fits = self._budget_bytes is None or self._num_bytes + tensor.nbytes <= self._budget_bytes
            if fits:
                self._num_bytes += tensor.nbytes
                self._tensors[key] = tensor.pin_memory() if self._pinned else tensor
        if fits:
            return
        if self._below is None:
            raise OffloadError(
                f"{key} of {tensor.nbytes:,} bytes does not fit into memory: {self._num_bytes:,} of {self._budget_bytes:,} bytes"
                " are in use; raise --cpu-memory, or use --offload disk"
            )
        self._below.put(key, tensor)

    def get(self, key: str) -> Tensor:
        tensor = self._tensors.get(key)
        if tensor is not None:
            return tensor
        if self._below is None:
            raise OffloadError(f"{key} is not stored in memory; this is a bug in awqdist")
        return self._below.get(key)

    def prefetch(self, key: str) -> None:
        if self._below is not None and key not in self._tensors:
            self._below.prefetch(key)

    def drop(self, key: str) -> None:
        with self._lock:
            tensor = self._tensors.pop(key, None)
            if tensor is not None:
                self._num_bytes -= tensor.nbytes
        if self._below is not None:
            self._below.drop(key)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes + (self._below.num_bytes if self._below is not None else 0)

    def close(self) -> None:
        with self._lock:
            self._tensors, self._num_bytes = {}, 0
        if self._below is not None:
            self._below.close()


def open_store(
    level: str, base: Path, budget_bytes: int | None, warn: Callable[[str], None], *, pinned: bool = False
) -> Store:
    """Returns an empty store, to be closed by the caller.

    Args:
        level: one of LEVELS: memory only, or memory and then plain files, or memory and then files through DeepNVMe.
        base: folder in which a new folder for the files is made.
        budget_bytes: of host memory; None for no limit.
        warn: called once if plain files are used because DeepNVMe is not available.
        pinned: use page-locked memory, for a worker with a GPU.

    Raises:
        OffloadError: the folder cannot be made.
    """
    if level == "cpu":
        return MemoryStore(budget_bytes, pinned=pinned)
    folder = OwnFolder(base)
    medium: Medium = PlainFiles(pinned=pinned)
    if level == "nvme":
        try:
            medium = DeepNvme(folder.path)
        except OffloadError as error:
            warn(f"DeepNVMe is not available: {error}; using plain files in {base} instead")
        except BaseException:
            folder.remove()
            raise
    return MemoryStore(budget_bytes, FileStore(folder, medium), pinned=pinned)
