"""The integer grid: what is stored equals compressed-tensors bit for bit; what the search computes equals the README's formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from support.quant_oracles import fake_quantized, group_codes, group_grid, group_slices, random_weight
from torch import Tensor

from awqdist.quant.grid import (
    QuantizedWeight,
    group_range,
    make_grid,
    round_to_nearest,
    rounding_difference,
    scheme_args,
)
from awqdist.recipe import WeightScheme

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCHEMES = [
    WeightScheme(num_bits, symmetric, size)
    for num_bits in range(2, 9)
    for symmetric in (False, True)
    for size in (16, -1)
]
ODD_GROUPS = {
    "positive": lambda x: x.abs() + 0.1,
    "negative": lambda x: -x.abs() - 0.1,
    "zero": torch.zeros_like,
    "constant": lambda x: torch.full_like(x, 0.3),
    "constant negative": lambda x: torch.full_like(x, -0.3),
    "one outlier": lambda x: torch.where(x == x.max(), 50.0, x * 0.01),
    "huge": lambda x: x * 5000,
    "tiny": lambda x: x * 1e-6,
    "below the smallest scale": lambda x: x.abs() * 1e-8,
    "on the edges between codes": lambda x: torch.arange(16, dtype=x.dtype) / 2 - 3.75,
}


def odd_weight(dtype: torch.dtype) -> Tensor:
    """(10, 48): in every row one odd group of 16 between two ordinary ones."""
    weight = random_weight(len(ODD_GROUPS), 48)
    for row, change in enumerate(ODD_GROUPS.values()):
        weight[row, 16:32] = change(weight[row, 16:32])
    return weight.to(dtype)


def quantized(weight: Tensor, scheme: WeightScheme) -> QuantizedWeight:
    return round_to_nearest(weight, make_grid(*group_range(weight, scheme), scheme))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_scales_zero_points_and_codes_are_those_of_compressed_tensors(scheme: WeightScheme, dtype: torch.dtype) -> None:
    weight = odd_weight(dtype)
    strategy = QuantizationStrategy.GROUP if scheme.group_size > 0 else QuantizationStrategy.CHANNEL
    size = scheme.group_size if scheme.group_size > 0 else None
    args = QuantizationArgs(num_bits=scheme.num_bits, symmetric=scheme.symmetric, strategy=strategy, group_size=size)
    groups = weight.reshape(weight.shape[0], -1, size or weight.shape[1])
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    codes = quantize(weight, scale, zero, args, dtype=torch.int8)

    ours = quantized(weight, scheme)

    half = 2 ** (scheme.num_bits - 1)
    assert ours.weight_scale.dtype == dtype
    assert torch.equal(ours.weight_scale, scale)
    assert torch.equal(ours.zero_point.int() - half, zero.int())
    assert torch.equal(ours.codes.int() - half, codes.int())
    assert int(ours.codes.max()) < 2**scheme.num_bits
    # in float32, since ours is not rounded to the checkpoint's dtype
    restored = dequantize(codes, scale.float(), zero, args, dtype=torch.float32)
    torch.testing.assert_close(ours.dequantize(), restored, rtol=0, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_in_float32_the_stored_grid_follows_the_formulas(scheme: WeightScheme) -> None:
    weight = odd_weight(torch.float32)
    ours = quantized(weight, scheme)
    array = weight.numpy()
    for row in range(weight.shape[0]):
        for g, part in enumerate(group_slices(weight.shape[1], scheme)):
            group = array[row, part]
            scale, zero = group_grid(group.min(), group.max(), scheme, torch.float32)
            assert float(ours.weight_scale[row, g]) == scale
            if group.any():  # in a group of zeros any zero point will do
                assert int(ours.zero_point[row, g]) == zero
                codes = ours.codes[row, part].numpy()
                # -lo/scale and w/scale + zero are summed on the signed grid there, which may move what lies between two codes
                between = np.abs((group / scale + zero) % 1 - 0.5) < 1e-4
                assert np.array_equal(codes[~between], group_codes(group, scale, zero, scheme)[~between])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_group_of_zeros_stays_zero(scheme: WeightScheme, dtype: torch.dtype) -> None:
    assert not quantized(torch.zeros(2, 32, dtype=dtype), scheme).dequantize().any()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_weight_moves_by_more_than_half_a_step(scheme: WeightScheme) -> None:
    weight = odd_weight(torch.float32)[:7]  # no groups whose scale underflows
    ours = quantized(weight, scheme)
    step = ours.weight_scale.repeat_interleave(48 // ours.weight_scale.shape[1], 1)
    # asymmetric: the zero point is rounded too, so the ends of the range may move by up to a step
    allowed = 0.501 if scheme.symmetric else 1.001
    assert bool(((ours.dequantize() - weight).abs() <= allowed * step).all())


def test_scheme_args_name_the_group_size_or_the_channel() -> None:
    grouped = scheme_args(WeightScheme(4, False, 128))
    assert (grouped.num_bits, grouped.symmetric, grouped.strategy, grouped.group_size) == (4, False, "group", 128)
    channel = scheme_args(WeightScheme(8, True, -1))
    assert (channel.num_bits, channel.symmetric, channel.strategy, channel.group_size) == (8, True, "channel", None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rounding_difference_follows_the_formulas(scheme: WeightScheme, dtype: torch.dtype) -> None:
    weight = odd_weight(torch.float32)
    scales = torch.exp(torch.linspace(-2, 3, 48))[torch.randperm(48, generator=torch.Generator().manual_seed(0))]
    assert_difference(weight, scales, scheme, dtype)


@pytest.mark.parametrize("num_rows", [1, 3, 4, 5, 8, 9])
def test_rounding_difference_is_the_same_in_every_block_of_rows(num_rows: int) -> None:
    num_inputs = 1 << 15  # four rows to a block
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randn(num_rows, num_inputs, generator=generator) * torch.arange(1, num_rows + 1).unsqueeze(1)
    scales = torch.rand(num_inputs, generator=generator) + 0.5
    assert_difference(weight, scales, WeightScheme(4, False, 1 << 10), torch.bfloat16)


def test_rounding_difference_takes_rows_longer_than_a_block() -> None:
    weight = random_weight(3, (1 << 17) + 8)
    assert_difference(weight, torch.full((weight.shape[1],), 2.0), WeightScheme(3, True, -1), torch.float16)


def test_rounding_difference_leaves_its_arguments_alone() -> None:
    weight, scales = random_weight(4, 32), torch.rand(32) + 0.5
    before = weight.clone(), scales.clone()
    rounding_difference(weight, scales, WeightScheme(4, False, 16), torch.bfloat16)
    assert torch.equal(weight, before[0])
    assert torch.equal(scales, before[1])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_search_sees_the_error_that_rounding_to_nearest_makes(scheme: WeightScheme) -> None:
    """The float32 twin and what is stored are one grid: in float32 they differ on ties only."""
    weight = random_weight(16, 64)
    seen = rounding_difference(weight, torch.ones(64), scheme, torch.float32)
    made = quantized(weight, scheme).dequantize() - weight
    differ = (seen - made).abs() > 1e-6
    assert float(differ.float().mean()) <= 0.002


def assert_difference(weight: Tensor, scales: Tensor, scheme: WeightScheme, dtype: torch.dtype) -> None:
    smoothed = weight.numpy() * scales.numpy()
    expected = (fake_quantized(smoothed, scheme, dtype) - smoothed) / scales.numpy()
    assert np.array_equal(rounding_difference(weight, scales, scheme, dtype).numpy(), expected)
