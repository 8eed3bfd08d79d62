"""The sketch that ranks candidates where the input is wide."""

from __future__ import annotations

import pytest
import torch
from support.quant_oracles import output_error, row_errors
from torch import Tensor

from awqdist.quant.moments import SKETCH_ROWS, Moments, Sketch

NUM_INPUTS, NUM_TOKENS = 2 * SKETCH_ROWS, 3000


def activations() -> Tensor:
    """Tokens of which some are a hundred times larger than others, as the first of a text are."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.where(torch.arange(NUM_TOKENS) % 200 == 0, 100.0, 1.0).unsqueeze(1)
    return torch.randn(NUM_TOKENS, NUM_INPUTS, generator=generator) * sizes


def sketch_of(moments: Moments) -> Tensor:
    form = moments.form()
    assert isinstance(form, Sketch)
    return form.rows.float()


def differences(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, NUM_INPUTS, generator=generator) * (1 + 0.1 * i) for i in range(count)]


@pytest.mark.parametrize("lengths", [[3000], [1, 511, 512, 513, 700, 763], [2999, 1]])
def test_the_cut_into_chunks_changes_the_sketch_by_rounding_only(lengths: list[int]) -> None:
    x = activations()
    whole, cut = (Moments(NUM_INPUTS, NUM_TOKENS, torch.device("cpu"), exact=False) for _ in range(2))
    whole.add(x)
    for chunk in x.split(lengths):
        cut.add(chunk)
    torch.testing.assert_close(sketch_of(cut), sketch_of(whole), rtol=1e-4, atol=1e-3)


def test_rough_errors_of_a_wide_input_are_near_the_exact_ones_and_in_their_order() -> None:
    x = activations()
    statistics = Moments(NUM_INPUTS, NUM_TOKENS, torch.device("cpu"))
    for chunk in x.split(1000):
        statistics.add(chunk)
    rough = [float(row_errors(statistics, d, rough=True).sum()) for d in differences(4)]
    exact = [output_error(x.numpy(), d.numpy()) for d in differences(4)]
    assert rough == pytest.approx(exact, rel=0.1)
    assert rough == sorted(rough)
    assert exact == sorted(exact)


def kept(num_inputs: int, num_tokens: int, *, exact: bool) -> tuple[Tensor, Moments]:
    x = activations()[:num_tokens, :num_inputs]
    statistics = Moments(num_inputs, num_tokens, torch.device("cpu"), exact=exact)
    for chunk in x.split(700):
        statistics.add(chunk)
    return x, statistics


def test_where_a_sketch_will_do_a_wide_input_is_nothing_else() -> None:
    x, statistics = kept(NUM_INPUTS, NUM_TOKENS, exact=False)
    assert sketch_of(statistics).shape == (SKETCH_ROWS, NUM_INPUTS)
    torch.testing.assert_close(statistics.mean_abs, x.abs().mean(0))
    found = [float(row_errors(statistics, d).sum()) for d in differences(4)]
    assert found == pytest.approx([output_error(x.numpy(), d.numpy()) for d in differences(4)], rel=0.1)
    torch.testing.assert_close(statistics.gram(), sketch_of(statistics).T @ sketch_of(statistics), rtol=1e-3, atol=1.0)


@pytest.mark.parametrize(
    ("num_inputs", "num_tokens", "exact"),
    [(NUM_INPUTS, NUM_TOKENS, True), (SKETCH_ROWS, NUM_TOKENS, False), (NUM_INPUTS, SKETCH_ROWS, False)],
    ids=["asked for more", "narrow", "few tokens"],
)
def test_errors_are_exact_where_more_than_a_sketch_is_asked_for_or_as_cheap(
    num_inputs: int, num_tokens: int, exact: bool
) -> None:
    x, statistics = kept(num_inputs, num_tokens, exact=exact)
    d = differences(1)[0][:, :num_inputs]
    assert float(row_errors(statistics, d).sum()) == pytest.approx(output_error(x.numpy(), d.numpy()), rel=1e-4)
