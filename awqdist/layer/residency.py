"""Says which buffers of a layer are offloaded to host memory under --gpu-memory, and gives freed host memory back."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from awqdist.quant.lending import HostMemory, Lend

_IDLE_BYTES = 64 << 20  # by which resident memory grows before freed memory is given back


@dataclass(frozen=True, slots=True)
class Residency:
    """experts: their weights, the rows that they are given and their codes; matrices: the Gram matrices, or the rows kept instead; factors:
    not even one such matrix and its factor are on the device, but factorised by the host."""

    experts: bool = False
    matrices: bool = False
    factors: bool = False

    def __str__(self) -> str:
        names = [name for name in ("experts", "matrices", "factors") if getattr(self, name)]
        return ", ".join(names)

    def for_matrices(self, lend: Lend) -> HostMemory | None:
        return HostMemory(lend, whole_matrices=not self.factors) if self.matrices else None

    def for_experts(self, lend: Lend) -> HostMemory | None:
        return HostMemory(lend) if self.experts else None


LEVELS = (
    Residency(),
    Residency(matrices=True),
    Residency(experts=True),
    Residency(experts=True, matrices=True),
    Residency(matrices=True, factors=True),
    Residency(experts=True, matrices=True, factors=True),
)  # of more and more moved down, at more and more cost


@dataclass(frozen=True, slots=True)
class Bench:
    """Where a layer is worked on, in which dtype it is run, and what is lent there from host memory."""

    device: torch.device
    dtype: torch.dtype
    residency: Residency

    def lend(self, tensor: Tensor) -> Tensor:
        return lent(tensor, self.device)


def lent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor in host memory, on the device."""
    return tensor.to(device)


def resident_bytes() -> int:
    """Returns the resident memory of this process; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


class _Heap:
    """Freed memory is given back once there may be much of it: pages that go and come again cost more than the arithmetic of a small
    model."""

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
        self._before = 0

    def release(self) -> None:
        if self._trim is not None and resident_bytes() > self._before + _IDLE_BYTES:
            self._trim(0)
            self._before = resident_bytes()


_heap = _Heap()


def release_host_memory() -> None:
    """Gives freed memory back to the system. glibc keeps blocks below 32 MB for itself, which adds up over many layers."""
    _heap.release()
