"""What a CUDA device must give: the same results as the CPU up to its arithmetic, and the same bytes twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import GROUP_SIZE, tiny_checkpoint, tiny_text

from awqdist import RunSettings, load_recipe, quantize
from awqdist.checkpoint.index import read_index
from awqdist.layer.records import RunSummary
from awqdist.plan.memory import estimate
from awqdist.quant.moments import Moments
from awqdist.run.job import prepare

pytestmark = pytest.mark.gpu

RECIPE = f"""
AWQModifier: {{n_grid: 6}}
GPTQModifier:
  targets: [Linear]
  ignore: [lm_head]
  config_groups:
    group_0:
      targets: [Linear]
      weights: {{num_bits: 4, type: int, symmetric: false, strategy: group, group_size: {GROUP_SIZE}}}
"""


def run(model: Path, output: Path, device: str) -> RunSummary:
    settings = RunSettings(model, output, device=device, num_samples=8, sequence_length=32, chunk_tokens=64)
    return quantize(load_recipe(RECIPE), settings, [tiny_text()])


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "phi3", "opt"])
def test_errors_on_the_gpu_are_those_on_the_cpu(family: str, tmp_path: Path) -> None:
    model = tiny_checkpoint(family, tmp_path / "model")
    on_cpu, on_gpu = run(model, tmp_path / "cpu", "cpu"), run(model, tmp_path / "gpu", "cuda")
    for cpu_layer, gpu_layer in zip(on_cpu.layers, on_gpu.layers, strict=True):
        for cpu, gpu in zip(cpu_layer.mappings, gpu_layer.mappings, strict=True):
            assert gpu.error_before == pytest.approx(cpu.error_before, rel=1e-2)
            assert gpu.error_after == pytest.approx(cpu.error_after, rel=5e-2)
        assert gpu_layer.smoothing_error < 1e-4


def test_a_second_run_on_the_gpu_writes_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_checkpoint("llama", tmp_path / "model", torch.bfloat16)
    for name in ("once", "twice"):
        run(model, tmp_path / name, "cuda")
    files = sorted({entry.file.name for entry in read_index(tmp_path / "once").entries.values()})
    for file in files:
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()
        assert all(torch.isfinite(t.float()).all() for t in load_file(tmp_path / "once" / file).values())


def test_the_gram_matrix_of_bfloat16_activations_loses_nothing_to_tf32() -> None:
    rows = torch.randn(512, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    statistics = Moments(96, 512, torch.device("cuda"))
    statistics.add(rows.cuda())
    expected = rows.double().T @ rows.double()
    assert torch.allclose(statistics.gram().cpu().double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("level", ["disk", "nvme"])
def test_offloaded_activations_come_back_through_page_locked_memory_as_they_were(level: str, tmp_path: Path) -> None:
    model = tiny_checkpoint("llama", tmp_path / "model")
    run(model, tmp_path / "kept", "cuda")
    settings = RunSettings(
        model, tmp_path / level, device="cuda", num_samples=8, sequence_length=32, chunk_tokens=64, offload=level
    )
    quantize(load_recipe(RECIPE), settings, [tiny_text()])
    for file in (tmp_path / "kept").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / level / file.name).read_bytes()


def test_a_layer_that_has_no_room_on_the_gpu_is_written_in_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_checkpoint("deepseek-v3", tmp_path / "model", torch.bfloat16)
    run(model, tmp_path / "whole", "cuda")
    settings = RunSettings(
        model, tmp_path / "offloaded", device="cuda", num_samples=8, sequence_length=32, chunk_tokens=64
    )
    layer = estimate(prepare(load_recipe(RECIPE), settings)).layers[1]
    settings = replace(settings, gpu_memory=layer.device_bytes * 17 // 20)
    assert estimate(prepare(load_recipe(RECIPE), settings)).layers[1].on_host.experts
    quantize(load_recipe(RECIPE), settings, [tiny_text()])
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "offloaded" / file.name).read_bytes()
