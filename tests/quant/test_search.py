"""The scale search against a slow one that does what peers do: it runs all tokens through really fake-quantized weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from support.quant_oracles import (
    ASYMMETRIC_4,
    Array,
    activations,
    fake_quantized,
    group_slices,
    output_error,
    random_weight,
    statistics_of,
)
from torch import Tensor

from awqdist.quant.candidates import ScaleChoice, sums_and_peaks
from awqdist.quant.search import BalanceWeight, Problem, SearchGroup, choose_scales
from awqdist.recipe import Smoothing, WeightScheme

BF16 = torch.bfloat16
NUM_INPUTS = 32
PLAIN = Smoothing(mappings=None, duo_scaling=True, n_grid=20)
GROUPED_QUERIES = (
    torch.arange(8).view(2, 1, 4).expand(2, 4, 4).reshape(-1)
)  # 2 kv heads of 4 values, 4 query heads each
SOURCES = {"one to one": torch.arange(NUM_INPUTS), "grouped-query attention": GROUPED_QUERIES}


@dataclass(frozen=True)
class Candidate:
    scales: Array
    ratio: float | None
    duo_scaling: bool
    error: float


def slow_weight_mean(balance: Sequence[BalanceWeight]) -> Array:
    total, num_rows = np.zeros(balance[0].weight.shape[1]), 0
    for linear in balance:
        if linear.scheme is None:
            continue
        for row in linear.weight.double().numpy():
            num_rows += 1
            for part in group_slices(row.size, linear.scheme):
                total[part] += np.abs(row[part]) / (np.abs(row[part]).max() + 1e-6)
    return total / num_rows


def tied(values: Array, source: Tensor) -> Array:
    source = source.numpy()
    return np.array([values[source == channel].mean() for channel in source])


def slow_search(
    balance: Sequence[BalanceWeight], x: Tensor, source: Tensor, settings: Smoothing, dtype: torch.dtype = BF16
) -> list[Candidate]:
    """Every candidate with its error at the output of the linears; the identity first."""
    x_mean, w_mean = tied(x.double().abs().mean(0).numpy(), source), tied(slow_weight_mean(balance), source)
    num = settings.n_grid
    if settings.duo_scaling == "both":
        grid = [(k / (num // 2 - 1), duo) for duo in (False, True) for k in range(num // 2)]
    elif settings.duo_scaling:
        grid = [(k / max(num - 2, 1), True) for k in range(num - 1)]
    else:
        grid = [(k / (num - 1), False) for k in range(num)]
    candidates = [Candidate(np.ones(len(x_mean)), None, False, 0.0)]
    for ratio, duo in grid:
        scales = x_mean**ratio
        if duo:
            scales = scales / (w_mean ** (1 - ratio) + 1e-4)
        scales = np.maximum(scales, 1e-4)
        candidates.append(Candidate(scales / math.sqrt(scales.max() * scales.min()), ratio, duo, 0.0))
    return [Candidate(c.scales, c.ratio, c.duo_scaling, slow_error(balance, x, c.scales, dtype)) for c in candidates]


def slow_error(balance: Sequence[BalanceWeight], x: Tensor, scales: Array, dtype: torch.dtype) -> float:
    total = 0.0
    scales = scales.astype(np.float32)
    for linear in balance:
        if linear.scheme is not None:
            weight = linear.weight.numpy()
            with np.errstate(all="ignore"):
                effective = fake_quantized(weight * scales, linear.scheme, dtype) / scales
                total += output_error(x.numpy(), effective - weight)
    return total


def best_of(candidates: Sequence[Candidate]) -> Candidate:
    return min((c for c in candidates if math.isfinite(c.error)), key=lambda c: c.error)


def assert_found(choice: ScaleChoice, candidates: Sequence[Candidate]) -> None:
    best = best_of(candidates)
    assert (choice.ratio, choice.duo_scaling) == (best.ratio, best.duo_scaling)
    assert choice.error_before == pytest.approx(candidates[0].error, rel=2e-4)
    assert choice.error_after == pytest.approx(best.error, rel=2e-4)
    np.testing.assert_allclose(choice.scales, best.scales, rtol=1e-4)


def search(
    balance: Sequence[BalanceWeight],
    x: Tensor,
    source: Tensor | None = None,
    settings: Smoothing = PLAIN,
    dtype: torch.dtype = BF16,
) -> ScaleChoice:
    source = torch.arange(x.shape[1]) if source is None else source
    group = SearchGroup(balance, statistics_of(x))
    return choose_scales([Problem([group], group.moments.mean_abs, source, int(source.max()) + 1, dtype)], settings)[0]


def linears(*num_outputs: int, scheme: WeightScheme | None = ASYMMETRIC_4, seed: int = 0) -> list[BalanceWeight]:
    return [BalanceWeight(random_weight(o, NUM_INPUTS, seed + i), scheme) for i, o in enumerate(num_outputs)]


@pytest.mark.parametrize("num_tokens", [24, 96], ids=["rows", "gram"])
@pytest.mark.parametrize("source", SOURCES.values(), ids=list(SOURCES))
@pytest.mark.parametrize("duo_scaling", [True, False, "both"])
def test_the_candidate_is_the_one_with_the_least_error_at_the_outputs(
    duo_scaling: Any, source: Tensor, num_tokens: int
) -> None:
    settings = Smoothing(None, duo_scaling, 20)
    for seed in range(3):
        balance, x = linears(12, 8, seed=seed), activations(num_tokens, NUM_INPUTS, seed)
        candidates = slow_search(balance, x, source, settings)
        choice = search(balance, x, source, settings)
        assert_found(choice, candidates)
        assert choice.num_nonfinite == 0
        assert choice.error_after < choice.error_before, "outliers are strong enough that smoothing must help"


@pytest.mark.parametrize("duo_scaling", [True, False])
@pytest.mark.parametrize("n_grid", [2, 3, 7])
def test_short_grids_are_searched_whole(duo_scaling: bool, n_grid: int) -> None:
    settings = Smoothing(None, duo_scaling, n_grid)
    balance, x = linears(12), activations(64, NUM_INPUTS)
    candidates = slow_search(balance, x, torch.arange(NUM_INPUTS), settings)
    assert_found(search(balance, x, settings=settings), candidates)


@pytest.mark.parametrize("duo_scaling", [True, False])
def test_a_grid_of_one_is_the_identity(duo_scaling: bool) -> None:
    choice = search(linears(12), activations(64, NUM_INPUTS), settings=Smoothing(None, duo_scaling, 1))
    assert choice.ratio is None
    assert choice.error_after == choice.error_before
    assert torch.equal(choice.scales, torch.ones(NUM_INPUTS))


@pytest.mark.parametrize("n_grid", [1, 2, 3])
def test_both_ways_of_scaling_are_tried_however_short_the_grid(n_grid: int) -> None:
    balance, x = linears(12), activations(64, NUM_INPUTS)
    shortest = [
        search(balance, x, settings=Smoothing(None, duo, 2)).error_after for duo in (False, True)
    ]  # ratio 1, and ratio 0 with duo scaling
    assert search(balance, x, settings=Smoothing(None, "both", n_grid)).error_after <= min(shortest)


@pytest.mark.parametrize(("duo_scaling", "n_grid"), [(True, 20), (False, 20), ("both", 20), (True, 5), ("both", 8)])
def test_there_are_as_many_candidates_as_n_grid_says(duo_scaling: Any, n_grid: int) -> None:
    x = activations(64, NUM_INPUTS)
    x[3, 3] = float("nan")  # no candidate gives a finite error, and every one is counted
    choice = search(linears(12), x, settings=Smoothing(None, duo_scaling, n_grid))
    assert choice.num_nonfinite == n_grid
    assert math.isnan(choice.error_after)


def test_inputs_that_come_from_one_channel_share_a_scale() -> None:
    choice = search(linears(16), activations(64, NUM_INPUTS), GROUPED_QUERIES)
    assert choice.ratio is not None
    for channel in range(8):
        assert len(set(choice.scales[channel == GROUPED_QUERIES].tolist())) == 1
    assert len(set(choice.scales.tolist())) == 8


@pytest.mark.parametrize("smallest", [1e-4, 1.0, 1e4])
def test_scales_are_normalised_around_one(smallest: float) -> None:
    choice = search(linears(16), activations(64, NUM_INPUTS) * smallest)
    assert choice.ratio is not None
    assert float(choice.scales.max() * choice.scales.min()) == pytest.approx(1, rel=1e-4)


def test_linears_of_one_mapping_are_rounded_each_under_its_own_scheme() -> None:
    """Other tools take one scheme for all balance layers."""
    eight_bit = WeightScheme(8, symmetric=True, group_size=-1)
    x, source = activations(64, NUM_INPUTS), torch.arange(NUM_INPUTS)
    for schemes in [(ASYMMETRIC_4, eight_bit), (eight_bit, ASYMMETRIC_4)]:
        balance = [BalanceWeight(b.weight, s) for b, s in zip(linears(12, 16), schemes, strict=True)]
        assert_found(search(balance, x), slow_search(balance, x, source, PLAIN))


def test_the_order_of_linears_does_not_matter() -> None:
    a, b, c = linears(8, 12, 16)
    c = BalanceWeight(c.weight, WeightScheme(3, True, 8))
    x = activations(64, NUM_INPUTS)
    one, other = search([a, b, c], x), search([c, b, a], x)
    assert one.ratio == other.ratio
    assert one.error_after == pytest.approx(other.error_after, rel=1e-6)


def test_a_linear_that_is_not_quantized_adds_no_error() -> None:
    x, (quantized, other) = activations(64, NUM_INPUTS), linears(12, 16)
    left_alone = BalanceWeight(other.weight * 100, None)
    alone, beside = search([quantized], x), search([left_alone, quantized], x)
    assert torch.equal(alone.scales, beside.scales)
    assert alone.error_after == beside.error_after


def overflowing(num_outputs: int) -> tuple[list[BalanceWeight], Tensor]:
    """float16 weights that some of the candidates scale beyond float16."""
    x = activations(64, NUM_INPUTS, outlier=1)
    x[:, 5] *= 1000
    weight = random_weight(num_outputs, NUM_INPUTS)
    weight[:, 5] *= 6e4 / weight[:, 5].abs().max()
    return [BalanceWeight(weight, ASYMMETRIC_4)], x


@pytest.mark.parametrize("num_outputs", [16, 600], ids=["all rows", "screened"])
def test_candidates_that_overflow_are_skipped_and_counted(num_outputs: int) -> None:
    """In other tools one NaN makes the search skip everything else."""
    balance, x = overflowing(num_outputs)
    candidates = slow_search(balance, x, torch.arange(NUM_INPUTS), PLAIN, torch.float16)
    num_bad = sum(not math.isfinite(c.error) for c in candidates)
    assert 0 < num_bad < 19
    choice = search(balance, x, dtype=torch.float16)
    assert 0 < choice.num_nonfinite <= num_bad, (
        "those that screening drops may overflow in rows that it did not look at"
    )
    assert num_outputs > 16 or choice.num_nonfinite == num_bad
    assert choice.error_after == pytest.approx(best_of(candidates).error, rel=2e-4)


def test_candidates_nearer_than_bfloat16_resolves_are_told_apart() -> None:
    """Other tools sum losses in bfloat16."""
    told_apart = 0
    for seed in range(4):
        balance, x = linears(400, seed=seed), activations(64, NUM_INPUTS, seed, outlier=2)
        candidates = slow_search(balance, x, torch.arange(NUM_INPUTS), Smoothing(None, True, 100))
        choice = search(balance, x, settings=Smoothing(None, True, 100))
        assert choice.error_after == pytest.approx(best_of(candidates).error, rel=2e-5)
        told_apart += sum(c.error < best_of(candidates).error * 1.004 for c in candidates) > 1
    assert told_apart, "candidates lie too far apart for this test to show anything"


@pytest.mark.parametrize("channels", [[0], [3, 4, 5, 31], list(range(16))])
def test_a_channel_that_is_never_active_breaks_nothing(channels: list[int]) -> None:
    x = activations(64, NUM_INPUTS)
    x[:, channels] = 0
    balance = linears(12)
    choice = search(balance, x)
    assert bool((torch.isfinite(choice.scales) & (choice.scales > 0)).all())
    assert choice.num_nonfinite == 0
    assert_found(choice, slow_search(balance, x, torch.arange(NUM_INPUTS), PLAIN))


def test_no_activation_at_all_leaves_the_identity() -> None:
    choice = search(linears(12), torch.zeros(64, NUM_INPUTS))
    assert choice.ratio is None
    assert choice.error_after == 0


@pytest.mark.parametrize("scheme", [ASYMMETRIC_4, WeightScheme(4, True, -1)], ids=["groups", "channels"])
def test_the_sums_of_a_weight_mean_are_over_all_rows_and_relative_to_the_largest_weight_of_a_group(
    scheme: WeightScheme,
) -> None:
    weight = random_weight(700, 256)  # more than one block
    sums, peaks = sums_and_peaks(torch.stack([weight, 2 * weight]), scheme)
    for factor, own, peak in zip((1, 2), sums, peaks, strict=True):
        balance = [BalanceWeight(factor * weight, scheme)]
        np.testing.assert_allclose(own / 700, slow_weight_mean(balance), rtol=1e-4)
        expected = (factor * weight).abs().unflatten(1, (peak.shape[1], -1)).amax(2)
        torch.testing.assert_close(peak, expected)


@pytest.mark.parametrize("spread", [0.3, 2.0], ids=["rows alike", "a few rows carry most of the error"])
@pytest.mark.parametrize("duo_scaling", [True, False, "both"])
def test_screening_loses_less_than_a_percent(duo_scaling: Any, spread: float) -> None:
    settings = Smoothing(None, duo_scaling, 20)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x = activations(96, 64, seed)
        balance = []
        for num_outputs in (400, 200, 57):  # more rows than are screened
            size = torch.exp(spread * torch.randn(num_outputs, 1, generator=generator))
            balance.append(BalanceWeight(torch.randn(num_outputs, 64, generator=generator) * 0.05 * size, ASYMMETRIC_4))
        candidates = slow_search(balance, x, torch.arange(64), settings)
        choice = search(balance, x, settings=settings)
        assert choice.error_before == pytest.approx(candidates[0].error, rel=2e-4)
        assert choice.error_after <= 1.01 * best_of(candidates).error
        found = [c for c in candidates if (c.ratio, c.duo_scaling) == (choice.ratio, choice.duo_scaling)]
        assert choice.error_after == pytest.approx(found[0].error, rel=2e-4), "the error is of all rows, not estimated"


@pytest.mark.parametrize(
    ("num_loud", "num_quiet", "size", "quiet_win"),
    [(5, 1300, 128.0, False), (128, 1300, 20.0, False), (128, 400, 5.5, True), (128, 3000, 14.0, True)],
    ids=["five rows carry the error", "the loud rows decide", "the quiet rows add up", "a great many of them do"],
)
def test_screening_weighs_rows_by_their_error_and_their_number(
    num_loud: int, num_quiet: int, size: float, quiet_win: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, NUM_INPUTS, generator=generator)
    x[:, 0] *= 30
    loud = torch.randn(num_loud, NUM_INPUTS, generator=generator) * 0.05 * size
    quiet = torch.randn(num_quiet, NUM_INPUTS, generator=generator) * 0.05
    quiet[:, 0] = 0.6  # the weight of the outlier is the largest already: another ratio is best than for the loud rows
    whole = torch.cat([quiet[:7], loud, quiet[7:]])
    settings, source = Smoothing(None, False, 20), torch.arange(NUM_INPUTS)
    of_loud, of_quiet, of_all = (
        slow_search([BalanceWeight(rows, ASYMMETRIC_4)], x, source, settings) for rows in (loud, quiet, whole)
    )
    errors = {candidate.ratio: candidate.error for candidate in of_all}
    winners, losers = (of_quiet, of_loud) if quiet_win else (of_loud, of_quiet)
    assert errors[best_of(losers).ratio] > 1.2 * errors[best_of(winners).ratio], "heeding the wrong rows must show"
    choice = search([BalanceWeight(whole, ASYMMETRIC_4)], x, settings=settings)
    assert choice.error_after <= 1.01 * best_of(of_all).error
