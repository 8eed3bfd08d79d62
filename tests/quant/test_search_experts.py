"""Searches over experts, many at a time, against the same searches one by one."""

from __future__ import annotations

import pytest
import torch
from support.quant_oracles import activations, random_weight, row_errors, statistics_of

from awqdist.quant.candidates import candidates, sums_and_peaks
from awqdist.quant.grid import rounding_difference
from awqdist.quant.moments import Moments
from awqdist.quant.search import BalanceWeight, Problem, SearchGroup, choose_scales
from awqdist.recipe import Smoothing, WeightScheme

SCHEME = WeightScheme(4, symmetric=False, group_size=16)
PLAIN = Smoothing(mappings=None, duo_scaling=True, n_grid=20)
WIDTH = 48
SOURCE = torch.arange(WIDTH)
BF16 = torch.bfloat16


def experts(num_tokens: list[int], num_outputs: int) -> list[SearchGroup]:
    """Experts that were sent so many tokens each, of one layer."""
    prior = statistics_of(activations(300, WIDTH))
    groups = []
    for number, count in enumerate(num_tokens):
        own = Moments(WIDTH, 4096, torch.device("cpu"), prior=prior, most_rows=4096)
        own.add(activations(count, WIDTH, seed=number))
        weights = [random_weight(num_outputs, WIDTH, seed=2 * number + i).bfloat16() for i in range(2)]
        groups.append(SearchGroup([BalanceWeight(weight, SCHEME) for weight in weights], own))
    return groups


def problem(groups: list[SearchGroup]) -> Problem:
    return Problem(groups, groups[0].moments.mean_abs, SOURCE, WIDTH, BF16)


def exact_errors(group: SearchGroup, tried: list[torch.Tensor]) -> list[float]:
    """Of every candidate over all rows and tokens, under the Gram matrix of the expert."""
    gram = group.moments.gram().double()
    weight = torch.cat([b.weight.float() for b in group.balance])
    differences = [rounding_difference(weight, scales, SCHEME, BF16).double() for scales in tried]
    return [float(((d @ gram) * d).sum()) for d in differences]


@pytest.mark.parametrize("num_outputs", [20, 400], ids=["all rows", "screened"])
def test_scales_within_experts_are_as_good_side_by_side_as_alone(num_outputs: int) -> None:
    groups = experts([0, 5, 100, 3000, 40], num_outputs)
    together = choose_scales([problem([group]) for group in groups], PLAIN)

    for group, choice in zip(groups, together, strict=True):
        (alone,) = choose_scales([problem([group])], PLAIN)
        errors = exact_errors(group, [torch.ones(WIDTH), choice.scales, alone.scales])
        assert errors[1] <= 1.02 * errors[2]
        assert errors[1] < errors[0]
        assert choice.error_after / choice.error_before == pytest.approx(errors[1] / errors[0], rel=0.1)


@pytest.mark.parametrize("num_outputs", [20, 400], ids=["all rows", "screened"])
def test_one_set_of_scales_in_front_of_experts_is_nearly_the_best_for_all_of_them(num_outputs: int) -> None:
    groups = experts([400, 0, 700, 30, 200, 100], num_outputs)
    mean_abs = statistics_of(activations(300, WIDTH)).mean_abs
    (choice,) = choose_scales([Problem(groups, mean_abs, SOURCE, WIDTH, BF16)], PLAIN)

    weights = torch.cat([b.weight for group in groups for b in group.balance])
    w_mean = sums_and_peaks(weights, SCHEME)[0] / weights.shape[0]
    tried = [c.scales[0] for c in candidates(w_mean.unsqueeze(0), mean_abs.unsqueeze(0), SOURCE, WIDTH, PLAIN)]
    best = min(sum(errors) for errors in zip(*(exact_errors(group, tried) for group in groups), strict=True))
    assert sum(exact_errors(group, [choice.scales])[0] for group in groups) <= 1.02 * best


def test_a_grid_of_the_identity_alone_leaves_experts_as_they_are() -> None:
    settings = Smoothing(mappings=None, duo_scaling=False, n_grid=1)
    for choice in choose_scales([problem([group]) for group in experts([300, 20], 400)], settings):
        assert choice.ratio is None
        assert choice.error_after == choice.error_before > 0


def test_a_sketch_tells_errors_under_the_gram_of_an_expert_on_average_and_a_few_rows_are_their_own_sketch() -> None:
    difference = random_weight(30, WIDTH)
    for num_tokens, tolerance in ((500, 0.1), (5000, 0.1), (20, 0.01)):
        prior = statistics_of(activations(60, WIDTH, outlier=2.0))
        own = Moments(WIDTH, 4096, torch.device("cpu"), prior=prior, most_rows=4096)
        own.add(activations(num_tokens, WIDTH, outlier=2.0))
        exact, rough = row_errors(own, difference), row_errors(own, difference, rough=True)
        assert float(rough.sum()) == pytest.approx(float(exact.sum()), rel=tolerance)
