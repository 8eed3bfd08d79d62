"""What a worker keeps beside the layer it works on, boundary chunks above all: one contract for memory, disks and both.

A store lasts as long as its process. It is no resume state: nothing is synced, and what a killed process leaves behind is garbage.
All methods may be called from several threads.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Store(Protocol):
    """Tensors by key. Keys are names of files as well: letters, digits, dots and dashes."""

    def put(self, key: str, tensor: Tensor) -> None:
        """Keeps a CPU tensor of any dtype and shape, which nobody changes from now on; it takes the place of what had the key before.

        Raises OffloadError if it does not fit. A store that writes in the background may raise for an earlier tensor.
        """

    def get(self, key: str) -> Tensor:
        """The tensor, equal in every bit. It stays in the store and is not to be changed. Raises OffloadError if it is damaged or gone."""

    def prefetch(self, key: str) -> None:
        """Says that `get` comes soon. Does not wait; a key that is not there is passed over."""

    def drop(self, key: str) -> None:
        """Forgets a tensor; a key that is not there is passed over."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors that are kept."""

    def close(self) -> None:
        """Drops everything. What is put from now on is thrown away."""


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a CPU tensor: (num_bytes,) uint8, sharing its memory where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
