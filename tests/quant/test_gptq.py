"""GPTQ rounding against the textbook: one input after the other, with the inverse Hessian itself, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.quant_oracles import Array, activations, output_error, random_weight
from torch import Tensor

from awqdist.errors import NumericalError
from awqdist.quant.factor import inverse_cholesky
from awqdist.quant.gptq import gptq, round_block
from awqdist.quant.grid import Grid, QuantizedWeight, group_range, make_grid, round_to_nearest
from awqdist.recipe import Rounding, WeightScheme

NUM_INPUTS = 48
# share of codes that may differ, where float32 puts a weight on the other side of a half, and its row goes on from there; here none do
TIES = 0.002
SCHEMES = [WeightScheme(b, s, g) for b in (3, 4, 8) for s in (False, True) for g in (16, -1)]


def asked(*, actorder: bool = True, block_size: int = 128, dampening_frac: float = 0.01) -> Rounding:
    return Rounding("gptq", dampening_frac, actorder, block_size)


def uneven_weight(num_outputs: int, num_inputs: int = NUM_INPUTS, seed: int = 0) -> Tensor:
    """Groups of 16 inputs of very different size, so that a wrong group's scale shows."""
    size = 2.0 ** torch.arange(num_inputs).div(16, rounding_mode="floor").remainder(5)
    return random_weight(num_outputs, num_inputs, seed) * size


def grid_of(weight: Tensor, scheme: WeightScheme, dtype: torch.dtype = torch.bfloat16) -> Grid:
    return make_grid(*group_range(weight.to(dtype), scheme), scheme)


def rounded(weight: Tensor, gram: Tensor, scheme: WeightScheme, rounding: Rounding) -> QuantizedWeight:
    return gptq([weight], [gram], [grid_of(weight, scheme)], rounding)[0]


def textbook(weight: Tensor, gram: Tensor, scheme: WeightScheme, rounding: Rounding) -> Array:
    """Codes (O, I) by optimal brain quantization in a fixed order (arXiv 2210.17323, equations 2 and 3): after each input its row
    and column are eliminated from the inverse Hessian."""
    grid = grid_of(weight, scheme)
    scales, zeros = grid.weight_scale.double().numpy(), grid.zero_point.double().numpy()
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
    assert_textbook(uneven_weight(64), gram_of(), scheme, asked(actorder=actorder))


@pytest.mark.parametrize("actorder", [True, False])
@pytest.mark.parametrize("block_size", [1, 5, 16, 31, 33, 40, 47, 48, 49, 1000])
def test_blocks_of_any_size_give_the_codes_of_the_textbook(block_size: int, actorder: bool) -> None:
    assert_textbook(uneven_weight(64), gram_of(), SCHEMES[4], asked(actorder=actorder, block_size=block_size))


@pytest.mark.parametrize("num_inputs", [16, 528, 1104])
def test_codes_are_those_of_the_textbook_for_many_inputs(num_inputs: int) -> None:
    weight, gram = uneven_weight(6, num_inputs), gram_of(2 * num_inputs, num_inputs)
    assert_textbook(weight, gram, WeightScheme(4, False, 16), asked(dampening_frac=0.05))


@pytest.mark.parametrize("dampening_frac", [0.001, 0.1, 1.0, 3.0])
def test_the_dampening_is_a_fraction_of_the_mean_diagonal(dampening_frac: float) -> None:
    assert_textbook(uneven_weight(64), gram_of(), SCHEMES[4], asked(dampening_frac=dampening_frac))


