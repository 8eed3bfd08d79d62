"""What only some layers have: recurrent states, short convolutions, sparse attention, and linears that stay in full precision."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.family_oracles import (
    dequantized_checkpoint,
    distance,
    hidden_states,
    layer_by_layer,
    load,
    logits,
    open_job,
    read_all,
    recipe,
    smoothed_checkpoint,
    token_ids,
)
from support.tiny_models import alike_families, tiny_checkpoint
from torch import Tensor
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.lfm2 import modeling_lfm2

from awqdist import oneshot
from awqdist.errors import CalibrationError, ModelError
from awqdist.layer.plan import LayerPlan
from awqdist.layer.records import RunSummary
from awqdist.model.mapping import ResolvedMapping, SmoothedParameters
from awqdist.recipe import Recipe

SAMPLES = token_ids(6)
PROBE = token_ids(2, seed=1)


def quantized(source: Path, output: Path, chosen: Recipe) -> RunSummary:
    return oneshot(
        model=str(source),
        dataset=SAMPLES.tolist(),
        recipe=chosen,
        output_dir=output,
        num_calibration_samples=SAMPLES.shape[0],
        max_seq_length=SAMPLES.shape[1],
        device="cpu",
    )


def test_what_relu_squared_reads_is_divided_by_the_root_of_the_scales() -> None:
    generator = torch.Generator().manual_seed(0)
    names = {"up.weight": (48, 32), "up.bias": (48,), "down.weight": (32, 48)}
    before = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    scales, states = torch.rand(48, generator=generator) * 3 + 0.3, torch.randn(20, 32, generator=generator)

    def mlp(p: Mapping[str, Tensor]) -> Tensor:
        return (states @ p["up.weight"].T + p["up.bias"]).clamp(min=0) ** 2 @ p["down.weight"].T

    changed = SmoothedParameters(before)
    changed.apply(ResolvedMapping("up", ("down",), False, False, None, power=2), scales)

    assert not torch.allclose(changed["up.weight"], before["up.weight"])
    torch.testing.assert_close(mlp(changed), mlp(before), rtol=1e-4, atol=1e-3)


def test_layers_that_share_an_indexer_attend_to_all_tokens_of_short_samples(tmp_path: Path) -> None:
    source = tiny_checkpoint("glm5", tmp_path / "source", index_topk=32, indexer_types=["full", "shared"])
    assert not any("layers.1.self_attn.indexer" in name for name in read_all(source))

    states = zip(layer_by_layer(source, PROBE), hidden_states(source, PROBE), strict=True)
    assert max(distance(ours, theirs) for ours, theirs in states) < 1e-6
    summary = quantized(source, tmp_path / "output", recipe(8, symmetric=True))
    assert all(record.smoothing_error < 1e-4 for record in summary.layers)
    load(tmp_path / "output")


def test_samples_that_are_longer_than_a_shared_indexer_chooses_are_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint("glm5", tmp_path / "source", index_topk=16, indexer_types=["full", "shared"])

    with pytest.raises(
        CalibrationError, match=r"attend to the 16 tokens .* samples of 32 tokens; lower --seq-len to 16"
    ):
        quantized(source, tmp_path / "output", recipe())


def test_linears_that_a_family_keeps_are_quantized_where_targets_name_them(tmp_path: Path) -> None:
    source = tiny_checkpoint("jamba", tmp_path / "source")
    targets = ("Linear", r"re:.*mamba\.(in|out)_proj")
    job = open_job(source, recipe(targets=targets))
    assert [q.path for q in job.plan.layers[0].quantized if "mamba" in q.path] == ["mamba.in_proj", "mamba.out_proj"]

    generator = torch.Generator().manual_seed(3)

    def random(task: LayerPlan, mapping: ResolvedMapping, weights: dict[str, Tensor]) -> Tensor:
        source = mapping.source_channels(task.by_path[mapping.balance[0]].shape[1])
        return torch.exp2(4 * torch.rand(int(source.max()) + 1, generator=generator) - 2)[source]

    smoothed = smoothed_checkpoint(job, tmp_path / "smoothed", random)
    assert distance(logits(load(smoothed), PROBE), logits(load(source), PROBE)) < 1e-4
    quantized(source, tmp_path / "output", recipe(8, targets=targets, symmetric=True))
    assert "model.layers.0.mamba.in_proj.weight_packed" in read_all(tmp_path / "output")
    plain = dequantized_checkpoint(tmp_path / "output", tmp_path / "plain")
    assert distance(logits(load(tmp_path / "output"), PROBE), logits(load(plain), PROBE)) < 1e-5


def test_what_is_stored_in_float32_beside_bfloat16_stays_so(tmp_path: Path) -> None:
    """Qwen3.5 stores A_log and the norm over its values so."""
    source = tiny_checkpoint("qwen3.5", tmp_path / "source", torch.bfloat16)
    wide = ("A_log", "linear_attn.norm.weight")
    tensors = {name: tensor.float() if name.endswith(wide) else tensor for name, tensor in read_all(source).items()}
    save_file(tensors, source / "model.safetensors")

    summary = quantized(source, tmp_path / "output", recipe(8))

    output = read_all(tmp_path / "output")
    assert {name for name, tensor in output.items() if tensor.dtype == torch.float32} == {
        name for name in tensors if name.endswith(wide)
    }
    assert all(record.smoothing_error < 1e-4 for record in summary.layers)
    expected = logits(load(source, dtype=torch.float32), PROBE)
    assert distance(logits(load(tmp_path / "output", dtype=torch.float32), PROBE), expected) < 0.03


def test_loaders_are_told_to_leave_multi_token_prediction_alone(tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen3-next", tmp_path / "source")

    summary = quantized(source, tmp_path / "output", recipe())

    config = json.loads((tmp_path / "output" / "config.json").read_text())
    ignored = {name for name in config["quantization_config"]["ignore"] if name.startswith("mtp")}
    assert ignored == {"mtp.fc", "mtp.layers.0.self_attn.q_proj", "mtp.layers.0.mlp.experts.0.up_proj"}
    assert any("mtp" in warning for warning in summary.warnings)


@pytest.mark.parametrize("family", alike_families())
def test_a_class_with_the_layers_of_another_is_planned_alike(family: str, tmp_path: Path) -> None:
    other = {"deepseek-v3.2": "glm5"}.get(family, family.removesuffix("-text"))
    plans = [open_job(tiny_checkpoint(name, tmp_path / name), recipe()).plan.layers for name in (family, other)]

    assert len(plans[0]) == len(plans[1]) == 2
    for ours, theirs in zip(*plans, strict=True):
        assert (ours.quantized, ours.mappings, ours.sites) == (theirs.quantized, theirs.mappings, theirs.sites)


def test_experts_of_one_tensor_give_the_bytes_of_experts_apart(tmp_path: Path) -> None:
    """Qwen3.5-MoE is published so, and transformers writes a tensor for every expert's linear."""
    apart = tiny_checkpoint("qwen3.5-moe", tmp_path / "apart", torch.bfloat16)
    tensors = read_all(apart)
    for block in {found[1] for name in tensors if (found := re.match(r"(.*\.experts)\.\d+\.", name))}:
        gate, up, down = (
            torch.stack([tensors.pop(f"{block}.{e}.{linear}_proj.weight") for e in range(8)])
            for linear in ("gate", "up", "down")
        )
        tensors |= {f"{block}.gate_up_proj": torch.cat([gate, up], 1), f"{block}.down_proj": down}
    together = shutil.copytree(apart, tmp_path / "together")
    save_file(tensors, together / "model.safetensors")

    for source in (apart, together):
        quantized(source, tmp_path / f"{source.name}-output", recipe())

    expected, found = (read_all(tmp_path / f"{kind}-output") for kind in ("apart", "together"))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_experts_that_read_a_projection_of_their_own_are_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint("nemotron-h-moe", tmp_path / "source", moe_latent_size=32)

    with pytest.raises(
        ModelError, match=r"mixer\.experts read a projection of their own of 32 channels.*moe_latent_size"
    ):
        open_job(source, recipe())


def test_kernels_of_optional_packages_are_left_alone_off_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package: Any = ModuleType("causal_conv1d")
    package.__spec__ = ModuleSpec("causal_conv1d", None)
    package.causal_conv1d_fn = _expects_a_gpu
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    own: Any = modeling_lfm2.causal_conv1d_fn
    kernel = use_kernel_func_from_hub_with_fallback("causal_conv1d_fn", "causal_conv1d")(own)
    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_fn", kernel)
    source = tiny_checkpoint("lfm2", tmp_path / "source")
    with pytest.raises(RuntimeError, match="expects a GPU"):
        logits(load(source), PROBE)

    assert len(quantized(source, tmp_path / "output", recipe()).layers) == 2
    assert not torch.compiler.is_exporting()


def _expects_a_gpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    raise RuntimeError("expects a GPU")
