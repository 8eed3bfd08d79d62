"""What of a layer lies in host memory while it is worked on, since the device has no room for it: chosen level by level."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.quant.lending import HostMemory, Lend


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
