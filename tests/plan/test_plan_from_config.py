"""`plan` of a model of which only config.json is there: the tensors that it promises, and what a run of it would take."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import awqdist
from support.source_kinds import FP8_KINDS, fp8_pair, mxfp4_pair, set_config
from support.tiny_llama import NUM_LAYERS, Tiny
from support.tiny_models import families, moe_families, tiny_checkpoint

from awqdist.checkpoint.sources import read_source
from awqdist.model.skeleton import read_config
from awqdist.plan.config import index_of_config

MODELS = Path(__file__).parents[2] / "configs" / "models"
TYPICAL = ("llama", "gemma3-vision", "gpt-neox", "phi3", "mixtral", "deepseek-v3", "minimax-m2", "afmoe")


SHAPE: dict[str, Any] = {"hidden_size": 160, "intermediate_size": 288, "num_hidden_layers": 2}  # cut off blocks of 128


def promised(config: Path) -> dict[str, tuple[Any, ...]]:
    """Name -> dtype, shape, bytes in memory and on disk, as config.json alone tells them."""
    entries = index_of_config(config, read_config(config)).entries
    return {name: (e.dtype, e.shape, e.num_bytes, e.stored_bytes) for name, e in entries.items()}


def stored(folder: Path) -> dict[str, tuple[Any, ...]]:
    entries = read_source(folder).entries
    return {name: (e.dtype, e.shape, e.num_bytes, e.stored_bytes) for name, e in entries.items()}


def planned(*arguments: object) -> dict[str, Any]:
    outcome = awqdist("plan", *arguments, "--num-samples", 8, "--seq-len", 32, "--json")
    assert outcome.code == 0, outcome.stderr
    result: dict[str, Any] = json.loads(outcome.stdout)
    return result


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in TYPICAL else pytest.mark.slow) for name in families() + moe_families()],
)
def test_a_configuration_promises_the_tensors_that_its_checkpoint_holds(family: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(family, tmp_path)
    set_config(
        folder, num_nextn_predict_layers=0
    )  # transformers drops such layers, but not what says that they are there
    told = {
        name: entry for name, entry in stored(folder).items() if not name.startswith("mtp.")
    }  # Qwen3-Next's are not told of
    assert promised(folder / "config.json") == told


def test_experts_in_mxfp4_are_promised_with_their_scales(tmp_path: Path) -> None:
    source, _ = mxfp4_pair(tiny_checkpoint("gpt-oss", tmp_path / "model", torch.bfloat16), tmp_path)
    assert promised(source / "config.json") == stored(source)


def test_a_layer_for_multi_token_prediction_is_promised_as_it_is_published(tmp_path: Path) -> None:
    folder = tiny_checkpoint("deepseek-v3", tmp_path)
    set_config(folder, num_nextn_predict_layers=1)
    entries = promised(folder / "config.json")
    extra = {name.removeprefix("model.layers.3."): entries[name][1] for name in entries.keys() - stored(folder).keys()}
    beside = {name: extra.pop(name) for name in list(extra) if f"model.layers.2.{name}" not in entries}
    assert beside == {
        "eh_proj.weight": (64, 128),
        "enorm.weight": (64,),
        "hnorm.weight": (64,),
        "embed_tokens.weight": (160, 64),
        "shared_head.norm.weight": (64,),
        "shared_head.head.weight": (160, 64),
    }
    assert extra == {n.removeprefix("model.layers.2."): e[1] for n, e in entries.items() if ".layers.2." in n}


@pytest.mark.parametrize("kind", ["blocks", "small-blocks", "channel"])
def test_linears_in_fp8_are_promised_with_their_scales(kind: str, tmp_path: Path) -> None:
    source, _ = fp8_pair(
        tiny_checkpoint("qwen3", tmp_path / "model", torch.bfloat16, **SHAPE), tmp_path, **FP8_KINDS[kind]
    )
    assert promised(source / "config.json") == stored(source)


def test_modules_that_fp8_leaves_out_are_promised_in_the_dtype_of_the_model(tmp_path: Path) -> None:
    source, _ = fp8_pair(
        tiny_checkpoint("qwen3", tmp_path / "model", torch.bfloat16, **SHAPE), tmp_path, **FP8_KINDS["blocks"]
    )
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["model.layers.0.self_attn", "down_proj"]
    (source / "config.json").write_text(json.dumps(config))
    for name, (dtype, _, in_memory, on_disk) in promised(source / "config.json").items():
        plain = ".0.self_attn." in name or "down_proj" in name or not name.endswith("proj.weight")
        assert dtype == "BF16"
        assert (in_memory == on_disk) == plain


def test_a_plan_of_the_configuration_alone_is_that_of_the_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copy(tiny.model / "config.json", tmp_path)
    shutil.copy(tiny.model / "config.json", tmp_path / "named otherwise.json")
    expected = planned(tiny.model, "--recipe", tiny.recipe)
    for place in (tmp_path, tmp_path / "config.json", tmp_path / "named otherwise.json"):
        assert planned(place, "--recipe", tiny.recipe) == expected
    mappings = [awqdist("mappings", place, "--recipe", tiny.recipe).stdout for place in (tiny.model, tmp_path)]
    assert mappings[0] == mappings[1] != ""


def test_of_a_hub_id_only_the_configuration_is_fetched(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(tiny.model / "config.json", tmp_path)
    fetched = []

    def download(model: str, name: str) -> str:
        fetched.append((model, name))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    assert planned("some/model", "--recipe", tiny.recipe)["architecture"] == "LlamaForCausalLM"
    assert fetched == [("some/model", "config.json")]


def test_a_configuration_alone_is_not_quantized_and_a_broken_one_not_planned(tiny: Tiny, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    shutil.copy(tiny.model / "config.json", config)
    for model in (tmp_path, config):
        line = awqdist("quantize", model, tmp_path / "output", *tiny.options()).error_line()
        assert "holds neither model.safetensors nor" in line or "is a file; give the folder of a model" in line
    config.write_text("{")
    assert str(config) in awqdist("plan", config).error_line()
    config.write_text('{"model_type": "unheard of"}')
    assert "transformers cannot read it" in awqdist("plan", config).error_line()
    fields = json.loads((tiny.model / "config.json").read_text())
    config.write_text(json.dumps({**fields, "quantization_config": {"quant_method": "gptq"}}))
    assert "is already quantized, with gptq" in awqdist("plan", config).error_line()
    assert "is a file; give the folder of a model, or a config.json" in awqdist("plan", tiny.text).error_line()


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-3.1-405b", 405.85), ("qwen3-235b-a22b", 235.09)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("deepseek-v3", 684.49), ("kimi-k2", 1026.41))],
)
def test_published_configurations_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    """DeepSeek-V3: 671 billion, and 14 of its layer for multi-token prediction."""
    shapes = [shape for _, shape, _, _ in promised(MODELS / f"{name}.json").values()]
    assert sum(map(prod, shapes)) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.slow
def test_a_plan_of_deepseek_v3_takes_less_than_ten_seconds_and_two_gigabytes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "awqdist", "plan", str(MODELS / "deepseek-v3.json"), "--workers", "32", "--json"]
    with (tmp_path / "plan.json").open("w") as stream:
        child = subprocess.Popen(command, stdout=stream)
        started = time.monotonic()
        _, status, usage = os.wait4(child.pid, 0)
    assert status == 0
    assert usage.ru_utime + usage.ru_stime < 10, time.monotonic() - started
    assert usage.ru_maxrss < 2_000_000
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert len(plan["layers"][60]["quantized"]) == 256 * 3 + 3 + 5
    assert plan["estimate"]["read_bytes"] == pytest.approx(
        692.2e9, rel=0.001
    )  # a byte per weight; embeddings and lm_head twice


def test_layers_dealt_to_workers_are_read_and_written_by_them(tiny: Tiny) -> None:
    plan = planned(tiny.model, "--recipe", tiny.recipe, "--workers", 3, "--offload", "disk")
    layers, workers = plan["estimate"]["layers"], plan["workers"]
    chunks = 8 * 32 * 64 * 2
    for worker in workers:
        own = [layers[number] for number in worker["layers"]]
        moved = 2 * chunks * len(own)
        assert worker["disk_bytes"] == sum(layer["read_bytes"] + layer["written_bytes"] for layer in own) + moved
        assert worker["offloaded_bytes"] == chunks
        assert worker["device_bytes"] == 0 < worker["host_bytes"]
    assert sum(worker["sent_bytes"] for worker in workers) == chunks * (NUM_LAYERS - 1)
    assert {place["level"] for place in plan["placement"]} == {"host", "disk"}
    on_gpu = planned(tiny.model, "--recipe", tiny.recipe, "--device", "cuda")
    assert on_gpu["placement"][0]["level"] == "gpu"
    assert on_gpu["workers"][0]["device_bytes"] == on_gpu["estimate"]["peak_device_bytes"] > 0
