"""However a model is stored, quantizing it gives the bytes that its twin in plain safetensors gives."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import awqdist, model_files
from conftest import Tiny
from safetensors.torch import load_file, save_file
from source_kinds import FP8_KINDS, fp8_pair, is_linear, pickled, set_config, sharded
from tiny_models import GROUP_SIZE, tiny_checkpoint, tiny_text
from torch import Tensor

from awqdist.checkpoint.dequantize import dequantize
from awqdist.checkpoint.reader import read_tensor, read_tensors
from awqdist.checkpoint.source import read_source

RECIPE = f"""
default_stage:
  default_modifiers:
    AWQModifier: {{n_grid: 3}}
    GPTQModifier:
      ignore: [lm_head, "re:.*down_proj$"]
      config_groups:
        group_0:
          targets: [Linear]
          weights: {{num_bits: 4, type: int, symmetric: false, strategy: group, group_size: {GROUP_SIZE}}}
"""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# widths that blocks of 128 do not divide
SHAPE: dict[str, Any] = {"hidden_size": 160, "intermediate_size": 288, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("qwen3", tmp_path_factory.mktemp("qwen3") / "model", torch.bfloat16, **SHAPE)


def options(folder: Path) -> tuple[object, ...]:
    (folder / "text.txt").write_text(tiny_text(80))
    (folder / "recipe.yaml").write_text(RECIPE)
    given = {
        "--recipe": folder / "recipe.yaml",
        "--calibration": folder / "text.txt",
        "--num-samples": 4,
        "--seq-len": 16,
        "--chunk-tokens": 32,
        "--device": "cpu",
        "--progress": "json",
    }
    return tuple(part for pair in given.items() for part in pair)


def quantized(model: Path, output: Path) -> dict[str, bytes]:
    outcome = awqdist("quantize", model, output, *options(output.parent))
    assert outcome.code == 0, outcome.stderr
    return model_files(output)


def assert_twins(source: Path, twin: Path, tmp_path: Path) -> None:
    """The files of both outputs are equal, and the source's is verified against either."""
    found, expected = quantized(source, tmp_path / "output"), quantized(twin, tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    for original in (source, twin):
        checked = awqdist("verify", tmp_path / "output", "--source", original)
        assert checked.code == 0, checked.stdout


# FP8


@pytest.fixture(params=FP8_KINDS)
def pair(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A source in FP8, and its twin."""
    return fp8_pair(model, tmp_path, **FP8_KINDS[request.param])


def test_an_fp8_source_gives_the_bytes_of_its_twin(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert_twins(*pair, tmp_path)
    tensors = {
        name: tensor for file in (tmp_path / "output").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert tensors["model.layers.1.mlp.down_proj.weight"].dtype == torch.bfloat16  # which the recipe leaves out
    assert not [name for name in tensors if "scale_inv" in name or name.endswith("input_scale")]
    assert FP8_KINDS["blocks"]["config"] not in json.loads((tmp_path / "output" / "config.json").read_text()).values()


def test_every_tensor_of_an_fp8_source_is_its_twins(pair: tuple[Path, Path]) -> None:
    source, twin = (read_source(folder) for folder in pair)
    assert source.entries.keys() == twin.entries.keys()
    for name, entry in source.entries.items():
        assert (entry.dtype, entry.shape) == (twin.entries[name].dtype, twin.entries[name].shape)
        assert entry.num_bytes == twin.entries[name].num_bytes
        assert torch.equal(read_tensor(entry), read_tensor(twin.entries[name])), name
