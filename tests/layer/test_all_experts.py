"""`--all-experts`: every expert is calibrated on all tokens of its layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import awqdist
from support.family_oracles import dequantized_checkpoint, distance, load, logits, read_all, recipe, token_ids
from support.tiny_models import tiny_checkpoint
from torch import Tensor
from torch.nn.functional import silu

from awqdist import oneshot
from awqdist.checkpoint.index import INDEX_FILE
from awqdist.errors import OutputError
from awqdist.layer.records import RunSummary

SAMPLES = token_ids(8)
PROBE = token_ids(2, seed=1)
BLOCK = "model.layers.1.mlp"


def quantized(source: Path, output: Path, **options: Any) -> RunSummary:
    return oneshot(
        model=str(source),
        dataset=SAMPLES.tolist(),
        recipe=recipe(),
        output_dir=output,
        num_calibration_samples=SAMPLES.shape[0],
        max_seq_length=SAMPLES.shape[1],
        chunk_tokens=96,
        device="cpu",
        **options,
    )


def block_inputs(source: Path) -> Tensor:
    """What the block of layer 1 is given on the samples, (T, H)."""
    seen: list[Tensor] = []
    model = load(source)
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model, SAMPLES)
    return torch.cat(seen).flatten(0, 1)


def error_of_nearest(x: Tensor, weight: Tensor) -> float:
    """‖X·(nearest(W) - W)ᵀ‖² in 4 bit, groups of 32."""
    groups = weight.unflatten(1, (-1, 32))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    step = (high - low) / 15
    zero = (-low / step).round()
    nearest = ((((groups / step) + zero).round().clamp(0, 15) - zero) * step).flatten(1)
    return float((x @ (nearest - weight).T).square().sum())


@dataclass(frozen=True)
class Case:
    """A checkpoint, quantized with all experts on all tokens."""

    source: Path
    output: Path
    summary: RunSummary


@pytest.fixture(scope="module", params=["deepseek-v3", "qwen2-moe"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    source = tiny_checkpoint(request.param, folder / "source")
    return Case(source, folder / "output", quantized(source, folder / "output", moe_calibrate_all_experts=True))


def test_errors_are_those_of_every_expert_on_every_token(case: Case) -> None:
    layer, x, weights = case.summary.layers[1], block_inputs(case.source), read_all(case.source)

    found = {m.balance_layers[0]: m.error_before for m in layer.mappings}
    for expert in range(8):
        gate, up, down = (weights[f"{BLOCK}.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        expected = error_of_nearest(silu(x @ gate.T) * (x @ up.T), down)
        assert found[f"{BLOCK}.experts.{expert}.down_proj"] == pytest.approx(expected, rel=1e-3)
    reading = next(m for m in layer.mappings if m.smooth_layer.endswith("post_attention_layernorm"))
    outer = [name for name in reading.balance_layers if name.endswith(("gate_proj", "up_proj"))]
    assert len(outer) == 2 * 9
    expected = sum(error_of_nearest(x, weights[f"{name}.weight"]) for name in outer)
    assert reading.error_before == pytest.approx(expected, rel=1e-3)
    assert {site.num_tokens for site in layer.sites} == {SAMPLES.numel()}
    assert not any("received fewer than" in warning for warning in case.summary.warnings)


def test_what_is_written_is_as_good_on_all_tokens_as_its_record_says(case: Case, tmp_path: Path) -> None:
    x, weights = block_inputs(case.source), read_all(case.source)
    plain = read_all(dequantized_checkpoint(case.output, tmp_path / "plain"))
    norm = "model.layers.1.post_attention_layernorm.weight"
    scales = weights[norm] / plain[norm]

    records = {linear.name: linear.relative_error for linear in case.summary.layers[1].linears}
    for expert in range(8):
        name = f"{BLOCK}.experts.{expert}.gate_proj"
        weight = weights[f"{name}.weight"]
        error = (x @ (plain[f"{name}.weight"] / scales - weight).T).square().sum() / (x @ weight.T).square().sum()
        assert records[name] == pytest.approx(float(error), rel=1e-3)
    assert distance(logits(load(tmp_path / "plain"), PROBE), logits(load(case.source), PROBE)) < 0.6


def test_without_it_an_expert_is_calibrated_on_the_tokens_that_are_sent_to_it(case: Case, tmp_path: Path) -> None:
    routed = quantized(case.source, tmp_path / "routed")

    def errors(summary: RunSummary, layer: int, part: str) -> list[float]:
        return [m.error_before for m in summary.layers[layer].mappings if part in m.balance_layers[0]]

    few, every = (errors(summary, 1, ".experts.") for summary in (routed, case.summary))
    assert len(few) == 8
    assert all(a < 0.8 * b for a, b in zip(few, every, strict=True))
    assert errors(routed, 0, "attn") == errors(case.summary, 0, "attn")


def test_a_run_is_not_resumed_without_it(tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral", tmp_path / "source")
    quantized(source, tmp_path / "output", all_experts=True)
    (tmp_path / "output" / INDEX_FILE).unlink()

    with pytest.raises(OutputError, match=r"other settings .*all experts"):
        quantized(source, tmp_path / "output")


def test_the_plan_tells_what_all_experts_take(tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral", tmp_path / "source")
    (tmp_path / "recipe.yaml").write_text(recipe().to_yaml())

    plans = [
        awqdist("plan", source, "--recipe", tmp_path / "recipe.yaml", "--device", "cpu", *option)
        for option in ((), ("--all-experts",))
    ]

    assert [plan.code for plan in plans] == [0, 0]
    assert plans[0].stdout != plans[1].stdout
