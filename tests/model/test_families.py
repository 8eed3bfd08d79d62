"""Every dense decoder family, from its published on-disk form to a quantized model that transformers loads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from support.family_oracles import (
    KINDS,
    dequantized_checkpoint,
    distance,
    hidden_states,
    layer_by_layer,
    load,
    logits,
    open_job,
    read_all,
    recipe,
    site_inputs,
    smoothed_checkpoint,
    token_ids,
)
from support.tiny_hybrids import FULL_PRECISION
from support.tiny_models import families, tiny_checkpoint
from torch import Tensor

from awqdist import oneshot
from awqdist.layer.plan import LayerPlan
from awqdist.layer.records import RunSummary
from awqdist.model.mapping import ResolvedMapping
from awqdist.quant.moments import Moments
from awqdist.quant.search import BalanceWeight, Problem, SearchGroup, choose_scales
from awqdist.run.job import Job

SAMPLES = token_ids(8)
PROBE = token_ids(2, seed=1)


@dataclass
class Case:
    """One family, quantized once for all tests of this file."""

    family: str
    source: Path
    float_logits: Tensor
    outputs: dict[int, Path]  # by number of bits
    summaries: dict[int, RunSummary]


@pytest.fixture(scope="module", params=families())
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    source = tiny_checkpoint(request.param, folder / "source")
    outputs, summaries = {}, {}
    for bits in (4, 8):
        outputs[bits] = folder / f"quantized-{bits}"
        summaries[bits] = oneshot(
            model=str(source),
            dataset=SAMPLES.tolist(),
            recipe=recipe(bits),
            output_dir=outputs[bits],
            num_calibration_samples=SAMPLES.shape[0],
            max_seq_length=SAMPLES.shape[1],
            chunk_tokens=96,
            device="cpu",
        )
    return Case(request.param, source, logits(load(source), PROBE), outputs, summaries)


def test_smoothing_with_random_scales_keeps_the_logits_of_the_whole_model(case: Case, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)

    def between_a_quarter_and_four(task: LayerPlan, mapping: ResolvedMapping, weights: dict[str, Tensor]) -> Tensor:
        source = mapping.source_channels(task.by_path[mapping.balance[0]].shape[1])
        return torch.exp2(4 * torch.rand(int(source.max()) + 1, generator=generator) - 2)[source]

    job = open_job(case.source, recipe())
    smoothed = smoothed_checkpoint(job, tmp_path / "smoothed", between_a_quarter_and_four)

    assert all(task.mappings for task in job.plan.layers)
    assert distance(logits(load(smoothed), PROBE), case.float_logits) < 1e-4


def test_smoothing_with_the_searched_scales_keeps_the_logits_of_the_whole_model(case: Case, tmp_path: Path) -> None:
    job = open_job(case.source, recipe())
    inputs = site_inputs(job, load(case.source), SAMPLES)
    errors: dict[tuple[int, str], float] = {}

    smoothed = smoothed_checkpoint(job, tmp_path / "smoothed", partial(_searched, job, inputs, errors))

    assert distance(logits(load(smoothed), PROBE), case.float_logits) < 1e-4
    records = [(r.layer, m.balance_layers[0], m.error_after) for r in case.summaries[4].layers for m in r.mappings]
    assert {(layer, name): pytest.approx(error, rel=1e-3) for layer, name, error in records} == errors


def _searched(
    job: Job,
    inputs: dict[tuple[int, str], list[Tensor]],
    errors: dict[tuple[int, str], float],
    task: LayerPlan,
    mapping: ResolvedMapping,
    weights: dict[str, Tensor],
) -> Tensor:
    """The scales of awqdist's search, on inputs that transformers' own forward gave."""
    first = mapping.balance[0]
    statistics = Moments(task.by_path[first].shape[1], SAMPLES.numel(), torch.device("cpu"))
    for activations in inputs[task.index, first]:
        statistics.add(activations)
    balance = [BalanceWeight(weights[f"{path}.weight"], task.by_path[path].scheme) for path in mapping.balance]
    assert job.recipe.smoothing is not None
    num_inputs = task.by_path[first].shape[1]
    source, num_sources = mapping.source_channels(num_inputs), mapping.num_channels(num_inputs)
    group = SearchGroup(balance, statistics)
    (choice,) = choose_scales(
        [Problem([group], statistics.mean_abs, source, num_sources, torch.float32)], job.recipe.smoothing
    )
    errors[task.index, task.disk_module(first)] = choice.error_after
    return choice.scales


@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_loads_the_quantized_model_with_every_key_in_its_place(case: Case, bits: int) -> None:
    _, info = load(case.outputs[bits], output_loading_info=True)

    assert {key: found for key, found in info.items() if found} == {}


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 0.45), (8, 0.03)])
def test_logits_of_the_quantized_model_are_close_to_those_of_the_float_model(
    case: Case, bits: int, tolerance: float
) -> None:
    found = logits(load(case.outputs[bits]), PROBE)

    assert torch.isfinite(found).all()
    assert distance(found, case.float_logits) < tolerance


def test_every_source_tensor_is_packed_or_passed_through(case: Case) -> None:
    source, output = read_all(case.source), read_all(case.outputs[4])
    packed = {name.removesuffix(".weight_packed") for name in output if name.endswith(".weight_packed")}
    job = open_job(case.source, recipe())

    expected = {name for name in source if name.removesuffix(".weight") not in packed}
    expected |= {f"{module}.{kind}" for module in packed for kind in KINDS}
    assert set(output) == expected
    linears = {linear.disk_name for task in job.plan.layers for linear in task.linears}
    full_precision = FULL_PRECISION.get(case.family, "none")
    assert packed == {name for name in linears if not re.search(f"{full_precision}$", name)}
    for name in set(source) - {name for task in job.plan.layers for name in task.tensors.values()}:
        assert torch.equal(output[name], source[name]), name


@pytest.mark.parametrize("bits", [4, 8])
def test_a_slow_independent_reader_gets_the_logits_of_the_loaded_model(case: Case, bits: int, tmp_path: Path) -> None:
    plain = dequantized_checkpoint(case.outputs[bits], tmp_path / "plain")

    assert distance(logits(load(plain), PROBE), logits(load(case.outputs[bits]), PROBE)) < 1e-5


def test_the_layer_by_layer_forward_gives_the_hidden_states_of_the_models_own(case: Case) -> None:
    found, expected = layer_by_layer(case.source, PROBE), hidden_states(case.source, PROBE)

    assert len(found) == len(expected)
    assert max(distance(ours, theirs) for ours, theirs in zip(found, expected, strict=True)) < 1e-6
