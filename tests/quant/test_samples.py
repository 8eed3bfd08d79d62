"""Samples of rows against all rows, and candidates at once against one after another."""

from __future__ import annotations

import pytest
import torch
from support.quant_oracles import random_weight
from torch import Tensor

from awqdist.quant.grid import rounding_difference
from awqdist.quant.moments import Diagonal
from awqdist.quant.search import WeightSample, sample_rows, total_error
from awqdist.recipe import WeightScheme

SCHEME = WeightScheme(4, symmetric=False, group_size=16)
WIDTH = 64


def weights(num_groups: int, num_rows: int) -> Tensor:
    return torch.stack([random_weight(num_rows, WIDTH, seed) for seed in range(num_groups)])


@pytest.mark.parametrize("num_rows", [8, 9, 50, 99, 100, 300])
def test_a_sample_holds_the_most_important_rows_and_counts_for_all(num_rows: int) -> None:
    weight = weights(2, 100)
    importance = torch.rand(2, 100, generator=torch.Generator().manual_seed(0))
    rows, counts = sample_rows(weight, importance, num_rows)
    assert rows.shape == (2, min(num_rows, 100), WIDTH)
    assert float(counts.sum()) == pytest.approx(100)
    for group in range(2):
        numbers = [weight[group].eq(row).all(1).nonzero().item() for row in rows[group]]
        assert len(set(numbers)) == len(numbers)
        top = importance[group].argsort(descending=True)[: num_rows // 2].tolist()
        assert set(top) <= set(numbers)


@pytest.mark.parametrize("num_sets", [1, 3], ids=["one set of scales for all", "one for each group"])
def test_candidates_at_once_have_the_errors_that_each_has_alone(num_sets: int) -> None:
    weight, num_tried = weights(3, 128), 50  # more than go through at a time
    scales = torch.rand(num_tried, num_sets, WIDTH, generator=torch.Generator().manual_seed(0)) + 0.5
    moments = torch.rand(3, WIDTH, 1, generator=torch.Generator().manual_seed(1))
    counts = torch.arange(128, dtype=torch.float64)
    sample = WeightSample(weight, counts, SCHEME, Diagonal(moments.squeeze(2)))

    found = sample.errors(scales, torch.bfloat16)
    for tried in range(num_tried):
        for group in range(3):
            own = scales[tried, group if num_sets > 1 else 0]
            difference = rounding_difference(weight[group], own, SCHEME, torch.bfloat16).double()
            expected = (difference.square() @ moments[group].double()).squeeze(1) @ counts
            assert float(found[tried, group]) == pytest.approx(float(expected), rel=1e-5)
    shared = total_error([sample, sample], scales, torch.bfloat16, shared=num_sets == 1)
    torch.testing.assert_close(shared, 2 * (found.sum(1, keepdim=True) if num_sets == 1 else found))
