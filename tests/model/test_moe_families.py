"""Every family with mixtures of experts, from its published on-disk form to a quantized checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    routing,
    smoothed_checkpoint,
    token_ids,
    write_all,
)
from support.tiny_hybrids import FULL_PRECISION, UNSMOOTHED
from support.tiny_models import fused_families, moe_families, tiny_checkpoint, tiny_text
from torch import Tensor
from transformers import AutoConfig

from awqdist import oneshot
from awqdist.eval.evaluate import evaluate
from awqdist.eval.weights import load_dequantized
from awqdist.layer import work
from awqdist.layer.plan import LayerPlan
from awqdist.layer.quantize import LayerResult, quantize_layer
from awqdist.layer.records import RunSummary
from awqdist.model.mapping import ResolvedMapping

SAMPLES = token_ids(8)
PROBE = token_ids(2, seed=1)
EXPERTS_NOT_LOADED = ["granitemoe", "granitemoe-shared", "gpt-oss", "qwen3-vl-moe"]


@dataclass
class Case:
    """One family, quantized once for all tests of this file. in_memory: the results of its layers, before they were packed."""

    family: str
    source: Path
    float_logits: Tensor
    output: Path
    summary: RunSummary
    in_memory: dict[int, LayerResult]


def quantized(source: Path, output: Path, **options: Any) -> RunSummary:
    return oneshot(
        model=str(source),
        dataset=SAMPLES.tolist(),
        recipe=recipe(**options),
        output_dir=output,
        num_calibration_samples=SAMPLES.shape[0],
        max_seq_length=SAMPLES.shape[1],
        chunk_tokens=96,
        device="cpu",
    )


@pytest.fixture(scope="module", params=moe_families())
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    source = tiny_checkpoint(request.param, folder / "source")
    results: dict[int, LayerResult] = {}

    def recorded(task: LayerPlan, *args: Any) -> LayerResult:
        results[task.index] = quantize_layer(task, *args)
        return results[task.index]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "quantize_layer", recorded)
        summary = quantized(source, folder / "output")
    return Case(request.param, source, logits(load(source), PROBE), folder / "output", summary, results)


def test_smoothing_with_random_scales_keeps_logits_and_routing_of_the_whole_model(case: Case, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)

    def between_a_quarter_and_four(task: LayerPlan, mapping: ResolvedMapping, weights: dict[str, Tensor]) -> Tensor:
        source = mapping.source_channels(task.by_path[mapping.balance[0]].shape[1])
        return torch.exp2(4 * torch.rand(int(source.max()) + 1, generator=generator) - 2)[source]

    smoothed = smoothed_checkpoint(open_job(case.source, recipe()), tmp_path / "smoothed", between_a_quarter_and_four)

    assert distance(logits(load(smoothed), PROBE), case.float_logits) < 1e-4
    before, after = routing(load(case.source), PROBE), routing(load(smoothed), PROBE)
    assert before
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_every_linear_but_routers_and_gates_is_smoothed_and_packed(case: Case) -> None:
    gates = r"(^|\.)(gate|shared_expert_gate|router|wg)$"
    full_precision = f"{gates}|{FULL_PRECISION.get(case.family, gates)}$"
    for task in open_job(case.source, recipe()).plan.layers:
        assert {q.path for q in task.linears if q.scheme is None} == {
            p for p in task.by_path if re.search(full_precision, p)
        }
        balanced = {path for mapping in task.mappings for path in mapping.balance}
        assert {p for p in task.by_path if p not in balanced} == {
            p for p in task.by_path if re.search(UNSMOOTHED.get(case.family, "^none$"), p)
        }


def test_every_source_tensor_is_packed_or_passed_through(case: Case) -> None:
    source, output = read_all(case.source), read_all(case.output)
    packed = {name.removesuffix(".weight_packed") for name in output if name.endswith(".weight_packed")}
    job = open_job(case.source, recipe())

    expected = {name for name in source if name.removesuffix(".weight") not in packed}
    expected |= {f"{module}.{kind}" for module in packed for kind in KINDS}
    assert set(output) == expected
    assert packed == {q.disk_name for task in job.plan.layers for q in task.quantized}
    assert any(".experts.7." in name for name in packed)
    for name, tensor in source.items():
        if name.removesuffix(".weight") not in packed:
            assert output[name].dtype == tensor.dtype, name
    for name in set(source) - {name for task in job.plan.layers for name in task.tensors.values()}:
        assert torch.equal(output[name], source[name]), name


def test_an_independent_reader_gets_the_logits_of_the_weights_in_memory(case: Case, tmp_path: Path) -> None:
    plain = dequantized_checkpoint(case.output, tmp_path / "plain")
    tensors = read_all(case.source)
    for task in open_job(case.source, recipe()).plan.layers:
        result = case.in_memory[task.index]
        tensors |= {task.tensors[name]: tensor for name, tensor in result.parameters.items()}
        tensors |= {f"{task.disk_module(path)}.weight": w.dequantize() for path, w in result.weights.items()}
    in_memory = write_all(tmp_path / "memory", case.source, tensors)

    found = logits(load(plain), PROBE)
    assert distance(found, logits(load(in_memory), PROBE)) < 1e-5
    assert distance(found, case.float_logits) < 0.6


@pytest.mark.parametrize("case", [f for f in moe_families() if f not in EXPERTS_NOT_LOADED], indirect=True)
def test_transformers_loads_the_model_quantized_symmetrically(case: Case, tmp_path: Path) -> None:
    quantized(case.source, tmp_path / "output", symmetric=True)
    model, info = load(tmp_path / "output", output_loading_info=True)

    assert {key: found for key, found in info.items() if found} == {}
    plain = dequantized_checkpoint(tmp_path / "output", tmp_path / "plain")
    assert distance(logits(model, PROBE), logits(load(plain), PROBE)) < 1e-5


@pytest.mark.parametrize("case", [f for f in moe_families() if f not in fused_families()], indirect=True)
def test_transformers_does_not_read_zero_points_of_experts(case: Case) -> None:
    """A limit of transformers 5.17, not of the checkpoint: once this fails, the README's table can say so."""
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        load(case.output)


