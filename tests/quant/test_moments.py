"""Moments of inputs: the output error that they give is the one that running all tokens through the linear gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.quant_oracles import ASYMMETRIC_4, activations, output_error, random_weight, row_errors, statistics_of
from torch import Tensor

from awqdist.quant.grid import rounding_difference
from awqdist.quant.moments import Moments, quadratic_form
from awqdist.quant.precision import low_precision_if_exact

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NUM_INPUTS = 48
KEPT = {"rows": 40, "gram": 300}  # tokens: fewer than inputs are kept as rows
CUTS = {
    "one chunk": [300],
    "even": [100, 100, 100],
    "uneven": [1, 250, 49],
    "one token at a time": [1] * 300,
}


def difference(num_outputs: int = 12, seed: int = 0) -> Tensor:
    weight = random_weight(num_outputs, NUM_INPUTS, seed)
    return rounding_difference(weight, torch.ones(NUM_INPUTS), ASYMMETRIC_4, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", KEPT.values(), ids=list(KEPT))
@pytest.mark.parametrize(("mean", "outlier"), [(0, 1), (0, 300), (20, 1), (5, 300)])
def test_the_output_error_is_that_of_all_tokens(
    num_tokens: int, dtype: torch.dtype, mean: float, outlier: float
) -> None:
    x = activations(num_tokens, NUM_INPUTS, mean=mean, outlier=outlier).to(dtype)
    d = difference()
    statistics = statistics_of(x)
    expected = output_error(x.float().numpy(), d.numpy())
    assert float(row_errors(statistics, d).sum()) == pytest.approx(expected, rel=1e-4)
    by_row = [output_error(x.float().numpy(), row[None]) for row in d.numpy()]
    assert row_errors(statistics, d).tolist() == pytest.approx(by_row, rel=1e-4)
    assert row_errors(statistics, d).dtype == torch.float64


@pytest.mark.parametrize("told", [300, 20], ids=["gram", "rows"])
@pytest.mark.parametrize("lengths", CUTS.values(), ids=list(CUTS))
def test_the_cut_into_chunks_does_not_matter(lengths: list[int], told: int) -> None:
    x = activations(300, NUM_INPUTS)
    statistics = Moments(NUM_INPUTS, told, torch.device("cpu"))
    for chunk in x.split(lengths):
        statistics.add(chunk)
    d = difference()
    assert statistics.num_tokens == 300
    assert float(row_errors(statistics, d).sum()) == pytest.approx(output_error(x.numpy(), d.numpy()), rel=1e-5)
    np.testing.assert_allclose(statistics.mean_abs, np.abs(x.numpy()).mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.gram(), x.numpy().T.astype(np.float64) @ x.numpy(), rtol=1e-4, atol=1e-2)


def test_a_chunk_of_sequences_counts_every_token() -> None:
    x = activations(60, NUM_INPUTS)
    batched = statistics_of(x.view(3, 20, NUM_INPUTS))
    assert batched.num_tokens == 60
    assert float(row_errors(batched, difference()).sum()) == float(row_errors(statistics_of(x), difference()).sum())


@pytest.mark.parametrize("num_tokens", KEPT.values(), ids=list(KEPT))
def test_the_error_adds_up_over_chunks_and_rows(num_tokens: int) -> None:
    x, d = activations(num_tokens, NUM_INPUTS), difference()
    both = float(row_errors(statistics_of(x), d).sum())
    halves = [float(row_errors(statistics_of(half), d).sum()) for half in x.split(num_tokens // 2)]
    assert sum(halves) == pytest.approx(both, rel=1e-5)
    assert sum(float(row_errors(statistics_of(x), part).sum()) for part in d.split(5)) == pytest.approx(both, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", KEPT.values(), ids=list(KEPT))
def test_activations_that_the_layer_overwrites_later_are_not_lost(num_tokens: int, dtype: torch.dtype) -> None:
    x = activations(num_tokens, NUM_INPUTS).to(dtype)
    expected = output_error(x.float().numpy(), difference().numpy())
    statistics = statistics_of(x)
    x.zero_()
    assert float(row_errors(statistics, difference()).sum()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("told", [300, 20], ids=["gram", "rows"])
def test_an_input_without_tokens_has_no_error(told: int) -> None:
    statistics = Moments(NUM_INPUTS, told, torch.device("cpu"))
    assert float(row_errors(statistics, difference()).sum()) == 0
    assert not statistics.mean_abs.any()
    assert not statistics.gram().any()
    assert statistics.is_finite()


@pytest.mark.parametrize("num_tokens", KEPT.values(), ids=list(KEPT))
def test_the_smoothed_gram_is_that_of_the_divided_input(num_tokens: int) -> None:
    x = activations(num_tokens, NUM_INPUTS)
    scales = torch.exp(torch.linspace(-3, 3, NUM_INPUTS))
    smoothed = (x / scales).double()
    gram = statistics_of(x).take_smoothed_gram(scales).double()
    spread = smoothed.norm(dim=0)
    assert float(((gram - smoothed.T @ smoothed).abs() / (spread.unsqueeze(0) * spread.unsqueeze(1))).max()) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("told", [300, 20], ids=["gram", "rows"])
def test_one_activation_that_is_not_finite_is_noticed(bad: float, told: int) -> None:
    statistics = Moments(NUM_INPUTS, told, torch.device("cpu"))
    chunks = activations(300, NUM_INPUTS).view(3, 100, NUM_INPUTS).clone()
    chunks[1, 50, 7] = bad
    statistics.add(chunks[0])
    assert statistics.is_finite()
    statistics.add(chunks[1])
    statistics.add(chunks[2])
    assert not statistics.is_finite()


@pytest.mark.parametrize("num_tokens", KEPT.values(), ids=list(KEPT))
def test_rough_errors_are_near_the_exact_ones(num_tokens: int) -> None:
    statistics, d = statistics_of(activations(num_tokens, NUM_INPUTS)), difference()
    assert float(row_errors(statistics, d, rough=True).sum()) == pytest.approx(
        float(row_errors(statistics, d).sum()), rel=0.02
    )


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 2048, 2049])
def test_the_quadratic_form_counts_every_block_of_the_gram(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(6, size, generator=generator) + 1
    d = torch.randn(3, size, generator=generator)
    assert float(quadratic_form(d, x.T @ x).sum()) == pytest.approx(output_error(x.numpy(), d.numpy()), rel=1e-4)


def precisions() -> tuple[str, str]:
    return torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fails", [False, True])
def test_the_precision_of_products_is_what_it_was_afterwards(dtype: torch.dtype, fails: bool) -> None:
    before = precisions()
    try:
        with low_precision_if_exact(dtype):
            inside = precisions()
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert precisions() == before
    # only where each value of the dtype fits the multiplier unrounded: 8 significant bits in bfloat16, 11 in TF32
    assert (
        inside
        == {
            torch.bfloat16: ("bf16", "tf32"),
            torch.float16: (before[0], "tf32"),
            torch.float32: before,
        }[dtype]
    )


def test_precisions_nest() -> None:
    before = precisions()
    with low_precision_if_exact(torch.float16):
        outer = precisions()
        with low_precision_if_exact(torch.bfloat16):
            assert precisions() != outer
        assert precisions() == outer
    assert precisions() == before


def test_overlapping_threads_leave_the_precision_as_they_found_it() -> None:
    before = precisions()
    first, second = low_precision_if_exact(torch.bfloat16), low_precision_if_exact(torch.bfloat16)
    first.__enter__()
    second.__enter__()  # as another thread would, before the first one is out
    first.__exit__(None, None, None)
    assert precisions() == ("bf16", "tf32")
    second.__exit__(None, None, None)
    assert precisions() == before
