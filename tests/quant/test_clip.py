"""Range clipping against a brute force that runs the tokens through every group under every shrink."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.quant_oracles import Array, activations, group_codes, group_slices, output_error, random_weight
from torch import Tensor

from awqdist.quant import grid
from awqdist.quant.grid import clipped_range, group_range
from awqdist.recipe import WeightScheme

NUM_INPUTS = 48
SHRINKS = [1 - 0.04 * k for k in range(11)]
SCHEMES = [WeightScheme(b, s, g) for b in (2, 3, 4, 8) for s in (False, True) for g in (16, -1)]


def heavy_tailed(num_outputs: int, seed: int = 0) -> Tensor:
    """Weights with a few far from the others, which clipping is for; some groups all of one sign, one of zeros."""
    weight = random_weight(num_outputs, NUM_INPUTS, seed)
    weight = weight * (1 + weight.abs() / weight.abs().mean())
    weight[0, :16] = weight[0, :16].abs() + 0.01
    weight[1, :16] = -weight[1, :16].abs() - 0.01
    weight[2, 16:32] = 0
    return weight


def shrunk(group: Array, shrink: float, scheme: WeightScheme) -> Array:
    """Nearest values of a group under its shrunk range, in float64."""
    low, high, limit = min(group.min(), 0) * shrink, max(group.max(), 0) * shrink, 2**scheme.num_bits - 1
    scale = max(-low, high) / (limit / 2) if scheme.symmetric else (high - low) / limit
    if scale == 0:
        return np.zeros_like(group)
    zero = 2 ** (scheme.num_bits - 1) if scheme.symmetric else np.rint(np.clip(-low / scale, 0, limit))
    return (group_codes(group, scale, zero, scheme) - zero) * scale


def errors_of(weight: Tensor, x: Tensor, scheme: WeightScheme) -> Array:
    """(O, G, shrinks): ‖X_g·dᵀ‖² of every group under every shrink."""
    array = weight.double().numpy()
    parts = group_slices(NUM_INPUTS, scheme)
    errors = np.empty((weight.shape[0], len(parts), len(SHRINKS)))
    for row, g in np.ndindex(errors.shape[:2]):
        group, rows = array[row, parts[g]], x.double().numpy()[:, parts[g]]
        errors[row, g] = [output_error(rows, (shrunk(group, s, scheme) - group)[None]) for s in SHRINKS]
    return errors


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_group_gets_the_shrink_with_the_least_error(scheme: WeightScheme) -> None:
    weight, x = heavy_tailed(12), activations(64, NUM_INPUTS)
    errors = errors_of(weight, x, scheme)
    low, high, share = clipped_range(weight, x.T @ x, scheme)

    full_low, full_high = group_range(weight, scheme)
    width = torch.where(full_high.abs() > full_low.abs(), full_high, full_low)
    chosen = torch.where(full_high.abs() > full_low.abs(), high, low) / torch.where(width == 0, 1, width)
    torch.testing.assert_close(low, full_low * torch.where(width == 0, 1, chosen))
    torch.testing.assert_close(high, full_high * torch.where(width == 0, 1, chosen))
    num_shrunk = 0
    for row, g in np.ndindex(errors.shape[:2]):
        if width[row, g] == 0:
            continue
        index = int(np.abs(np.array(SHRINKS) - float(chosen[row, g])).argmin())
        assert float(chosen[row, g]) == pytest.approx(SHRINKS[index], abs=1e-5)
        assert errors[row, g, index] <= errors[row, g].min() * (1 + 1e-4) + 1e-9
        num_shrunk += index > 0
    assert share == pytest.approx(num_shrunk / errors[..., 0].size)
    if scheme.num_bits <= 4:
        assert num_shrunk > 0


def test_the_range_stays_whole_where_no_shrink_is_better() -> None:
    weight = (torch.arange(48).remainder(16).float() - 7).repeat(4, 1)  # on its own grid
    low, high, share = clipped_range(weight, torch.eye(NUM_INPUTS), WeightScheme(4, False, 16))
    assert share == 0
    assert torch.equal(low, torch.full((4, 3), -7.0))
    assert torch.equal(high, torch.full((4, 3), 8.0))


def test_a_channel_that_carries_the_outputs_is_not_clipped() -> None:
    """The shrink depends on the inputs: an outlier weight may go only where its input does not matter."""
    weight = torch.linspace(-0.3, 0.3, 16).unsqueeze(0)
    weight[0, 3] = 1.0
    scheme = WeightScheme(3, True, 16)
    loud, quiet = torch.eye(16), torch.eye(16)
    loud[3, 3], quiet[3, 3] = 1e6, 0
    assert float(clipped_range(weight, loud, scheme)[1]) == 1.0
    assert float(clipped_range(weight, quiet, scheme)[1]) < 0.7


def test_the_cut_into_blocks_of_rows_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, scheme = heavy_tailed(13), activations(64, NUM_INPUTS), WeightScheme(3, False, 16)
    whole = clipped_range(weight, x.T @ x, scheme)
    monkeypatch.setattr(grid, "_CLIPPED_AT_ONCE", 4 * NUM_INPUTS)
    blocks = clipped_range(weight, x.T @ x, scheme)
    assert torch.equal(whole[0], blocks[0])
    assert torch.equal(whole[1], blocks[1])
    assert whole[2] == blocks[2]


def test_arguments_are_left_alone() -> None:
    weight, x = heavy_tailed(5), activations(64, NUM_INPUTS)
    gram = x.T @ x
    before = weight.clone(), gram.clone()
    clipped_range(weight, gram, WeightScheme(3, False, 16))
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])
