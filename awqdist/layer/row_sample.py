"""Some of the rows that go by, evenly spaced, however they are cut into chunks."""

from __future__ import annotations

import torch
from torch import Tensor


class RowSample:
    """At most `num_kept` of `num_rows` rows in all. home: where they are kept, None for where they come from."""

    def __init__(self, num_kept: int, num_rows: int, home: torch.device | None = None) -> None:
        self._step = max(1, -(-num_rows // num_kept))
        self._home = home
        self._num_seen = 0
        self._rows: list[Tensor] = []

    def add(self, activations: Tensor) -> None:
        """activations: (..., H)."""
        flat = activations.detach().reshape(-1, activations.shape[-1])
        kept = flat[-self._num_seen % self._step :: self._step]
        self._num_seen += flat.shape[0]
        self._rows.append(kept.to(self._home or kept.device, copy=True))

    def take(self) -> Tensor:
        """(m, H), which are given up."""
        rows = torch.cat(self._rows)
        self._rows = []
        return rows
