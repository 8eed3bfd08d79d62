"""`--all-experts`: every expert is calibrated on all tokens of its layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import awqdist
from family_oracles import dequantized_checkpoint, distance, load, logits, read_all, recipe, token_ids
from tiny_models import tiny_checkpoint
from torch import Tensor
from torch.nn.functional import silu

from awqdist import oneshot
from awqdist.errors import OutputError
from awqdist.run.records import RunSummary

SAMPLES = token_ids(8)
PROBE = token_ids(2, seed=1)
BLOCK = "model.layers.1.mlp"


def quantized(source: Path, output: Path, **options: Any) -> RunSummary:
    return oneshot(
        model=str(source),
        dataset=SAMPLES.tolist(),
        recipe=recipe(symmetric=False),
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


@pytest.fixture(scope="module", params=["deepseek-v3", "qwen2-moe"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(request.param, tmp_path_factory.mktemp(request.param) / "source")


def test_errors_are_those_of_every_expert_on_every_token(source: Path, tmp_path: Path) -> None:
    summary = quantized(source, tmp_path / "output", all_experts=True)

    x, weights = block_inputs(source), read_all(source)
    found = {m.balance_layers[0]: m.error_before for m in summary.layers[1].mappings}
    for expert in range(8):
        gate, up, down = (weights[f"{BLOCK}.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        expected = error_of_nearest(silu(x @ gate.T) * (x @ up.T), down)
        assert found[f"{BLOCK}.experts.{expert}.down_proj"] == pytest.approx(expected, rel=1e-3)
    readers = [m for m in summary.layers[1].mappings if m.smooth_layer.endswith("post_attention_layernorm")]
    outer = [name for m in readers for name in m.balance_layers if name.endswith(("gate_proj", "up_proj"))]
    assert len(outer) == 2 * 9
    expected = sum(error_of_nearest(x, weights[f"{name}.weight"]) for name in outer)
    assert readers[0].error_before == pytest.approx(expected, rel=1e-3)
    assert {site.num_tokens for site in summary.layers[1].sites} == {SAMPLES.numel()}
    assert not any("were sent fewer than" in warning for warning in summary.warnings)


def test_what_is_written_is_as_good_on_all_tokens_as_its_record_says(source: Path, tmp_path: Path) -> None:
    summary = quantized(source, tmp_path / "output", moe_calibrate_all_experts=True)

    x, weights = block_inputs(source), read_all(source)
    plain = read_all(dequantized_checkpoint(tmp_path / "output", tmp_path / "plain"))
    norm = "model.layers.1.post_attention_layernorm.weight"
    scales = weights[norm] / plain[norm]
    records = {linear.name: linear.relative_error for linear in summary.layers[1].linears}
    for expert in range(8):
        name = f"{BLOCK}.experts.{expert}.gate_proj"
        weight = weights[f"{name}.weight"]
        error = (x @ (plain[f"{name}.weight"] / scales - weight).T).square().sum() / (x @ weight.T).square().sum()
        assert records[name] == pytest.approx(float(error), rel=1e-3)
    assert distance(logits(load(tmp_path / "plain"), PROBE), logits(load(source), PROBE)) < 0.6


def test_without_it_an_expert_is_calibrated_on_the_tokens_that_are_sent_to_it(source: Path, tmp_path: Path) -> None:
    routed = quantized(source, tmp_path / "routed")
    everything = quantized(source, tmp_path / "all", all_experts=True)

    for layer in (routed, everything):
        assert len(layer.layers[1].mappings) > 8
    ours, theirs = (
        [m.error_before for m in s.layers[1].mappings if ".experts." in m.smooth_layer] for s in (routed, everything)
    )
    assert all(few < 0.8 * every for few, every in zip(ours, theirs, strict=True))
    dense = [
        [m.error_before for m in s.layers[0].mappings if "attn" in m.balance_layers[0]] for s in (routed, everything)
    ]
    assert dense[0] == dense[1]


@pytest.mark.parametrize("first", [True, False])
def test_a_run_is_not_resumed_under_the_other_setting(first: bool, tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral", tmp_path / "source")
    quantized(source, tmp_path / "output", all_experts=first)
    (tmp_path / "output" / "model.safetensors.index.json").unlink()

    with pytest.raises(OutputError, match=r"other settings .*all experts"):
        quantized(source, tmp_path / "output", all_experts=not first)


def test_the_plan_tells_what_all_experts_take(tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral", tmp_path / "source")
    (tmp_path / "recipe.yaml").write_text(recipe().to_yaml())

    plans = [
        awqdist("plan", source, "--recipe", tmp_path / "recipe.yaml", "--device", "cpu", *option)
        for option in ((), ("--all-experts",))
    ]

    assert [plan.code for plan in plans] == [0, 0]
    assert plans[0].stdout != plans[1].stdout
