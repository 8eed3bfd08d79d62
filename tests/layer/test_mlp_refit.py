"""Inner linears are fitted to what the rounded linears before them give: against regression in float64, on a gated MLP of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from support.quant_oracles import Array, activations, random_weight
from torch import Tensor, nn

from awqdist.layer.mlp_refit import Refit, RefitModule, RefitMoments, num_kept_rows
from awqdist.quant.factor import refit_correction
from awqdist.quant.grid import rounding_difference
from awqdist.recipe import WeightScheme

WIDTH, INNER, NUM_TOKENS = 16, 48, 600
SCHEME = WeightScheme(3, False, 16)
DAMPENING = 1e-3


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.gate, self.up = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER, bias=False)
            self.down = nn.Linear(INNER, WIDTH, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))
        return output


@dataclass(frozen=True)
class Problem:
    rows: Tensor  # (T, H)
    scales: Tensor  # (H,), that the rows are divided by
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    found: Refit

    def inner(self, parameters: dict[str, Tensor]) -> Array:
        """What `down` reads, (T, I)."""
        x = (self.rows / self.scales).double().numpy()
        gate, up = (x @ parameters[f"{name}.weight"].double().numpy().T for name in ("gate", "up"))
        product: Array = gate / (1 + np.exp(-gate)) * up
        return product

    @property
    def weight(self) -> Array:
        weight: Array = self.before["down.weight"].double().numpy()
        return weight


@cache
def problem(dtype: torch.dtype = torch.float32) -> Problem:
    rows, scales = activations(NUM_TOKENS, WIDTH, outlier=2.0).to(dtype), torch.linspace(0.5, 2.0, WIDTH)
    before = {f"{name}.weight": random_weight(INNER, WIDTH, seed) * 20 for seed, name in enumerate(("gate", "up"))}
    before |= {"down.weight": random_weight(WIDTH, INNER, 2), "down.bias": random_weight(1, WIDTH, 3)[0]}
    after = dict(before)
    for name in ("gate.weight", "up.weight"):
        after[name] = before[name] + rounding_difference(before[name], torch.ones(WIDTH), SCHEME, torch.float32)
    module = RefitModule(Gated(), "mlp", "down")
    moments = RefitMoments((INNER, NUM_TOKENS), torch.device("cpu"), None, module)
    for chunk in rows.split(250):
        moments.module_rows.add(chunk)
    return Problem(rows.float(), scales, before, after, moments.refit(before, after, scales))


def test_the_gram_matrix_is_of_the_input_as_it_comes_from_rounded_linears() -> None:
    p = problem()
    inputs = p.inner(p.after)
    assert p.found.moments.num_tokens == NUM_TOKENS
    np.testing.assert_allclose(p.found.moments.gram().numpy(), inputs.T @ inputs, rtol=1e-3, atol=1e-2)


def test_what_is_lost_is_the_difference_of_the_outputs_times_the_input() -> None:
    p = problem()
    lost = p.inner(p.after).T @ ((p.inner(p.before) - p.inner(p.after)) @ p.weight.T)
    np.testing.assert_allclose(p.found.lost.numpy(), lost, rtol=1e-3, atol=1e-3 * np.abs(lost).max())


def test_the_correction_is_that_of_ridge_regression_and_makes_up_for_most_of_the_error() -> None:
    p = problem()
    exact, inputs = p.inner(p.before) @ p.weight.T, p.inner(p.after)
    moment = inputs.T @ inputs
    ridge = DAMPENING * moment.diagonal().mean() * np.eye(INNER)
    expected = np.linalg.solve(moment + ridge, inputs.T @ (exact - inputs @ p.weight.T)).T
    found = refit_correction(p.found.moments.gram(), p.found.lost, DAMPENING).double().numpy()
    np.testing.assert_allclose(found, expected, atol=2e-2 * np.abs(expected).max())

    def error(weight: Array) -> float:
        return float(((exact - inputs @ weight.T) ** 2).sum())

    assert error(p.weight + found) < 0.6 * error(p.weight)


def test_in_bfloat16_it_is_about_the_same() -> None:
    exact, p = problem(), problem(torch.bfloat16)
    corrections = [refit_correction(x.found.moments.gram(), x.found.lost, DAMPENING) for x in (exact, p)]
    assert (corrections[1] - corrections[0]).norm() < 0.2 * corrections[0].norm()


def test_inputs_that_were_never_active_are_left_alone() -> None:
    gram, lost = problem().found.moments.gram().clone(), problem().found.lost.clone()
    gram[3], gram[:, 3], lost[3] = 0, 0, 0
    assert not refit_correction(gram, lost, DAMPENING)[:, 3].any()


@pytest.mark.parametrize(("num_tokens", "kept"), [(INNER, 0), (4 * INNER - 1, 0), (4 * INNER, 192), (9999, 1536)])
def test_rows_are_kept_up_to_a_bound_and_not_where_there_are_too_few(num_tokens: int, kept: int) -> None:
    assert num_kept_rows(INNER, num_tokens) == kept