@pytest.mark.parametrize("actorder", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_error_is_below_that_of_rounding_to_nearest(scheme: WeightScheme, actorder: bool) -> None:
    for seed in range(5):
        x, weight = activations(200, NUM_INPUTS, seed, mean=1.0), uneven_weight(24, seed=seed)
        compensated = rounded(weight, x.T @ x, scheme, asked(actorder=actorder))
        nearest = round_to_nearest(weight, grid_of(weight, scheme))
        errors = [output_error(x.numpy(), (q.dequantize() - weight).numpy()) for q in (compensated, nearest)]
        assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_uncorrelated_inputs_are_rounded_to_nearest(scheme: WeightScheme) -> None:
    weight = uneven_weight(24)
    codes = rounded(weight, torch.diag(torch.rand(NUM_INPUTS) + 0.1), scheme, asked()).codes
    assert torch.equal(codes, round_to_nearest(weight, grid_of(weight, scheme)).codes)


@pytest.mark.parametrize("actorder", [True, False])
def test_activation_order_leaves_the_grid_and_the_columns_where_they_were(actorder: bool) -> None:
    """No g_idx is stored: input i keeps column i and group i // g."""
    weight, scheme = uneven_weight(24), SCHEMES[4]
    grid, given = grid_of(weight, scheme), grid_of(weight, scheme)
    result = gptq([weight], [gram_of()], [given], asked(actorder=actorder))[0]
    assert torch.equal(result.weight_scale, grid.weight_scale)
    assert torch.equal(result.zero_point, grid.zero_point)
    step = grid.weight_scale.float().repeat_interleave(16, 1)
    moved = ((result.dequantize() - weight) / step).abs()
    assert float(moved.median()) < 1  # a code in another column would be off by many steps
    assert result.codes.is_contiguous()


def test_activation_order_matters_where_inputs_differ() -> None:
    weight, gram, scheme = uneven_weight(24), gram_of(), SCHEMES[4]
    codes = [rounded(weight, gram, scheme, asked(actorder=actorder)).codes for actorder in (True, False)]
    assert not torch.equal(*codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_stay_within_range_however_much_is_pushed_onto_them(scheme: WeightScheme, dtype: torch.dtype) -> None:
    x = torch.randn(200, 1, generator=torch.Generator().manual_seed(0)) + 0.01 * activations(200, NUM_INPUTS)
    weight = random_weight(24, NUM_INPUTS)
    result = gptq([weight], [x.T @ x], [grid_of(weight, scheme, dtype)], asked(dampening_frac=1e-4))[0]
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
    codes = gptq([weight], [x.T @ x], [grid], asked(actorder=actorder))[0].codes
    assert torch.equal(codes[:, dead], nearest_codes(weight, grid)[:, dead])
    live = x[:, ~dead]
    without = gptq([weight[:, ~dead]], [live.T @ live], [grid], asked(actorder=actorder))[0].codes
    assert float((codes[:, ~dead] != without).float().mean()) <= TIES


def nearest_codes(weight: Tensor, grid: Grid) -> Tensor:
    """Of a 4 bit weight with one group."""
    return (weight / grid.weight_scale.float() + grid.zero_point.float()).round().clamp(0, 15).to(torch.uint8)


def test_a_layer_that_is_never_active_is_rounded_to_nearest() -> None:
    weight, scheme = random_weight(8, NUM_INPUTS), WeightScheme(4, False, -1)
    codes = rounded(weight, torch.zeros(NUM_INPUTS, NUM_INPUTS), scheme, asked()).codes
    assert torch.equal(codes, nearest_codes(weight, grid_of(weight, scheme)))


def test_the_size_of_the_activations_does_not_matter() -> None:
    weight, gram, scheme = uneven_weight(24), gram_of(), SCHEMES[4]
    codes = [rounded(weight, gram * size, scheme, asked()).codes for size in (1.0, 2.0**-20, 2.0**20)]
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])


def test_rows_are_independent_of_each_other() -> None:
    weight, gram, scheme = uneven_weight(24), gram_of(), SCHEMES[4]
    together = rounded(weight, gram, scheme, asked()).codes
    apart = torch.cat([rounded(part, gram, scheme, asked()).codes for part in weight.split(7)])
    assert float((together != apart).float().mean()) <= TIES


