"""`verify` finds what is wrong with an output, and nothing wrong with a good one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import awqdist
from support.tiny_llama import NUM_LAYERS, RECIPE, Tiny
from torch import Tensor

from awqdist.errors import OutputError
from awqdist.run.verify import fit_error, verify

NUM_LINEARS = 7 * NUM_LAYERS


@pytest.fixture
def output(undisturbed: Path, tmp_path: Path) -> Path:
    shutil.copytree(undisturbed, tmp_path / "output")
    return tmp_path / "output"


def test_a_good_output_is_ok(undisturbed: Path) -> None:
    result = verify(undisturbed)
    assert result.ok
    assert result.num_files == NUM_LAYERS + 1
    assert len(result.linears) == NUM_LINEARS
    assert all(linear.weight_error is None for linear in result.linears)


def test_every_linear_is_near_its_source(tiny: Tiny, undisturbed: Path) -> None:
    result = verify(undisturbed, tiny.model)
    assert result.ok
    assert all(linear.weight_error is not None and 0.02 < linear.weight_error < 0.25 for linear in result.linears)


@pytest.mark.parametrize(
    ("scheme", "highest"),
    [("num_bits: 8", 0.02), ("num_bits: 4, symmetric: true", 0.25), ("num_bits: 4, symmetric: false", 0.25)],
)
def test_the_error_against_the_source_falls_with_more_bits(
    tiny: Tiny, tmp_path: Path, scheme: str, highest: float
) -> None:
    text = RECIPE.replace("num_bits: 4", scheme).replace("type: int, symmetric: false", "type: int")
    if "symmetric" not in scheme:
        text = text.replace("num_bits: 8", "num_bits: 8, symmetric: true")
    (tmp_path / "recipe.yaml").write_text(text)
    options = tiny.options("--recipe", tmp_path / "recipe.yaml")
    assert awqdist("quantize", tiny.model, tmp_path / "output", *options).code == 0
    result = verify(tmp_path / "output", tiny.model)
    assert result.ok
    assert max(linear.weight_error or 0.0 for linear in result.linears) < highest


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


@pytest.mark.parametrize("name", ["model-layer-00002.safetensors", "model-outside.safetensors"])
@pytest.mark.parametrize("position", [3, 20, -1, 5000])
def test_one_flipped_bit_is_found(output: Path, name: str, position: int) -> None:
    data = (output / name).read_bytes()
    (output / name).write_bytes(flip(data, position % len(data)))
    result = verify(output)
    assert not result.ok
    assert f"{name} differs from the file that the log records" in result.problems


@pytest.mark.parametrize("name", ["model-layer-00002.safetensors", "model-outside.safetensors", "config.json"])
def test_a_missing_file_is_found(output: Path, name: str) -> None:
    (output / name).unlink()
    result = verify(output)
    assert not result.ok
    assert any(name in problem for problem in result.problems)


def test_a_truncated_file_is_found(output: Path) -> None:
    file = output / "model-layer-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert any(file.name in problem for problem in verify(output).problems)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_a_broken_config_is_found(output: Path, text: str) -> None:
    (output / "config.json").write_text(text)
    assert any("config.json" in problem for problem in verify(output).problems)


def test_a_quantized_linear_that_config_calls_ignored_is_found(output: Path) -> None:
    config = json.loads((output / "config.json").read_text())
    config["quantization_config"]["ignore"].append("model.layers.1.mlp.up_proj")
    (output / "config.json").write_text(json.dumps(config))
    assert any("model.layers.1.mlp.up_proj" in problem for problem in verify(output).problems)


def test_an_index_that_names_a_foreign_file_is_found(output: Path) -> None:
    save_file({"extra": torch.zeros(1)}, output / "extra.safetensors")
    index = json.loads((output / "model.safetensors.index.json").read_text())
    index["weight_map"]["extra"] = "extra.safetensors"
    (output / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "extra.safetensors is in the index but not in the log" in verify(output).problems


def test_an_index_that_lacks_a_tensor_is_found(output: Path) -> None:
    index = json.loads((output / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.0.mlp.up_proj.weight_scale"]
    (output / "model.safetensors.index.json").write_text(json.dumps(index))
    problems = {linear.name: linear.problem for linear in verify(output).linears}
    assert "weight_scale" in (problems["model.layers.0.mlp.up_proj"] or "")


def test_a_lost_tensor_that_is_not_quantized_is_found(output: Path) -> None:
    index = json.loads((output / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (output / "model.safetensors.index.json").write_text(json.dumps(index))
    assert any("model.norm.weight" in problem for problem in verify(output).problems)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda scale: scale.view(-1)[:1].fill_(float("nan")), "not finite"),
        (lambda scale: scale.view(-1)[:1].fill_(0), "zeros"),
    ],
)
def test_scales_that_cannot_be_are_found(output: Path, spoil: Callable[[Tensor], object], words: str) -> None:
    file = output / "model-layer-00001.safetensors"
    tensors = load_file(file)
    spoil(tensors["model.layers.1.mlp.up_proj.weight_scale"])
    save_file(tensors, file, {"format": "pt"})
    problems = {linear.name: linear.problem for linear in verify(output).linears}
    assert words in (problems["model.layers.1.mlp.up_proj"] or "")


def test_a_source_with_other_weights_is_found(tiny: Tiny, undisturbed: Path, copied: Callable[..., Path]) -> None:
    def retrain(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = torch.randn_like(tensors[name])

    result = verify(undisturbed, copied(retrain))
    wrong = [linear.name for linear in result.linears if linear.problem]
    assert wrong == ["model.layers.1.mlp.up_proj"]


def test_a_source_with_other_shapes_or_names_is_found(undisturbed: Path, copied: Callable[..., Path]) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(7, 64)
        del tensors["model.layers.2.mlp.up_proj.weight"]

    problems = {linear.name: linear.problem or "" for linear in verify(undisturbed, copied(change)).linears}
    assert "shape (7, 64)" in problems["model.layers.0.mlp.up_proj"]
    assert "no such weight" in problems["model.layers.2.mlp.up_proj"]


def test_an_unfinished_output_and_a_foreign_folder_are_refused(tiny: Tiny, output: Path, tmp_path: Path) -> None:
    (output / "model.safetensors.index.json").unlink()
    with pytest.raises(OutputError, match="not finished"):
        verify(output)
    with pytest.raises(OutputError, match="not an output of awqdist"):
        verify(tiny.model)
    for folder in (output, tiny.model, tmp_path / "nowhere"):
        awqdist("verify", folder).error_line()


def test_the_exit_status_tells_whether_the_output_is_good(tiny: Tiny, output: Path) -> None:
    good = awqdist("verify", output, "--source", tiny.model)
    assert good.code == 0
    assert "ok: 5 files, 28 quantized linears" in good.stdout
    assert json.loads(awqdist("verify", output, "--json").stdout)["ok"]
    (output / "model-layer-00000.safetensors").unlink()
    bad = awqdist("verify", output)
    assert bad.code == 1
    assert "model-layer-00000.safetensors is missing" in bad.stdout
    told = awqdist("verify", output, "--json")
    assert told.code == 1
    assert not json.loads(told.stdout)["ok"]


def test_the_fit_forgives_factors_of_rows_and_columns_and_nothing_else() -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    factors = torch.linspace(0.1, 3, 48).unsqueeze(1) * torch.linspace(2, 0.2, 64)
    assert fit_error(weight * factors, weight) < 1e-3
    assert fit_error(weight.roll(1, 0), weight) > 0.5
    assert fit_error(weight + 0.1 * weight.roll(1, 0), weight) == pytest.approx(0.1, rel=0.2)
    assert fit_error(torch.zeros(4, 4), torch.zeros(4, 4)) == 0
