"""Two-sided compensation against the objective itself, in float64, and how much directions count against the logits' own second moment."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.quant_oracles import Array, activations, random_weight
from torch import Tensor

from awqdist.errors import NumericalError
from awqdist.quant.gptq import OutputOrder, gptq, logit_weighting
from awqdist.quant.grid import Grid, QuantizedWeight, group_range, make_grid
from awqdist.recipe import Rounding, WeightScheme

SCHEME = WeightScheme(4, False, 16)
ROUNDING = Rounding("gptq", 0.01)
NUM_OUTPUTS, NUM_INPUTS = 96, 48
TIES = 0.002  # share of codes that may differ, where float32 puts a weight on the other side of a half


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return random_weight(NUM_OUTPUTS, NUM_INPUTS)


@pytest.fixture(scope="module")
def gram() -> Tensor:
    x = activations(200, NUM_INPUTS)
    return x.T @ x


def correlated(num_outputs: int = NUM_OUTPUTS) -> Tensor:
    """R, under which a few directions count most."""
    rows = activations(num_outputs // 2, num_outputs, seed=3)
    return rows.T @ rows


def grid_of(weight: Tensor) -> Grid:
    return make_grid(*group_range(weight, SCHEME), SCHEME)


def one_sided(weight: Tensor, gram: Tensor) -> QuantizedWeight:
    return gptq([weight], [gram], [grid_of(weight)], ROUNDING)[0]


def two_sided(weight: Tensor, gram: Tensor, weighting: Tensor) -> QuantizedWeight:
    return gptq([weight], [gram], [grid_of(weight)], ROUNDING, OutputOrder.from_weighting(weighting))[0]


def error(result: QuantizedWeight, weight: Tensor, gram: Tensor, weighting: Tensor) -> float:
    """tr(R·D·H·Dᵀ)."""
    difference = (result.dequantize() - weight).double().numpy()
    return float(np.sum((weighting.double().numpy() @ difference @ gram.double().numpy()) * difference))


def test_where_all_outputs_count_alike_it_is_gptq(weight: Tensor, gram: Tensor) -> None:
    result = two_sided(weight, gram, torch.eye(NUM_OUTPUTS))
    assert (result.codes != one_sided(weight, gram).codes).float().mean() < TIES


def test_what_counts_of_a_difference_is_its_error_under_the_weighting(weight: Tensor, gram: Tensor) -> None:
    weighting = correlated()
    result = one_sided(weight, gram)
    damped = weighting + 0.1 * weighting.diagonal().mean() * torch.eye(NUM_OUTPUTS)
    counted = OutputOrder.from_weighting(weighting).weighted(result.dequantize() - weight).double()
    assert float(((counted @ gram.double()) * counted).sum()) == pytest.approx(
        error(result, weight, gram, damped), rel=1e-4
    )


def test_several_problems_side_by_side_are_each_rounded_as_by_itself(weight: Tensor, gram: Tensor) -> None:
    weights = [weight, random_weight(NUM_OUTPUTS, NUM_INPUTS, 7)]
    x = activations(150, NUM_INPUTS, seed=5)
    grams, weighting = [gram, x.T @ x], correlated()
    found = gptq(weights, grams, [grid_of(own) for own in weights], ROUNDING, OutputOrder.from_weighting(weighting))
    for result, own, its_gram in zip(found, weights, grams, strict=True):
        assert (result.codes != two_sided(own, its_gram, weighting).codes).float().mean() < TIES


@pytest.mark.parametrize("num_outputs", [96, 80, 20])
@pytest.mark.parametrize("block_size", [128, 16, 20])
def test_blocks_of_any_size_give_the_same(weight: Tensor, gram: Tensor, num_outputs: int, block_size: int) -> None:
    part, weighting = weight[:num_outputs], correlated()[:num_outputs, :num_outputs]
    rounding = Rounding("gptq", 0.01, block_size=block_size)
    result = gptq([part], [gram], [grid_of(part)], rounding, OutputOrder.from_weighting(weighting))[0]
    assert (result.codes != two_sided(part, gram, weighting).codes).float().mean() < 10 * TIES


def test_what_counts_suffers_less_than_under_one_sided_compensation(weight: Tensor, gram: Tensor) -> None:
    weighting = correlated()
    found = error(two_sided(weight, gram, weighting), weight, gram, weighting)
    assert found < 0.8 * error(one_sided(weight, gram), weight, gram, weighting)


def test_each_block_is_rounded_from_the_target_that_the_blocks_before_it_have_moved(
    weight: Tensor, gram: Tensor
) -> None:
    """The best that is left to do for a block D_b, given those before it, is to round W_b + R_bb⁻¹·R_bp·D_p, where R is conditioned on
    the blocks behind: the minimum over these of the objective as if they were not rounded."""
    weighting = correlated()
    result = two_sided(weight, gram, weighting)
    order = OutputOrder.from_weighting(weighting).order.tolist()
    weights: Array = weighting.double().numpy()
    weights = weights + 0.1 * weights.diagonal().mean() * np.eye(NUM_OUTPUTS)
    done: list[int] = []
    errors = (result.dequantize() - weight).double().numpy()
    for block in np.array_split(np.array(order), 3):  # blocks of 32
        behind = [o for o in order if o not in done and o not in block]
        conditioned = weights.copy()
        if behind:
            conditioned -= weights[:, behind] @ np.linalg.inv(weights[np.ix_(behind, behind)]) @ weights[behind]
        target = weight[block].double().numpy()
        if done:
            moved = conditioned[np.ix_(block, done)] @ errors[done]
            target = target - np.linalg.solve(conditioned[np.ix_(block, block)], moved)
        grid = grid_of(weight)
        own = Grid(grid.weight_scale[block], grid.zero_point[block], SCHEME)
        expected = gptq([torch.from_numpy(target).float()], [gram], [own], ROUNDING)[0]
        assert (expected.codes != result.codes[block]).float().mean() < TIES
        done += list(block)


def test_the_weighting_is_the_second_moment_of_logits_around_what_they_share() -> None:
    head, norm = random_weight(30, 8), torch.linspace(0.5, 2.0, 8)
    counts = torch.tensor([0, 1, 4, 9] * 7 + [0, 0])
    shares = np.sqrt(counts.numpy()) / np.sqrt(counts.numpy()).sum()
    rows = head.double().numpy() * norm.double().numpy()
    direction = activations(1, 8).double().numpy()[0]
    logits = rows @ direction  # of a step in that direction
    variance = (shares * logits**2).sum() - (shares * logits).sum() ** 2
    found = logit_weighting(head.bfloat16(), counts, norm)
    assert float(direction @ found.double().numpy() @ direction) == pytest.approx(variance, rel=0.02)
    exact = logit_weighting(head, counts, norm)
    assert float(direction @ exact.double().numpy() @ direction) == pytest.approx(variance, rel=1e-4)
    assert torch.equal(logit_weighting(head * norm, counts, None), exact)


def test_a_weighting_that_is_not_finite_is_named() -> None:
    with pytest.raises(NumericalError, match="positive definite"):
        OutputOrder.from_weighting(torch.full((4, 4), torch.nan))