def test_arguments_are_left_alone() -> None:
    weight, gram = uneven_weight(8), gram_of()
    before = weight.clone(), gram.clone()
    rounded(weight, gram, SCHEMES[4], asked(block_size=16))
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


@pytest.mark.parametrize("size", [1, 5, 511, 512, 513, 1100])
def test_the_factor_is_an_upper_triangular_root_of_the_inverse(size: int) -> None:
    gram = gram_of(3 * size + 10, size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    factor, dampening = inverse_cholesky(gram, order, 0.05)
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
            inverse_cholesky(indefinite(lowest), torch.arange(NUM_INPUTS), asked)
        return
    factor, dampening = inverse_cholesky(indefinite(lowest), torch.arange(NUM_INPUTS), asked)
    assert dampening == pytest.approx(needed)
    hessian = indefinite(lowest).double() + needed * torch.eye(NUM_INPUTS)
    identity = hessian @ (factor.double().T @ factor.double())
    torch.testing.assert_close(identity, torch.eye(NUM_INPUTS, dtype=torch.float64), rtol=0, atol=2e-3)


@pytest.mark.parametrize("gram", [indefinite(-5.0), torch.full((4, 4), float("nan"))], ids=["negative", "nan"])
def test_a_hopeless_gram_is_an_error_that_says_what_to_do(gram: Tensor) -> None:
    with pytest.raises(NumericalError, match=f"{len(gram)} inputs is not positive definite.*rounding: nearest"):
        inverse_cholesky(gram, torch.arange(len(gram)), 0.01)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("actorder", [True, False])
def test_many_weights_at_a_time_are_rounded_as_each_alone(symmetric: bool, group_size: int, actorder: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scheme, rounding = WeightScheme(4, symmetric, group_size), Rounding("gptq", 0.01, actorder, 64)
    weights = [torch.randn(24, 160, generator=generator) for _ in range(5)]
    rows = [torch.randn(300, 160, generator=generator) * torch.rand(160, generator=generator) for _ in weights]
    grams = [x.T @ x for x in rows]
    grids = [make_grid(*group_range(weight, scheme), scheme) for weight in weights]

    found = gptq(weights, grams, grids, rounding)

    for weight, gram, grid, result in zip(weights, grams, grids, found, strict=True):
        expected = gptq([weight], [gram], [grid], rounding)[0]
        assert (result.codes != expected.codes).float().mean() < 0.01  # sums in another order decide ties otherwise
        assert torch.equal(result.weight_scale, expected.weight_scale)
        assert torch.equal(result.zero_point, expected.zero_point)
        error, reference = (
            float(((q.dequantize() - weight) @ gram * (q.dequantize() - weight)).sum()) for q in (result, expected)
        )
        assert error == pytest.approx(reference, rel=0.01)


def test_weights_of_several_shapes_and_schemes_may_share_a_gram_matrix() -> None:
    weights, schemes, gram = (
        [uneven_weight(24), uneven_weight(8, seed=1), uneven_weight(24, seed=2)],
        SCHEMES[2:5],
        gram_of(),
    )
    grids = [grid_of(weight, scheme) for weight, scheme in zip(weights, schemes, strict=True)]
    found = gptq(weights, [gram] * 3, grids, asked())
    for weight, scheme, result in zip(weights, schemes, found, strict=True):
        assert result.scheme == scheme
        assert float((result.codes != rounded(weight, gram, scheme, asked()).codes).float().mean()) <= TIES


def test_the_inner_loop_is_one_operator_of_known_shapes() -> None:
    """Layers are measured on fake tensors, where the loop is not to run."""
    inputs = torch.randn(2, 5, 7), torch.eye(5).expand(2, 5, 5), torch.ones(2, 5, 7), torch.zeros(2, 5, 7), 15.0
    torch.library.opcheck(round_block, inputs, test_utils=("test_schema", "test_faketensor"))
