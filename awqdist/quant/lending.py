"""What does not fit the device lies in host memory, and is lent to the device piece by piece.

The arithmetic is the same, on the same pieces, wherever they lie: the results are equal in every bit, except where a matrix is factorised
by another library because not even one of them fits the device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Lend = Callable[[Tensor], Tensor]  # a tensor in host memory -> its values on the device, for as long as they are used

HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class HostMemory:
    """For what lies there. whole_matrices: whether a Gram matrix and its factor may be lent whole; else they are factorised here."""

    lend: Lend
    whole_matrices: bool = True


class LentTensors(Mapping[str, Tensor]):
    """Tensors by name, on the device when they are asked for. resting: where they lie; lent: the names of those in host memory."""

    def __init__(self, resting: Mapping[str, Tensor], lent: Collection[str] = (), lend: Lend | None = None) -> None:
        self.resting = resting
        self._lent, self._lend = lent, lend

    def lend_of(self, name: str) -> Lend | None:
        """How a tensor gets to the device; None: it is there."""
        return self._lend if name in self._lent else None

    def __getitem__(self, name: str) -> Tensor:
        lend = self.lend_of(name)
        return self.resting[name] if lend is None else lend(self.resting[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.resting)

    def __len__(self) -> int:
        return len(self.resting)
