"""Experts that are sent all tokens, few, or none; and what an expert is fitted to."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.family_oracles import dequantized_checkpoint, distance, load, logits, open_job, recipe, token_ids
from support.quant_oracles import row_errors
from support.tiny_models import tiny_checkpoint
from torch import Tensor

from awqdist import AWQModifier, GPTQModifier, load_recipe, oneshot
from awqdist.checkpoint.index import INDEX_FILE
from awqdist.errors import AwqdistError
from awqdist.layer.calibrate import SAMPLED_ROWS
from awqdist.layer.records import RunSummary
from awqdist.quant.moments import PRIOR_TOKENS, Moments

SAMPLES = token_ids(8)
PROBE = token_ids(2, seed=1)
CPU = torch.device("cpu")
SCHEME = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
GROUPS = {"group_0": {"targets": ["Linear"], "weights": SCHEME}}


def spoiled(folder: Path, spoil: Callable[[dict[str, Tensor]], None], family: str = "deepseek-v3") -> Path:
    """A tiny checkpoint whose tensors a function has changed."""
    source = tiny_checkpoint(family, folder)
    tensors = load_file(source / "model.safetensors")
    spoil(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def quantized(source: Path, output: Path, **options: Any) -> RunSummary:
    return oneshot(
        model=str(source),
        dataset=SAMPLES.tolist(),
        recipe=load_recipe([AWQModifier(), GPTQModifier(ignore=["lm_head"], config_groups=GROUPS)]),
        output_dir=output,
        num_calibration_samples=SAMPLES.shape[0],
        max_seq_length=SAMPLES.shape[1],
        device="cpu",
        **options,
    )


def only(*experts: int) -> Callable[[dict[str, Tensor]], None]:
    """Makes the router of layer 1 send every token to these."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        bias = tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
        bias.fill_(0.0)
        bias[list(experts)] = 100.0

    return spoil


def test_all_tokens_to_a_few_experts_and_none_to_the_others(tmp_path: Path) -> None:
    source = spoiled(tmp_path / "source", only(0, 1, 6))  # 2 groups of 2 experts may be chosen

    summary = quantized(source, tmp_path / "output")

    layer = summary.layers[1]
    tokens = {site.expert: site.num_tokens for site in layer.sites if site.expert is not None}
    assert tokens == {e: SAMPLES.numel() if e in (0, 1, 6) else 0 for e in range(8)}
    warning = next(w for w in summary.warnings if w.startswith("model.layers.1.mlp.experts: 5 of 8 experts"))
    assert "2 (0), 3 (0), 4 (0), 5 (0), 7 (0)" in warning
    for linear in layer.linears:
        assert linear.relative_error < linear.relative_error_nearest, linear.name
    plain = dequantized_checkpoint(tmp_path / "output", tmp_path / "plain")
    assert distance(logits(load(plain), PROBE), logits(load(source), PROBE)) < 0.5


def test_an_expert_without_tokens_is_fitted_to_all_tokens_of_its_layer(tmp_path: Path) -> None:
    source = spoiled(tmp_path / "source", only(0, 1, 6))
    quantized(source, tmp_path / "output")
    original = load_file(source / "model.safetensors")
    inputs: list[Tensor] = []
    model = load(source)
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    logits(model, SAMPLES)
    x = inputs[0].flatten(0, 1)  # (T, H)

    plain = load_file(dequantized_checkpoint(tmp_path / "output", tmp_path / "plain") / "model.safetensors")
    norm = "model.layers.1.post_attention_layernorm.weight"
    scales = original[norm] / plain[norm]
    for name in ("gate_proj", "up_proj"):
        key = f"model.layers.1.mlp.experts.4.{name}.weight"
        nearest = _nearest(original[key])
        written = (plain[key] if name == "gate_proj" else _best_rows(plain[key], original[key] * scales)) / scales
        assert _error(x, written - original[key]) < 0.8 * _error(x, nearest - original[key])


def _best_rows(found: Tensor, expected: Tensor) -> Tensor:
    """Undoes the smoothing of rows (up -> down), as far as least squares tells it."""
    return found * ((found * expected).sum(1) / (found * found).sum(1)).unsqueeze(1)


def _error(x: Tensor, difference: Tensor) -> float:
    return float((x @ difference.T).square().sum())


def _nearest(weight: Tensor) -> Tensor:
    groups = weight.unflatten(1, (-1, 32))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    step = (high - low) / 15
    zero = (-low / step).round()
    return ((((groups / step) + zero).round().clamp(0, 15) - zero) * step).flatten(1)


