"""Keeps tensors that do not fit the device in host memory, and copies them to the device piece by piece.

The arithmetic is the same, on the same pieces, wherever they are kept. So the results are equal in every bit, except where a matrix
is factorised by the host's library because not even one of them fits the device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Lend = Callable[[Tensor], Tensor]  # copies a tensor from host memory to the device

HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class HostMemory:
    """How tensors in host memory get to the device.

    lend: copies one there; whole_matrices: whether a Gram matrix and its factor fit there whole, or are factorised by the host.
    """

    lend: Lend
    whole_matrices: bool = True


class LentTensors(Mapping[str, Tensor]):
    """Tensors by name, which are copied to the device when they are asked for.

    resting: the tensors where they are kept; lent: the names of those in host memory.
    """

    def __init__(self, resting: Mapping[str, Tensor], lent: Collection[str] = (), lend: Lend | None = None) -> None:
        self.resting = resting
        self._lent, self._lend = lent, lend

    def lend_of(self, name: str) -> Lend | None:
        """Returns what copies a tensor to the device, or None if it is there."""
        return self._lend if name in self._lent else None

    def __getitem__(self, name: str) -> Tensor:
        lend = self.lend_of(name)
        return self.resting[name] if lend is None else lend(self.resting[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.resting)

    def __len__(self) -> int:
        return len(self.resting)
