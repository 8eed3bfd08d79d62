"""Smoothing: whatever divides an activation and whatever multiplies the weights that read it leave the function as it was."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from support.quant_oracles import random_weight
from torch import Tensor

from awqdist.model.mapping import ResolvedMapping, SmoothedParameters
from awqdist.quant.smooth import balance_linear, per_source, smooth_linear, smooth_norm

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTH = 24
SIZES = {"mild": (0.5, 2.0), "large": (1.0, 3000.0), "tiny": (1e-3, 1.0), "both": (0.02, 50.0)}


def scales_between(low: float, high: float, num: int = WIDTH) -> Tensor:
    spread = torch.exp(torch.linspace(0, 1, num) * (torch.tensor(high) / low).log()) * low
    return spread[torch.randperm(num, generator=torch.Generator().manual_seed(3))]


def norm_weight(unit_offset: bool, dtype: torch.dtype) -> Tensor:
    noise = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)) * 0.3
    return (noise if unit_offset else noise + 1).to(dtype)


def normalised() -> Tensor:
    x = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit_offset", [False, True], ids=["plain", "one plus weight"])
@pytest.mark.parametrize("between", SIZES.values(), ids=list(SIZES))
def test_a_norm_and_what_reads_it_keep_their_function(
    between: tuple[float, float], unit_offset: bool, dtype: torch.dtype
) -> None:
    weight, x, offset = norm_weight(unit_offset, dtype), normalised(), float(unit_offset)
    linear = random_weight(7, WIDTH).to(dtype)
    stored, scales = smooth_norm(weight, scales_between(*between), unit_offset)
    balanced = balance_linear(linear, scales)
    assert stored.dtype == dtype
    assert balanced.dtype == torch.float32
    before = x * (weight.double() + offset) @ linear.double().T
    after = x * (stored.double() + offset) @ balanced.double().T
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6 * float(before.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit_offset", [False, True], ids=["plain", "one plus weight"])
@pytest.mark.parametrize("between", SIZES.values(), ids=list(SIZES))
def test_the_scales_of_a_norm_are_those_that_it_really_divides_by(
    between: tuple[float, float], unit_offset: bool, dtype: torch.dtype
) -> None:
    weight, wanted, offset = norm_weight(unit_offset, dtype), scales_between(*between), float(unit_offset)
    stored, scales = smooth_norm(weight, wanted, unit_offset)
    applied = (weight.double() + offset) / (stored.double() + offset)
    torch.testing.assert_close(scales.double(), applied, rtol=1e-6, atol=0)
    kept = scales == 1
    assert bool((kept | ((scales / wanted).log2().abs() <= 1)).all()), "within a factor of two of what was asked for"
    if dtype == torch.float32 or between == SIZES["mild"]:
        torch.testing.assert_close(scales, wanted, rtol=0.04 if unit_offset else 0.005, atol=0)


def test_a_norm_weight_too_coarse_for_its_scale_is_left_alone() -> None:
    """1 + w = 1.0 divided by 3000 is w = -0.99967, which bfloat16 stores as -1: the channel would be switched off."""
    weight = torch.tensor([0.0, 0.0, 0.0], dtype=torch.bfloat16)
    stored, scales = smooth_norm(weight, torch.tensor([3000.0, 2.0, 1.0]), True)
    assert scales.tolist() == [1, 2, 1]
    assert stored.tolist() == [0, -0.5, 0]


@pytest.mark.parametrize("unit_offset", [False, True])
def test_a_channel_that_the_norm_switches_off_stays_off_and_takes_any_scale(unit_offset: bool) -> None:
    weight = norm_weight(unit_offset, torch.bfloat16)
    weight[5] = -float(unit_offset)
    wanted = scales_between(0.5, 2)
    stored, scales = smooth_norm(weight, wanted, unit_offset)
    assert float(stored[5]) + float(unit_offset) == 0
    assert float(scales[5]) == float(wanted[5])


@pytest.mark.parametrize("unit_offset", [False, True])
def test_scales_of_one_change_nothing(unit_offset: bool) -> None:
    weight = norm_weight(unit_offset, torch.bfloat16)
    stored, scales = smooth_norm(weight, torch.ones(WIDTH), unit_offset)
    assert torch.equal(stored, weight)
    assert torch.equal(scales, torch.ones(WIDTH))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_others", [0, 8, WIDTH], ids=["alone", "some rows more", "gate and up fused"])
def test_a_linear_with_bias_and_what_reads_its_last_rows_keep_their_function(
    num_others: int, dtype: torch.dtype
) -> None:
    smooth = random_weight(num_others + WIDTH, 16).to(dtype)
    bias = torch.randn(num_others + WIDTH, generator=torch.Generator().manual_seed(4)).to(dtype)
    reader, scales = random_weight(5, WIDTH, 9).to(dtype), scales_between(0.02, 50)
    x = torch.randn(10, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    new_smooth, new_bias = smooth_linear(smooth, scales), smooth_linear(bias, scales)
    outputs = x @ smooth.double().T + bias.double()
    new_outputs = x @ new_smooth.double().T + new_bias.double()

    torch.testing.assert_close(new_outputs[:, :num_others], outputs[:, :num_others], rtol=0, atol=0)
    before = outputs[:, num_others:] @ reader.double().T
    after = new_outputs[:, num_others:] @ balance_linear(reader, scales).double().T
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6 * float(before.abs().max()))
    torch.testing.assert_close(
        new_outputs[:, num_others:] * scales.double(), outputs[:, num_others:], rtol=1e-5, atol=1e-5
    )


def test_functions_are_pure() -> None:
    scales = scales_between(0.5, 2)
    norm, linear = norm_weight(True, torch.float32), random_weight(WIDTH, WIDTH)
    before = norm.clone(), linear.clone(), scales.clone()
    smooth_norm(norm, scales, True)
    smooth_linear(linear, scales)
    balance_linear(linear, scales)
    assert all(torch.equal(a, b) for a, b in zip((norm, linear, scales), before, strict=True))


def test_scales_of_outputs_are_gathered_from_the_inputs_that_read_them() -> None:
    source = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])  # two kv heads of two values, each read by two query heads
    outputs = torch.tensor([0.5, 2.0, 3.0, 7.0])
    assert torch.equal(per_source(outputs[source], source, len(outputs)), outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit_offset", [False, True], ids=["plain", "one plus weight"])
def test_a_norm_with_bias_keeps_its_function(unit_offset: bool, dtype: torch.dtype) -> None:
    x, offset = normalised(), float(unit_offset)
    parameters = {
        "norm.weight": norm_weight(unit_offset, dtype),
        "norm.bias": torch.randn(WIDTH, generator=torch.Generator().manual_seed(6)).to(dtype),
        "a.weight": random_weight(5, WIDTH, 1).to(dtype),
        "b.weight": random_weight(6, WIDTH, 2).to(dtype),
    }
    mapping = ResolvedMapping("norm", ("a", "b"), norm=True, unit_offset=unit_offset, source=None)
    changed = SmoothedParameters(parameters)
    scales = changed.apply(mapping, scales_between(0.02, 50))
    applied = (parameters["norm.weight"].double() + offset) / (changed["norm.weight"].double() + offset)
    torch.testing.assert_close(scales.double(), applied, rtol=1e-6, atol=0)

    def outputs(p: Mapping[str, Tensor], name: str) -> Tensor:
        hidden = x * (p["norm.weight"].double() + offset) + p["norm.bias"].double()
        return hidden @ p[name].double().T

    for name in ("a.weight", "b.weight"):
        before = outputs(parameters, name)
        torch.testing.assert_close(outputs(changed, name), before, rtol=0, atol=1e-6 * float(before.abs().max()))


@pytest.mark.parametrize("repeats", [1, 2, 4])
def test_value_heads_and_the_output_projection_keep_their_function_under_grouped_queries(repeats: int) -> None:
    kv_heads, head_dim = 2, 3
    mapping = ResolvedMapping("v", ("o",), norm=False, unit_offset=False, source=(kv_heads, repeats, head_dim))
    parameters = {
        "v.weight": random_weight(kv_heads * head_dim, 16),
        "v.bias": torch.randn(kv_heads * head_dim, generator=torch.Generator().manual_seed(7)),
        "o.weight": random_weight(8, kv_heads * repeats * head_dim, 1),
    }
    source = mapping.source_channels(kv_heads * repeats * head_dim)
    changed = SmoothedParameters(parameters)
    scales = changed.apply(mapping, scales_between(0.02, 50, kv_heads * head_dim)[source])
    x = torch.randn(10, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def outputs(p: Mapping[str, Tensor]) -> Tensor:
        values = x @ p["v.weight"].double().T + p["v.bias"].double()
        heads = values.view(10, kv_heads, head_dim).repeat_interleave(repeats, 1)  # as transformers' repeat_kv
        return heads.reshape(10, -1) @ p["o.weight"].double().T

    before = outputs(parameters)
    torch.testing.assert_close(outputs(changed), before, rtol=0, atol=1e-6 * float(before.abs().max()))
    assert scales.shape == (kv_heads * repeats * head_dim,)
