"""A few rows that stand for many: a CountSketch (arXiv 1207.6365) of the tokens of an input site.

Row b of the sketch S is the sum of every 256th token from the b-th on, each under a random sign. ‖S·Dᵀ‖² is ‖X·Dᵀ‖² on average, and costs
O·I·256 instead of the O·I² of a Gram matrix. All candidates are measured with one S, so that they are ranked better than each is measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

SKETCH_ROWS = 256


class Sketch:
    """Of `num_tokens` rows (I,), which may come in chunks of any size. rows: (SKETCH_ROWS, I) float32."""

    def __init__(self, num_inputs: int, num_tokens: int, device: torch.device) -> None:
        self.rows = torch.zeros(SKETCH_ROWS, num_inputs, device=device)
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (num_tokens, 1), generator=generator).mul_(2).sub_(1)
        self._signs = signs.to(device, torch.float32)

    def add(self, rows: Tensor, first_token: int) -> None:
        """Adds token t of rows (T, I) to row t mod SKETCH_ROWS, under the sign of t. first_token: t of the first row."""
        start = 0
        while start < rows.shape[0]:
            token = first_token + start
            bucket = token % SKETCH_ROWS
            length = min(SKETCH_ROWS - bucket, rows.shape[0] - start)
            signs = self._signs[token : token + length]
            self.rows[bucket : bucket + length].addcmul_(rows[start : start + length], signs)
            start += length


def is_sketched(num_inputs: int, num_tokens: int, *, exact: bool) -> bool:
    """Whether all that is kept of an input is its sketch: if it may be, and is smaller than the rows and the Gram matrix."""
    return num_held_rows(num_inputs, num_tokens, exact=exact) < min(num_inputs, num_tokens)


def num_held_rows(num_inputs: int, num_tokens: int, *, exact: bool) -> int:
    """How many rows of I values are kept of an input: of the activations, of their Gram matrix or of their sketch."""
    return min(num_inputs, num_tokens) if exact else min(num_inputs, num_tokens, SKETCH_ROWS)