@pytest.mark.parametrize("case", ["llama4", "llama4-vision"], indirect=True)
def test_transformers_loads_a_quantized_llama_4_with_zero_points(case: Case, tmp_path: Path) -> None:
    model, info = load(case.output, output_loading_info=True)

    assert {key: found for key, found in info.items() if found} == {}
    plain = dequantized_checkpoint(case.output, tmp_path / "plain")
    assert distance(logits(model, PROBE), logits(load(plain), PROBE)) < 1e-5


@pytest.mark.parametrize("case", EXPERTS_NOT_LOADED, indirect=True)
def test_transformers_warns_that_it_makes_up_experts_that_it_wants_in_one_tensor(case: Case) -> None:
    """A limit of transformers 5.17: it has no conversion from linears to the tensor for these families."""
    model, info = load(case.output, output_loading_info=True)

    assert set(info["missing_keys"]) == {name for name in model.state_dict() if ".experts." in name}
    assert {name for name in read_all(case.output) if ".experts." in name} == set(info["unexpected_keys"])


@pytest.mark.parametrize("case", fused_families(), indirect=True)
def test_eval_reads_experts_that_the_family_stores_in_one_tensor(case: Case, tmp_path: Path) -> None:
    plain = dequantized_checkpoint(case.output, tmp_path / "plain")
    (tmp_path / "text.txt").write_text(tiny_text(40))

    model, info = load_dequantized(case.output, AutoConfig.from_pretrained(case.output))
    assert {key: found for key, found in info.items() if found} == {}
    assert distance(logits(model, PROBE), logits(load(plain), PROBE)) < 1e-5
    found = evaluate(str(case.output), tmp_path / "text.txt", against=str(case.source), max_tokens=256, window=32)
    assert 0 < (found.kl or 0) < 0.2


def test_the_layer_by_layer_forward_gives_the_hidden_states_of_the_models_own(case: Case) -> None:
    found, expected = layer_by_layer(case.source, PROBE), hidden_states(case.source, PROBE)

    assert len(found) == len(expected)
    assert max(distance(ours, theirs) for ours, theirs in zip(found, expected, strict=True)) < 1e-6


def test_tokens_per_expert_are_recorded_and_add_up(case: Case) -> None:
    job = open_job(case.source, recipe())
    config = job.skeleton.model.config.get_text_config(decoder=True)
    top_k = getattr(config, "num_experts_per_tok", None) or config.moe_topk
    num_blocks = 0
    for task, record in zip(job.plan.layers, case.summary.layers, strict=True):
        tokens = {site.linears[0]: site.num_tokens for site in record.sites}
        for inner in (False, True):
            routed = [s.linears[0].disk_name for s in task.sites if s.expert and s.expert.is_inner == inner]
            assert sum(tokens[name] for name in routed) == (top_k * SAMPLES.numel() if routed else 0)
        num_blocks += any(site.expert for site in task.sites)
    assert num_blocks
