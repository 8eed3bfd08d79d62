"""What the search takes for the error after GPTQ, against least squares and against GPTQ itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.quant_oracles import activations, output_error, random_weight, statistics_of
from torch import Tensor

from awqdist.quant.gptq import gptq
from awqdist.quant.grid import group_range, make_grid, rounding_difference
from awqdist.quant.moments import Diagonal, Moments
from awqdist.quant.search import SearchGroup
from awqdist.recipe import Rounding, WeightScheme

SCHEME = WeightScheme(4, symmetric=False, group_size=32)
BARELY_DAMPED = Rounding("gptq", 1e-7)


def variances(moments: Moments, rounding: Rounding) -> Tensor:
    return SearchGroup([], moments, rounding).variances


@pytest.mark.parametrize("actorder", [True, False])
def test_a_variance_is_what_the_inputs_rounded_later_do_not_tell_of_an_input(actorder: bool) -> None:
    x = activations(200, 12, outlier=3)
    found = variances(statistics_of(x), Rounding("gptq", 1e-7, actorder))

    rows = x.double().numpy()
    order = np.argsort(-(rows**2).sum(0)) if actorder else np.arange(12)
    for place, channel in enumerate(order):
        later = rows[:, order[place + 1 :]]
        told = later @ np.linalg.lstsq(later, rows[:, channel], rcond=None)[0]
        assert float(found[channel]) == pytest.approx(((rows[:, channel] - told) ** 2).sum(), rel=5e-3)


@pytest.mark.parametrize("num_tokens", [400, 60], ids=["gram", "rows"])
def test_the_error_after_gptq_is_foretold(num_tokens: int) -> None:
    x, weight = activations(num_tokens, 96, outlier=3), random_weight(200, 96)
    statistics, rounding = statistics_of(x), Rounding("gptq", 0.01)
    nearest = rounding_difference(weight, torch.ones(96), SCHEME, torch.float32)

    foretold = float(Diagonal(variances(statistics, rounding).unsqueeze(0)).errors(nearest.unsqueeze(0)).sum())

    grid = make_grid(*group_range(weight, SCHEME), SCHEME)
    rounded = gptq([weight], [statistics.gram()], [grid], rounding)[0].dequantize() - weight
    damped = 0.01 * float(statistics.gram().diagonal().mean()) * float(rounded.square().sum())
    assert foretold == pytest.approx(output_error(x.numpy(), rounded.numpy()) + damped, rel=0.15)
    assert foretold < 0.7 * output_error(x.numpy(), nearest.numpy())


def test_many_sites_are_judged_as_each_alone() -> None:
    sites = [variances(statistics_of(activations(50, 16, seed)), BARELY_DAMPED) for seed in range(3)]
    differences = torch.stack([random_weight(5, 16, seed) for seed in range(3)])

    found = Diagonal(torch.stack(sites)).errors(differences)

    alone = [Diagonal(site.unsqueeze(0)).errors(d.unsqueeze(0))[0] for site, d in zip(sites, differences, strict=True)]
    torch.testing.assert_close(found, torch.stack(alone))
