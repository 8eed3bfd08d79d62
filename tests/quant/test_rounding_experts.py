"""GPTQ side by side gives what GPTQ gives one after the other."""

from __future__ import annotations

import pytest
import torch

from awqdist.quant.grid import grid_parameters, group_range
from awqdist.quant.rounding import round_gptq
from awqdist.quant.rounding_experts import round_gptq_side_by_side
from awqdist.recipe import Rounding, WeightScheme


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("actorder", [True, False])
def test_many_weights_at_a_time_are_rounded_as_each_alone(symmetric: bool, group_size: int, actorder: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scheme, rounding = WeightScheme(4, symmetric, group_size), Rounding("gptq", 0.01, actorder, 64)
    weights = [torch.randn(24, 160, generator=generator) for _ in range(5)]
    rows = [torch.randn(300, 160, generator=generator) * torch.rand(160, generator=generator) for _ in weights]
    grams = [x.T @ x for x in rows]
    grids = [grid_parameters(*group_range(weight, scheme), scheme) for weight in weights]

    found = round_gptq_side_by_side(weights, grams, grids, scheme, rounding)

    for weight, gram, (scale, zero), result in zip(weights, grams, grids, found, strict=True):
        expected = round_gptq(weight, gram, scale, zero, scheme, rounding)
        assert (result.codes != expected.codes).float().mean() < 0.01  # sums in another order decide ties otherwise
        assert torch.equal(result.weight_scale, expected.weight_scale)
        assert torch.equal(result.zero_point, expected.zero_point)
        error, reference = (
            float(((q.dequantize() - weight) @ gram * (q.dequantize() - weight)).sum()) for q in (result, expected)
        )
        assert error == pytest.approx(reference, rel=0.01)
