"""Keeps buffers of a layer that do not fit the device in host memory, and copies them to the device piece by piece.

The arithmetic is the same, on the same pieces, wherever they are kept. So the results are equal in every bit, except where a matrix
is factorised by the host's library because not even one of them fits the device.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ToDevice = Callable[[Tensor], Tensor]  # copies a tensor from host memory to the device

HOST = torch.device("cpu")
_IDLE_BYTES = 64 << 20  # by which resident memory grows before freed memory is given back
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
_trimmed_at = 0  # resident bytes when freed memory was last given back


@dataclass(frozen=True, slots=True)
class HostMemory:
    """How tensors in host memory get to the device.

    to_device: copies one there; whole_matrices: whether a Gram matrix and its factor fit there whole, or are factorised by the host.
    """

    to_device: ToDevice
    whole_matrices: bool = True


@dataclass(frozen=True, slots=True)
class OnHost:
    """Which buffers of a layer are offloaded to host memory under --gpu-memory.

    experts: their weights, the rows that they are given and their codes; matrices: the Gram matrices, or the rows kept instead; factors:
    not even one such matrix and its factor are on the device, but factorised by the host.
    """

    experts: bool = False
    matrices: bool = False
    factors: bool = False

    def __str__(self) -> str:
        return ", ".join(name for name in ("experts", "matrices", "factors") if getattr(self, name))


OFFLOAD_LEVELS = (
    OnHost(),
    OnHost(matrices=True),
    OnHost(experts=True),
    OnHost(experts=True, matrices=True),
    OnHost(matrices=True, factors=True),
    OnHost(experts=True, matrices=True, factors=True),
)  # of more and more moved down, at more and more cost


@dataclass(frozen=True, slots=True)
class LayerDevice:
    """Where a layer is worked on, in which dtype it is run, and which of its buffers are in host memory."""

    device: torch.device
    dtype: torch.dtype
    on_host: OnHost

    def to_device(self, tensor: Tensor) -> Tensor:
        """Returns a tensor in host memory on the device."""
        return copied(tensor, self.device)

    def memory_of_matrices(self) -> HostMemory | None:
        """Returns how Gram matrices get to the device, or None if they are there."""
        return HostMemory(self.to_device, whole_matrices=not self.on_host.factors) if self.on_host.matrices else None

    def memory_of_experts(self) -> HostMemory | None:
        """Returns how experts get to the device, or None if they are there."""
        return HostMemory(self.to_device) if self.on_host.experts else None


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor in host memory on the device."""
    return tensor.to(device)


class OffloadedTensors(Mapping[str, Tensor]):
    """Tensors by name, which are copied to the device when they are asked for.

    kept: the tensors where they are kept; offloaded: the names of those in host memory.
    """

    def __init__(
        self, kept: Mapping[str, Tensor], offloaded: Collection[str] = (), to_device: ToDevice | None = None
    ) -> None:
        self.kept = kept
        self._offloaded, self._to_device = offloaded, to_device

    def to_device(self, name: str) -> ToDevice | None:
        """Returns what copies a tensor to the device, or None if it is there."""
        return self._to_device if name in self._offloaded else None

    def __getitem__(self, name: str) -> Tensor:
        to_device = self.to_device(name)
        return self.kept[name] if to_device is None else to_device(self.kept[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)


def resident_bytes() -> int:
    """Returns the resident memory of this process; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def release_host_memory() -> None:
    """Gives freed memory back to the system. glibc keeps blocks below 32 MB for itself, which adds up over many layers.

    It does so once there may be much of it: pages that go and come again cost more than the arithmetic of a small model.
    """
    global _trimmed_at
    if _malloc_trim is not None and resident_bytes() > _trimmed_at + _IDLE_BYTES:
        _malloc_trim(0)
        _trimmed_at = resident_bytes()
