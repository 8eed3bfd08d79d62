"""GPTQ rounding against the textbook: one input after the other, with the inverse Hessian itself, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.quant_oracles import Array, activations, output_error, random_weight
from torch import Tensor

from awqdist.errors import NumericalError
from awqdist.quant.grid import QuantizedWeight, grid_parameters, group_range, round_to_nearest
from awqdist.quant.rounding import inverse_factor, round_gptq
from awqdist.recipe import Rounding, WeightScheme

NUM_INPUTS = 48
# share of codes that may differ, where float32 puts a weight on the other side of a half, and its row goes on from there; here none do
TIES = 0.002
SCHEMES = [WeightScheme(b, s, g) for b in (3, 4, 8) for s in (False, True) for g in (16, -1)]


def gptq(*, actorder: bool = True, block_size: int = 128, dampening_frac: float = 0.01) -> Rounding:
    return Rounding("gptq", dampening_frac, actorder, block_size)


def uneven_weight(num_outputs: int, num_inputs: int = NUM_INPUTS, seed: int = 0) -> Tensor:
    """Groups of 16 inputs of very different size, so that a wrong group's scale shows."""
    size = 2.0 ** torch.arange(num_inputs).div(16, rounding_mode="floor").remainder(5)
    return random_weight(num_outputs, num_inputs, seed) * size


