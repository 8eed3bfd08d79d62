"""What error compensation will leave of a rounding error: the search's criterion under GPTQ.

GPTQ pushes the error of each input onto those that are rounded after it, as far as these predict it. What stays of an error d of input i
is d²·vᵢ, where vᵢ is the second moment of what the later inputs do not tell of input i: 1 / (U_ii)² with Uᵀ·U = (H + λI)⁻¹, or (L_ii)²
where H + λI, taken backwards, is L·Lᵀ. So the error of a candidate is Σ D²·v instead of Σ (D·H) ∘ D.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from awqdist.quant.factor import reversed_cholesky, rounding_order
from awqdist.quant.stats import Statistics
from awqdist.recipe import Rounding


class _WithGram(Statistics, Protocol):
    def gram(self) -> Tensor:
        """(I, I) float32."""


class CompensatedStatistics:
    """Statistics of an input site whose linears will be rounded with error compensation."""

    def __init__(self, statistics: _WithGram, rounding: Rounding) -> None:
        self._statistics, self._rounding = statistics, rounding

    @property
    def mean_abs(self) -> Tensor:
        """(I,) float32: mean |x| of every channel."""
        return self._statistics.mean_abs

    is_sketch = False

    @cached_property
    def variances(self) -> Tensor:
        """v, (I,) float32. Raises NumericalError where the Gram matrix cannot be factorised."""
        gram = self._statistics.gram()
        order = rounding_order(gram, self._rounding)
        lower, _ = reversed_cholesky(gram, order, self._rounding.dampening_frac)
        variances = gram.new_empty(gram.shape[0])
        variances[order.flip(0)] = lower.diagonal().square()
        return variances.to(self.mean_abs.device)

    def row_errors(self, difference: Tensor) -> Tensor:
        """What is left of the output error of every row of difference (O, I) float32: (O,) float64."""
        return stacked_row_errors([self], difference.unsqueeze(0))[0]

    rough_row_errors = row_errors

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Nothing has to be made."""
        yield


def stacked_row_errors(statistics: Sequence[CompensatedStatistics], difference: Tensor) -> Tensor:
    """`row_errors` of B sites at a time: (B, r) float64 for difference (B, r, I)."""
    variances = torch.stack([s.variances for s in statistics]).unsqueeze(2)  # (B, I, 1)
    return (difference.square() @ variances).squeeze(2).double()
