"""What the search evaluates: linears stacked to (B, R, I), since their rows are independent of each other.

B is one, or a number of experts that are alike: so many that their batched products keep the device busy, and no more, since this is what
the float32 copies are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.quant.compensated import CompensatedStatistics, stacked_row_errors
from awqdist.quant.experts import ExpertStatistics, StackedSketches
from awqdist.quant.lending import Lend
from awqdist.quant.stats import Statistics
from awqdist.recipe import WeightScheme

BATCH_BYTES = {"cpu": 1 << 23, "cuda": 1 << 28}  # of the float32 weights of a batch of experts

RowErrors = Callable[
    [Tensor], Tensor
]  # what a change of the weights (B, r, I) does to the output, row by row: (B, r) float64


@dataclass(frozen=True, slots=True)
class BalanceWeight:
    """A linear that reads the smoothed tensor. weight: (O, I) float; scheme: None where the recipe leaves it unquantized; lend: if the
    weight lies in host memory."""

    weight: Tensor
    scheme: WeightScheme | None
    lend: Lend | None = None

    def at_hand(self) -> Tensor:
        """The weight on the device of the statistics."""
        return self.weight if self.lend is None else self.lend(self.weight)


@dataclass(frozen=True, slots=True)
class SearchGroup:
    """Balance layers that read the same rows, and the statistics of these."""

    balance: Sequence[BalanceWeight]
    statistics: Statistics

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for groups that can be batched."""
        return tuple((b.weight.shape, b.weight.dtype, b.scheme) for b in self.balance)


@dataclass(frozen=True, slots=True)
class Stack:
    """The linears of B groups under one scheme."""

    groups: Sequence[SearchGroup]
    scheme: WeightScheme

    @property
    def num_rows(self) -> int:
        """Of one group."""
        return sum(b.weight.shape[0] for b in self.groups[0].balance if b.scheme == self.scheme)

    @property
    def is_sketched(self) -> bool:
        return self.groups[0].statistics.is_sketch

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Within it, what is needed for an exact answer is made once."""
        with ExitStack() as stack:
            for group in self.groups:
                stack.enter_context(group.statistics.hold())
            yield

    def weight(self) -> Tensor:
        """(B, R, I) in the checkpoint's dtype, made anew."""
        weights = [b.at_hand() for group in self.groups for b in group.balance if b.scheme == self.scheme]
        return torch.cat(weights).view(len(self.groups), -1, weights[0].shape[1])

    def row_errors(self, difference: Tensor) -> Tensor:
        """The output error of every row of difference (B, r, I) float32: (B, r) float64, exact in float32."""
        compensated = [g.statistics for g in self.groups if isinstance(g.statistics, CompensatedStatistics)]
        if compensated:
            return stacked_row_errors(compensated, difference)
        return torch.stack([g.statistics.row_errors(d) for g, d in zip(self.groups, difference, strict=True)])

    def rough(self) -> RowErrors:
        """`row_errors` to rank by, which for experts is that of their sketches."""
        experts = [g.statistics for g in self.groups if isinstance(g.statistics, ExpertStatistics)]
        if experts:
            for expert in experts:
                expert.keep_sketch()
            return StackedSketches.of(experts).row_errors
        if isinstance(self.groups[0].statistics, CompensatedStatistics):
            return self.row_errors
        return self._rough_row_errors

    def _rough_row_errors(self, difference: Tensor) -> Tensor:
        return torch.stack([g.statistics.rough_row_errors(d) for g, d in zip(self.groups, difference, strict=True)])


def batches(groups: Sequence[SearchGroup]) -> Iterator[list[SearchGroup]]:
    """Groups of experts that are alike together, up to a bound; every other group alone. Those without a quantized linear are left out."""
    batch: list[SearchGroup] = []
    for group in (group for group in groups if any(b.scheme is not None for b in group.balance)):
        device = group.statistics.mean_abs.device.type  # the weights may lie elsewhere
        room = BATCH_BYTES.get(device, 0) // (4 * sum(b.weight.numel() for b in group.balance))
        alone = not isinstance(group.statistics, ExpertStatistics | CompensatedStatistics)
        if batch and (alone or len(batch) >= room or group.kind != batch[0].kind):
            yield batch
            batch = []
        batch.append(group)
        if alone:
            yield batch
            batch = []
    if batch:
        yield batch


def stacked(batch: Sequence[SearchGroup]) -> list[Stack]:
    """A batch by scheme."""
    schemes = dict.fromkeys(b.scheme for b in batch[0].balance if b.scheme is not None)
    return [Stack(batch, scheme) for scheme in schemes]
