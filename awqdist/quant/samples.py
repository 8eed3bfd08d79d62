"""Rows of stacked weights that stand for all of them, and what candidates for the scales do to these.

A sample takes the rows with the largest error under the identity, and evenly spaced ones of the others, counted for those between them.
(Evenly spaced rows alone chose scales up to 28 % worse on a model with outliers: few rows carry most of the error.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.quant.grid import rounding_difference
from awqdist.quant.stacks import RowErrors
from awqdist.recipe import WeightScheme

_BLOCK_ELEMENTS = {
    "cpu": 1 << 20,
    "cuda": 1 << 22,
}  # of the differences that are multiplied at a time, of several candidates


@dataclass(frozen=True, slots=True)
class WeightSample:
    """weight: (B, r, I); counts: how many rows each stands for, (r,) float64; rough: tells errors of changes (B, n, I)."""

    weight: Tensor
    counts: Tensor
    scheme: WeightScheme
    rough: RowErrors

    def errors(self, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Of all rows, as far as these tell, under scales (n, K, I), K being 1 or B: (n, B) float64. dtype: of the group scales."""
        num_groups, size, width = self.weight.shape
        most = _BLOCK_ELEMENTS[self.weight.device.type]
        found = []
        for part in scales.split(max(1, most // self.weight.numel())):
            num_tried = part.shape[0]
            each = part.expand(-1, num_groups, -1).transpose(0, 1).flatten(0, 1)  # (B·n, I)
            weight = self.weight.repeat_interleave(num_tried, 0)  # (B·n, r, I)
            differences = rounding_difference(weight, each, self.scheme, dtype)
            errors = self.rough(differences.view(num_groups, -1, width))  # (B, n·r)
            found.append(errors.unflatten(1, (num_tried, size)) @ self.counts)
        return torch.cat(found, 1).T


def sample_rows(weight: Tensor, importance: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Rows of every group, (B, r, I), and how many rows each stands for, (r,) float64, see `sampled_rows`.

    weight: (B, R, I); importance: (B, R).
    """
    if num_rows >= weight.shape[1]:
        return weight, importance.new_ones(weight.shape[1], dtype=torch.float64)
    rows, counts = sampled_rows(importance, num_rows)
    return weight[torch.arange(weight.shape[0], device=weight.device).unsqueeze(1), rows], counts


def sampled_rows(importance: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The numbers of rows of every group, (B, r) int64, and how many rows each stands for, (r,) float64; r is `num_rows`, or R if that is
    less. importance: (B, R), which grows with a row's error."""
    num_groups, total = importance.shape
    if num_rows >= total:
        rows = torch.arange(total, device=importance.device).expand(num_groups, -1)
        return rows, importance.new_ones(total, dtype=torch.float64)
    half = num_rows // 2
    spaced = torch.arange(num_rows - half, device=importance.device) * (total - half) // (num_rows - half)
    order = torch.argsort(importance, dim=1, descending=True, stable=True)
    counts = importance.new_ones(num_rows, dtype=torch.float64)
    counts[half:] = (total - half) / (num_rows - half)
    return torch.cat([order[:, :half], order[:, half + spaced]], 1), counts


def total_error(samples: Sequence[WeightSample], scales: Tensor, dtype: torch.dtype, *, shared: bool) -> Tensor:
    """Errors under scales (n, K, I), summed over the samples, and over their groups where one set of scales serves all: (n, K)."""
    errors = [sample.errors(scales, dtype) for sample in samples]
    return torch.stack([e.sum(1, keepdim=True) if shared else e for e in errors]).sum(0)