def grid_of(weight: Tensor, scheme: WeightScheme, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return grid_parameters(*group_range(weight.to(dtype), scheme), scheme)


def rounded(weight: Tensor, gram: Tensor, scheme: WeightScheme, rounding: Rounding) -> QuantizedWeight:
    return round_gptq(weight, gram, *grid_of(weight, scheme), scheme, rounding)


def textbook(weight: Tensor, gram: Tensor, scheme: WeightScheme, rounding: Rounding) -> Array:
    """Codes (O, I) by optimal brain quantization in a fixed order (arXiv 2210.17323, equations 2 and 3): after each input its row
    and column are eliminated from the inverse Hessian."""
    weight_scale, zero_point = grid_of(weight, scheme)
    scales, zeros = weight_scale.double().numpy(), zero_point.double().numpy()
    work, hessian = weight.double().numpy().copy(), gram.double().numpy().copy()
    num_inputs = work.shape[1]
    size = scheme.group_size if scheme.group_size > 0 else num_inputs
    diagonal = hessian.diagonal().copy()
    dead = diagonal == 0
    mean = diagonal[~dead].mean()
    hessian[dead, dead] = mean
    inverse = np.linalg.inv(hessian + rounding.dampening_frac * mean * np.eye(num_inputs))
    order = list(np.argsort(-diagonal, kind="stable")) if rounding.actorder else list(range(num_inputs))
    codes = np.zeros(work.shape)
    while order:
        i = order.pop(0)
        scale, zero = scales[:, i // size], zeros[:, i // size]
        codes[:, i] = np.clip(np.rint(work[:, i] / scale + zero), 0, 2**scheme.num_bits - 1)
        error = (work[:, i] - (codes[:, i] - zero) * scale) / inverse[i, i]
        work[:, order] -= np.outer(error, inverse[i, order])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


def assert_textbook(weight: Tensor, gram: Tensor, scheme: WeightScheme, rounding: Rounding) -> None:
    codes = rounded(weight, gram, scheme, rounding).codes
    share = float((codes.numpy() != textbook(weight, gram, scheme, rounding)).mean())
    assert share <= TIES, f"{share:.2%} of the codes differ"


def gram_of(num_tokens: int = 200, num_inputs: int = NUM_INPUTS, seed: int = 0) -> Tensor:
    x = activations(num_tokens, num_inputs, seed, outlier=5)
    return x.T @ x


@pytest.mark.parametrize("actorder", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_are_those_of_the_textbook(scheme: WeightScheme, actorder: bool) -> None:
    assert_textbook(uneven_weight(64), gram_of(), scheme, gptq(actorder=actorder))


@pytest.mark.parametrize("actorder", [True, False])
@pytest.mark.parametrize("block_size", [1, 5, 16, 31, 33, 40, 47, 48, 49, 1000])
def test_blocks_of_any_size_give_the_codes_of_the_textbook(block_size: int, actorder: bool) -> None:
    assert_textbook(uneven_weight(64), gram_of(), SCHEMES[4], gptq(actorder=actorder, block_size=block_size))


@pytest.mark.parametrize("num_inputs", [16, 528, 1104])
def test_codes_are_those_of_the_textbook_for_many_inputs(num_inputs: int) -> None:
    weight, gram = uneven_weight(6, num_inputs), gram_of(2 * num_inputs, num_inputs)
    assert_textbook(weight, gram, WeightScheme(4, False, 16), gptq(dampening_frac=0.05))


@pytest.mark.parametrize("dampening_frac", [0.001, 0.1, 1.0, 3.0])
def test_the_dampening_is_a_fraction_of_the_mean_diagonal(dampening_frac: float) -> None:
    assert_textbook(uneven_weight(64), gram_of(), SCHEMES[4], gptq(dampening_frac=dampening_frac))


@pytest.mark.parametrize("actorder", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_error_is_below_that_of_rounding_to_nearest(scheme: WeightScheme, actorder: bool) -> None:
    for seed in range(5):
        x, weight = activations(200, NUM_INPUTS, seed, mean=1.0), uneven_weight(24, seed=seed)
        compensated = rounded(weight, x.T @ x, scheme, gptq(actorder=actorder))
        nearest = round_to_nearest(weight, *grid_of(weight, scheme), scheme)
        errors = [output_error(x.numpy(), (q.dequantize() - weight).numpy()) for q in (compensated, nearest)]
        assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_uncorrelated_inputs_are_rounded_to_nearest(scheme: WeightScheme) -> None:
    weight = uneven_weight(24)
    codes = rounded(weight, torch.diag(torch.rand(NUM_INPUTS) + 0.1), scheme, gptq()).codes
    assert torch.equal(codes, round_to_nearest(weight, *grid_of(weight, scheme), scheme).codes)


@pytest.mark.parametrize("actorder", [True, False])
def test_activation_order_leaves_the_grid_and_the_columns_where_they_were(actorder: bool) -> None:
    """No g_idx is stored: input i keeps column i and group i // g."""
    weight, scheme = uneven_weight(24), SCHEMES[4]
    weight_scale, zero_point = grid_of(weight, scheme)
    result = round_gptq(weight, gram_of(), weight_scale.clone(), zero_point.clone(), scheme, gptq(actorder=actorder))
    assert torch.equal(result.weight_scale, weight_scale)
    assert torch.equal(result.zero_point, zero_point)
    step = weight_scale.float().repeat_interleave(16, 1)
    moved = ((result.dequantize() - weight) / step).abs()
    assert float(moved.median()) < 1  # a code in another column would be off by many steps
    assert result.codes.is_contiguous()


def test_activation_order_matters_where_inputs_differ() -> None:
    weight, gram, scheme = uneven_weight(24), gram_of(), SCHEMES[4]
    codes = [rounded(weight, gram, scheme, gptq(actorder=actorder)).codes for actorder in (True, False)]
    assert not torch.equal(*codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_stay_within_range_however_much_is_pushed_onto_them(scheme: WeightScheme, dtype: torch.dtype) -> None:
    x = torch.randn(200, 1, generator=torch.Generator().manual_seed(0)) + 0.01 * activations(200, NUM_INPUTS)
    weight = random_weight(24, NUM_INPUTS)
    result = round_gptq(weight, x.T @ x, *grid_of(weight, scheme, dtype), scheme, gptq(dampening_frac=1e-4))
    assert result.codes.dtype == torch.uint8
    assert int(result.codes.max()) <= 2**scheme.num_bits - 1
    assert result.weight_scale.dtype == dtype


@pytest.mark.parametrize("actorder", [True, False])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3], ids=["faint", "ordinary", "loud"])
def test_dead_inputs_are_rounded_to_nearest_and_change_nothing_for_the_others(size: float, actorder: bool) -> None:
    x = activations(200, NUM_INPUTS, outlier=5) * size
    dead = torch.zeros(NUM_INPUTS, dtype=torch.bool)
    dead[[0, 7, 8, 9, 30, 47]] = True
    x[:, dead] = 0
    weight, scheme = random_weight(64, NUM_INPUTS), WeightScheme(4, False, -1)
    grid = grid_of(weight, scheme)
    codes = round_gptq(weight, x.T @ x, *grid, scheme, gptq(actorder=actorder)).codes
    assert torch.equal(codes[:, dead], nearest_codes(weight, *grid)[:, dead])
    live = x[:, ~dead]
    without = round_gptq(weight[:, ~dead], live.T @ live, *grid, scheme, gptq(actorder=actorder)).codes
    assert float((codes[:, ~dead] != without).float().mean()) <= TIES


def nearest_codes(weight: Tensor, weight_scale: Tensor, zero_point: Tensor) -> Tensor:
    """Of a 4 bit weight with one group."""
    return (weight / weight_scale.float() + zero_point.float()).round().clamp(0, 15).to(torch.uint8)


def test_a_layer_that_is_never_active_is_rounded_to_nearest() -> None:
    weight, scheme = random_weight(8, NUM_INPUTS), WeightScheme(4, False, -1)
    codes = rounded(weight, torch.zeros(NUM_INPUTS, NUM_INPUTS), scheme, gptq()).codes
    assert torch.equal(codes, nearest_codes(weight, *grid_of(weight, scheme)))


def test_the_size_of_the_activations_does_not_matter() -> None:
    weight, gram, scheme = uneven_weight(24), gram_of(), SCHEMES[4]
    codes = [rounded(weight, gram * size, scheme, gptq()).codes for size in (1.0, 2.0**-20, 2.0**20)]
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])


def test_rows_are_independent_of_each_other() -> None:
    weight, gram, scheme = uneven_weight(24), gram_of(), SCHEMES[4]
    together = rounded(weight, gram, scheme, gptq()).codes
    apart = torch.cat([rounded(part, gram, scheme, gptq()).codes for part in weight.split(7)])
    assert float((together != apart).float().mean()) <= TIES


def test_arguments_are_left_alone() -> None:
    weight, gram = uneven_weight(8), gram_of()
    before = weight.clone(), gram.clone()
    rounded(weight, gram, SCHEMES[4], gptq(block_size=16))
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


@pytest.mark.parametrize("size", [1, 5, 511, 512, 513, 1100])
def test_the_factor_is_an_upper_triangular_root_of_the_inverse(size: int) -> None:
    gram = gram_of(3 * size + 10, size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    factor, dampening = inverse_factor(gram, order, 0.05)
    hessian = gram.double()[order][:, order] + 0.05 * gram.diagonal().double().mean() * torch.eye(size)
    assert dampening == 0.05
    assert torch.equal(factor, factor.triu())
    identity = hessian @ (factor.double().T @ factor.double())
    torch.testing.assert_close(identity, torch.eye(size, dtype=torch.float64), rtol=0, atol=2e-3)


def indefinite(lowest: float) -> Tensor:
    """Mean diagonal 1, eigenvalues from `lowest` upwards."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(NUM_INPUTS, NUM_INPUTS, generator=generator).double())[0]
    eigenvalues = torch.linspace(0.2, 1.8, NUM_INPUTS).double()
    eigenvalues[0], eigenvalues[1] = lowest, eigenvalues[1] + eigenvalues[0] - lowest
    gram = rotation @ torch.diag(eigenvalues) @ rotation.T
    return ((gram + gram.T) / 2).float()


@pytest.mark.parametrize(
    ("lowest", "asked", "needed"),
    [
        (0.1, 0.0, 0.0),
        (-0.005, 0.01, 0.01),
        (-0.05, 0.01, 0.1),
        (-0.5, 0.01, 1.0),
        (-5e-5, 0.0, 1e-4),
        (-0.5, 0.2, 2.0),
    ],
)
def test_dampening_is_raised_tenfold_until_the_gram_is_positive_definite(
    lowest: float, asked: float, needed: float
) -> None:
    if needed > 1:
        with pytest.raises(NumericalError):
            inverse_factor(indefinite(lowest), torch.arange(NUM_INPUTS), asked)
        return
    factor, dampening = inverse_factor(indefinite(lowest), torch.arange(NUM_INPUTS), asked)
    assert dampening == pytest.approx(needed)
    hessian = indefinite(lowest).double() + needed * torch.eye(NUM_INPUTS)
    identity = hessian @ (factor.double().T @ factor.double())
    torch.testing.assert_close(identity, torch.eye(NUM_INPUTS, dtype=torch.float64), rtol=0, atol=2e-3)


@pytest.mark.parametrize("gram", [indefinite(-5.0), torch.full((4, 4), float("nan"))], ids=["negative", "nan"])
def test_a_hopeless_gram_is_an_error_that_says_what_to_do(gram: Tensor) -> None:
    with pytest.raises(NumericalError, match=f"{len(gram)} inputs is not positive definite.*rounding: nearest"):
        inverse_factor(gram, torch.arange(len(gram)), 0.01)