def test_the_gram_of_an_expert_is_its_own_and_a_number_of_average_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    everything, own = torch.randn(200, 16, generator=generator), torch.randn(7, 16, generator=generator)
    prior = Moments(16, 200, CPU)
    prior.add(everything)
    statistics = Moments(16, 200, CPU, prior=prior, most_rows=100)
    empty = Moments(16, 200, CPU, prior=prior, most_rows=100)
    statistics.add(own[:3])
    statistics.add(own[3:])

    average = everything.T @ everything / 200
    torch.testing.assert_close(statistics.gram(), own.T @ own + PRIOR_TOKENS * average)
    torch.testing.assert_close(empty.gram(), PRIOR_TOKENS * average)
    mean = (own.abs().sum(0) + PRIOR_TOKENS * everything.abs().mean(0)) / (7 + PRIOR_TOKENS)
    torch.testing.assert_close(statistics.mean_abs, mean)
    difference = torch.randn(5, 16, generator=generator)
    expected = ((difference @ statistics.gram()) * difference).sum(1).double()
    torch.testing.assert_close(row_errors(statistics, difference), expected, rtol=1e-4, atol=1e-4)


def test_rows_beyond_the_cap_are_counted_and_the_kept_ones_stand_for_them() -> None:
    rows = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    prior = Moments(16, 50, CPU)
    prior.add(rows)
    statistics = Moments(16, 50, CPU, prior=prior, most_rows=20)
    for chunk in rows.split(15):
        statistics.add(chunk)

    assert statistics.num_tokens == 50
    expected = rows[:20].T @ rows[:20] * (50 / 20) + PRIOR_TOKENS * rows.T @ rows / 50
    torch.testing.assert_close(statistics.gram(), expected)


def test_rows_of_an_expert_are_those_that_the_router_sends_to_it(tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen2-moe", tmp_path / "source")
    summary = quantized(source, tmp_path / "output")
    seen: list[Tensor] = []
    model = load(source)
    model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    logits(model, SAMPLES)

    counts = torch.bincount(torch.cat(seen).flatten(), minlength=8).tolist()
    sites = [s for s in summary.layers[1].sites if s.expert is not None and "down" in s.linears[0]]
    assert [site.num_tokens for site in sorted(sites, key=lambda s: s.expert or 0)] == counts


@pytest.mark.parametrize("leaf", ["gate_proj", "down_proj"])
def test_nan_in_one_expert_stops_the_run_naming_it_and_the_run_resumes_after_the_repair(
    leaf: str, tmp_path: Path
) -> None:
    name = f"model.layers.1.mlp.experts.5.{leaf}.weight"

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name][3, 4] = float("nan")

    source = spoiled(tmp_path / "source", spoil)
    with pytest.raises(AwqdistError, match=rf"layer 1: tensor {name} holds 1 values that are NaN"):
        quantized(source, tmp_path / "output")
    assert not (tmp_path / "output" / INDEX_FILE).exists()
    assert (tmp_path / "output" / "model-layer-00000.safetensors").exists()

    tiny_checkpoint("deepseek-v3", source)
    quantized(source, tmp_path / "output")
    assert (tmp_path / "output" / INDEX_FILE).exists()


def test_a_missing_expert_is_named_before_anything_is_read(tmp_path: Path) -> None:
    source = spoiled(tmp_path / "source", lambda tensors: tensors.pop("model.layers.2.mlp.experts.3.up_proj.weight"))

    with pytest.raises(AwqdistError, match=r"layers\.2\.mlp\.experts.*8 experts.*lacks up_proj\.weight of expert 3"):
        open_job(source, recipe())


def test_the_result_does_not_depend_on_how_the_samples_are_cut_into_chunks_beyond_rounding(tmp_path: Path) -> None:
    source = tiny_checkpoint("deepseek-v3", tmp_path / "source")
    whole = quantized(source, tmp_path / "whole", chunk_tokens=256)
    cut = quantized(source, tmp_path / "cut", chunk_tokens=64)

    assert SAMPLES.numel() <= SAMPLED_ROWS
    for ours, theirs in zip(whole.layers, cut.layers, strict=True):
        assert [s.num_tokens for s in ours.sites] == [s.num_tokens for s in theirs.sites]
        for one, other in zip(ours.mappings, theirs.mappings, strict=True):
            assert one.error_before == pytest.approx(other.error_before, rel=1e-3)


@pytest.mark.parametrize(
    "ignored",
    [
        r"re:.*\.experts\..*",
        r"re:.*\.experts\.3\..*",
        r"re:.*(gate|up)_proj",
        r"re:.*down_proj",
        r"re:.*shared_experts.*",
        r"re:.*mlp.*",
    ],
)
def test_a_recipe_may_leave_out_any_part_of_a_block(ignored: str, tmp_path: Path) -> None:
    source = tiny_checkpoint("deepseek-v3", tmp_path / "source")
    groups = load_recipe([AWQModifier(), GPTQModifier(ignore=["lm_head", ignored], config_groups=GROUPS)])

    summary = oneshot(
        model=str(source),
        dataset=SAMPLES.tolist(),
        recipe=groups,
        output_dir=tmp_path / "output",
        num_calibration_samples=SAMPLES.shape[0],
        max_seq_length=SAMPLES.shape[1],
        device="cpu",
    )

    assert not any(re.match(ignored.removeprefix("re:"), x.name) for record in summary.layers for x in record.linears)
    plain = dequantized_checkpoint(tmp_path / "output", tmp_path / "plain")
    assert distance(logits(load(plain), PROBE), logits(load(source), PROBE)) < 0.5
