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
from safetensors.torch import load_file, save_file
from support.command_line import awqdist, model_files
from support.source_kinds import FP8_KINDS, dense_deepseek, fp8_pair, is_linear, pickled, set_config, sharded
from support.tiny_models import GROUP_SIZE, tiny_checkpoint, tiny_text
from torch import Tensor

from awqdist.checkpoint.reader import read_tensor, read_tensors
from awqdist.checkpoint.sources import dequantize_fp8, read_source
from awqdist.run.events import bytes_read, log_file, read_log

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


def test_the_weights_are_those_that_transformers_dequantizes(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    model = tiny_checkpoint("qwen3", tmp_path / "model", torch.bfloat16, hidden_size=128, intermediate_size=256)
    source, _ = fp8_pair(model, tmp_path, **FP8_KINDS["small-blocks"])  # transformers takes no blocks that are cut off
    how = FineGrainedFP8Config(weight_block_size=(32, 64), dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=how).state_dict()
    entries = read_source(source).entries
    assert any(entry.packing for entry in entries.values())
    for name, entry in entries.items():
        assert torch.equal(read_tensor(entry), loaded[name]), name


@pytest.mark.parametrize("kind", ["compressed-channel", "compressed-tensor", "compressed-block"])
def test_the_weights_are_those_that_compressed_tensors_dequantizes(model: Path, tmp_path: Path, kind: str) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize as peer

    source, _ = fp8_pair(model, tmp_path, **FP8_KINDS[kind])
    args = QuantizationArgs(**FP8_KINDS[kind]["config"]["config_groups"]["group_0"]["weights"])
    stored = load_file(source / "model.safetensors")
    for name, entry in read_source(source).entries.items():
        if entry.packing:
            found = peer(stored[name], stored[f"{name}_scale"], args=args).bfloat16()
            assert torch.equal(read_tensor(entry), found), name


@pytest.mark.parametrize("shape", [(3, 5), (130, 257), (2, 70, 90), (0, 4)])
def test_dequantizing_goes_by_blocks_whatever_the_shape(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    *leading, rows, columns = shape
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(*leading, -(-rows // 32), -(-columns // 64), generator=generator)
    found = dequantize_fp8(weight, scale, (32, 64), torch.bfloat16)
    assert found.dtype == torch.bfloat16
    wide = scale.repeat_interleave(32, -2).repeat_interleave(64, -1)[..., :rows, :columns]
    assert torch.equal(found, (weight.float() * wide).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_value_of_8_bits_is_widened_exactly(dtype: torch.dtype) -> None:
    weight = torch.arange(256, dtype=torch.uint8).view(dtype).reshape(4, 64)
    found = dequantize_fp8(weight, torch.ones(1), (4, 64), torch.float32)
    assert torch.equal(found.nan_to_num(1e6), weight.float().nan_to_num(1e6))
    assert torch.equal(found.signbit()[~found.isnan()], weight.float().signbit()[~found.isnan()])


def respoiled(source: Path, spoil: Callable[[dict[str, Tensor]], object]) -> Path:
    """The source after a change of its stored tensors."""
    tensors = load_file(source / "model.safetensors")
    spoil(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


NAME = "model.layers.1.self_attn.q_proj.weight"


def refusal(source: Path, tmp_path: Path) -> str:
    return awqdist("quantize", source, tmp_path / "output", *options(tmp_path)).error_line()


@pytest.mark.parametrize("what", ["weight", "scale"])
def test_values_that_are_not_finite_are_found_under_the_weights_name(model: Path, tmp_path: Path, what: str) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        if what == "scale":
            tensors[f"{NAME}_scale_inv"][0, 0] = float("inf")
        else:
            tensors[NAME].view(torch.uint8)[3, 4] = 0x7F  # NaN in e4m3

    source = respoiled(fp8_pair(model, tmp_path, **FP8_KINDS["blocks"])[0], spoil)
    line = refusal(source, tmp_path)
    assert f"layer 1: tensor {NAME} holds" in line
    assert "NaN or infinite" in line


@pytest.mark.parametrize("suffix", ["", "_scale_inv"])
def test_other_values_or_scales_are_another_source(model: Path, tmp_path: Path, suffix: str) -> None:
    source = fp8_pair(model, tmp_path, **FP8_KINDS["blocks"])[0]
    before = read_tensors([read_source(source).entries[NAME]]).crc32

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[NAME + suffix].view(torch.uint8)[0, 0] ^= 1

    assert read_tensors([read_source(respoiled(source, spoil)).entries[NAME]]).crc32 != before


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.pop(f"{NAME}_scale_inv"), f"FP8 tensor {NAME} has no {NAME}_scale_inv"),
        (lambda t: t.update({f"{NAME}_scale_inv": torch.ones(7, 3)}), "has shape (7, 3), which does not fit"),
        (lambda t: t.update({NAME: t[NAME].bfloat16()}), f"{NAME}_scale_inv scales no FP8 tensor"),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    model: Path, tmp_path: Path, spoil: Callable[[dict[str, Tensor]], object], words: str
) -> None:
    source = respoiled(fp8_pair(model, tmp_path, **FP8_KINDS["blocks"])[0], spoil)
    assert words in refusal(source, tmp_path)


def test_fp8_weights_of_which_the_config_says_nothing_are_refused(model: Path, tmp_path: Path) -> None:
    source = fp8_pair(model, tmp_path, **FP8_KINDS["blocks"])[0]
    set_config(source, quantization_config=None)
    assert "config.json has no quantization_config" in refusal(source, tmp_path)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors pack-quantized"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors float-quantized"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "fp8"),
        ({"bits": 4}, "an unknown method"),
        ("fp8", "an unknown method"),
    ],
)
def test_other_quantized_sources_are_refused(model: Path, tmp_path: Path, config: object, named: str) -> None:
    source = shutil.copytree(model, tmp_path / "source")
    set_config(source, quantization_config=config)
    line = refusal(source, tmp_path)
    assert f"already quantized, with {named} (" in line
    assert "only those with FP8 weights, and gpt-oss with experts in MXFP4, can be read; give the original" in line


# torch's pickles, and the dtypes


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_shards_and_pickles_give_the_bytes_of_one_file(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_checkpoint("llama-mha", tmp_path / "model", dtype)
    expected = quantized(model, tmp_path / "expected")
    assert quantized(sharded(model, tmp_path / "shards"), tmp_path / "of shards") == expected
    assert quantized(pickled(model, tmp_path / "pickle"), tmp_path / "of pickle") == expected
    assert quantized(pickled(model, tmp_path / "pickles", num_shards=3), tmp_path / "of pickles") == expected
    checked = awqdist("verify", tmp_path / "of pickles", "--source", tmp_path / "pickle")
    assert checked.code == 0, checked.stdout


def test_a_pickle_names_tied_weights_twice_and_they_are_written_once(tmp_path: Path) -> None:
    model = tiny_checkpoint("gemma2", tmp_path / "model", torch.bfloat16)
    source = pickled(
        model, tmp_path / "pickle", change=lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"]}
    )
    assert "lm_head.weight" in read_source(source).entries
    assert quantized(source, tmp_path / "output") == quantized(model, tmp_path / "expected")


def test_an_fp8_source_may_be_pickled(model: Path, tmp_path: Path) -> None:
    source, twin = fp8_pair(model, tmp_path, **FP8_KINDS["blocks"])
    assert_twins(pickled(source, tmp_path / "pickles", num_shards=2), twin, tmp_path)


def test_pickled_tensors_may_lie_in_any_order_and_share_memory(model: Path, tmp_path: Path) -> None:
    def turn(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        wide = torch.stack([tensors["model.norm.weight"]] * 3, 1)
        turned = {n: t.T.contiguous().T if t.ndim == 2 else t for n, t in tensors.items()}
        return {**turned, "model.norm.weight": wide[:, 1], "empty": torch.empty(0, 3), "scalar": torch.tensor(3.0)}

    source = pickled(model, tmp_path / "pickle", change=turn)
    entries, plain = read_source(source).entries, load_file(model / "model.safetensors")
    assert entries.keys() == plain.keys() | {"empty", "scalar"}
    for name, tensor in plain.items():
        assert torch.equal(read_tensor(entries[name]), tensor), name
    assert read_tensor(entries["scalar"]).item() == 3
    assert read_tensor(entries["empty"]).shape == (0, 3)


@pytest.mark.parametrize("num_bytes", [0, 4, 1000, 50_000, -1])
def test_a_truncated_pickle_is_refused(model: Path, tmp_path: Path, num_bytes: int) -> None:
    source = pickled(model, tmp_path / "pickle", num_shards=2)
    file = source / "pytorch_model-00002-of-00002.bin"
    file.write_bytes(file.read_bytes()[:num_bytes])
    assert file.name in refusal(source, tmp_path)


class Malice:
    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.file,)


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(model: Path, tmp_path: Path, old: bool) -> None:
    source = pickled(model, tmp_path / "pickle", change=lambda t: {**t, "model.norm.weight": Malice(tmp_path / "harm")})
    if old:
        (source / "pytorch_model.bin").write_bytes(pickle.dumps(Malice(tmp_path / "harm")))
    line = refusal(source, tmp_path)
    assert "pytorch_model.bin" in line
    assert "convert it to safetensors" in line
    assert old or "posix.mkdir" in line
    assert "weights_only` set to `False`" not in line  # torch's own advice
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: list(t.values()), "holds a list instead of tensors by their names"),
        (lambda t: {"state_dict": t}, "'state_dict' is a dict, not a tensor"),
        (lambda t: {**t, "step": 3}, "'step' is a int, not a tensor"),
        (lambda t: {**t, "odd": torch.ones(3, dtype=torch.complex64)}, "odd has dtype torch.complex64"),
        (lambda t: {**t, "odd": torch.eye(3).to_sparse()}, "'odd' is a"),
        (lambda t: {**t, "odd": torch.ones(1).expand(1 << 40)}, "odd reaches beyond its storage"),
    ],
)
def test_a_pickle_of_something_else_is_refused(
    model: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], words: str
) -> None:
    assert words in refusal(pickled(model, tmp_path / "pickle", change=change), tmp_path)


@pytest.mark.parametrize(
    ("method", "order", "words"),
    [
        (zipfile.ZIP_DEFLATED, b"little", "its records are compressed"),
        (zipfile.ZIP_STORED, b"big", "another byte order"),
    ],
)
def test_a_pickle_that_cannot_be_read_by_byte_range_is_refused(
    model: Path, tmp_path: Path, method: int, order: bytes, words: str
) -> None:
    file = pickled(model, tmp_path / "pickle") / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in records.items():
            archive.writestr(name, order if name.endswith("/byteorder") else data)
    assert words in refusal(file.parent, tmp_path)


def test_a_missing_pickle_is_refused(model: Path, tmp_path: Path) -> None:
    source = pickled(model, tmp_path / "pickle", num_shards=2)
    (source / "pytorch_model-00001-of-00002.bin").unlink()
    assert "shard not found" in refusal(source, tmp_path)


def test_safetensors_are_preferred_to_pickles(model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(model, tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(b"nothing")
    assert read_source(source).entries.keys() == read_source(model).entries.keys()


# Tensors that transformers' model does not have


@pytest.mark.parametrize("kind", ["plain", "blocks"])
def test_tensors_beyond_the_model_pass_through_and_are_listed(model: Path, tmp_path: Path, kind: str) -> None:
    """As DeepSeek-V3 has them: a layer more than config.json counts, for the prediction of several tokens."""
    tensors = load_file(model / "model.safetensors")
    last = {n.replace("layers.1", "layers.2"): t.clone() for n, t in tensors.items() if ".layers.1." in n}
    beyond = {
        **last,
        "model.layers.2.eh_proj.weight": torch.randn(160, 320).bfloat16(),
        "model.layers.2.enorm.weight": torch.randn(160).bfloat16(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(16),
        "vision_tower.patch_conv.weight": torch.randn(8, 3, 4, 4).bfloat16(),
        "vision_tower.proj.weight": torch.randn(160, 24).bfloat16(),
    }
    whole = shutil.copytree(model, tmp_path / "whole")
    save_file({**tensors, **beyond}, whole / "model.safetensors", {"format": "pt"})
    source, twin = (whole, whole) if kind == "plain" else fp8_pair(whole, tmp_path, **FP8_KINDS[kind])
    assert_twins(source, twin, tmp_path)
    output = load_file(tmp_path / "output" / "model-outside.safetensors")
    plain = load_file(twin / "model.safetensors")
    for name in beyond:
        assert output[name].dtype == plain[name].dtype
        assert torch.equal(output[name], plain[name]), name
    linears = {n.removesuffix(".weight") for n, t in beyond.items() if is_linear(n, t)}
    assert {"model.layers.2.eh_proj", "vision_tower.proj", "model.layers.2.mlp.up_proj"} <= linears
    ignored = json.loads((tmp_path / "output" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {name for name in ignored if "layers.2" in name or "vision" in name} == linears
    page = (tmp_path / "output" / "report.html").read_text()
    how = "were copied unchanged" if kind == "plain" else f"were copied, {len(linears)} of them dequantized"
    assert f"{len(beyond)} tensors that the model does not have {how}: " in page


def test_a_deepseek_v3_in_fp8_with_its_prediction_layer_gives_the_bytes_of_its_twin(tmp_path: Path) -> None:
    """Of the mixtures' experts there are some in the prediction layer only, which no layer of transformers' model takes."""
    model = dense_deepseek(tmp_path / "model", **SHAPE)
    tensors = load_file(model / "model.safetensors")
    beyond = {n.replace("layers.1", "layers.2"): t.clone() for n, t in tensors.items() if ".layers.1." in n}
    beyond = {n: t for n, t in beyond.items() if ".mlp." not in n}
    for kind, shape in (("gate", (64, 160)), ("up", (64, 160)), ("down", (160, 64))):
        beyond |= {f"model.layers.2.mlp.experts.{e}.{kind}_proj.weight": torch.randn(shape).bfloat16() for e in (0, 1)}
    beyond["model.layers.2.mlp.gate.weight"] = torch.randn(2, 160).bfloat16()
    beyond["model.layers.2.eh_proj.weight"] = torch.randn(160, 320).bfloat16()
    beyond["model.layers.2.shared_head.norm.weight"] = torch.randn(160).bfloat16()
    save_file({**tensors, **beyond}, model / "model.safetensors", {"format": "pt"})
    source, twin = fp8_pair(model, tmp_path, **FP8_KINDS["blocks"])
    assert_twins(source, twin, tmp_path)
    output, plain = load_file(tmp_path / "output" / "model-outside.safetensors"), load_file(twin / "model.safetensors")
    assert all(torch.equal(output[name], plain[name]) for name in beyond)


# What is read


def test_scales_that_are_left_out_are_told(model: Path, tmp_path: Path) -> None:
    source, _ = fp8_pair(model, tmp_path, **FP8_KINDS["tensor"])
    quantized(source, tmp_path / "output")
    page = (tmp_path / "output" / "report.html").read_text()
    assert "14 FP8 weights of the source were dequantized to BF16 as they were read" in page
    assert "14 scales of the source&#39;s activations and caches were left out: model.layers.0." in page


def test_a_run_is_resumed_and_what_both_parts_of_it_read_is_told(model: Path, tmp_path: Path) -> None:
    source, twin = fp8_pair(model, tmp_path, **FP8_KINDS["blocks"])
    expected = quantized(twin, tmp_path / "expected")
    whole = awqdist("quantize", source, tmp_path / "output", *options(tmp_path)).events
    output = tmp_path / "output"
    (output / "model.safetensors.index.json").unlink()
    (output / "model-layer-00001.safetensors").unlink()  # as if it had ended before
    resumed = awqdist("quantize", source, output, *options(tmp_path))
    assert resumed.code == 0, resumed.stderr
    assert model_files(output) == expected
    again = sum(event["num_bytes"] for event in resumed.events if event["event"] == "SourceRead")
    first = sum(event["num_bytes"] for event in whole if event["event"] == "SourceRead")
    assert 0 < again < first
    assert sum(bytes_read(read_log(log_file(output)).messages).values()) == first + again


def test_a_resumed_run_refuses_other_scales(model: Path, tmp_path: Path) -> None:
    source, _ = fp8_pair(model, tmp_path, **FP8_KINDS["blocks"])
    quantized(source, tmp_path / "output")
    (tmp_path / "output" / "model.safetensors.index.json").unlink()
    respoiled(source, lambda tensors: tensors["model.layers.0.self_attn.q_proj.weight_scale_inv"].mul_(1.25))
    line = awqdist("quantize", source, tmp_path / "output", *options(tmp_path)).error_line()
    assert "layer 0" in line
    assert "was made from other weights" in line


def bytes_told(outcome_events: list[dict[str, Any]]) -> dict[tuple[int | None, int | None], list[int]]:
    """(worker, layer) -> bytes of every time that something was read for it."""
    told: dict[tuple[int | None, int | None], list[int]] = {}
    for event in outcome_events:
        if event["event"] == "SourceRead":
            told.setdefault((event["worker"], event["layer"]), []).append(event["num_bytes"])
    return told


@pytest.mark.parametrize("kind", ["blocks", "tensor", "compressed-channel"])
def test_every_byte_is_read_once_by_who_needs_it_and_plan_knows(model: Path, tmp_path: Path, kind: str) -> None:
    source, _ = fp8_pair(model, tmp_path, **FP8_KINDS[kind])
    outcome = awqdist("quantize", source, tmp_path / "output", *options(tmp_path))
    assert outcome.code == 0, outcome.stderr
    told = bytes_told(outcome.events)
    stored = {e.name: e for e in read_source(source).entries.values()}
    layers = [sum(e.stored_bytes for n, e in stored.items() if f".layers.{i}." in n) for i in range(2)]
    outside = sum(e.stored_bytes for n, e in stored.items() if ".layers." not in n)
    embeddings = sum(stored[n].stored_bytes for n in ("model.embed_tokens.weight", "model.norm.weight"))
    head = stored["lm_head.weight"].stored_bytes  # which tells GPTQ what counts
    assert told == {(0, None): [embeddings, head], (0, 0): [layers[0]], (0, 1): [layers[1]], (None, None): [outside]}
    shape = ("--num-samples", 4, "--seq-len", 16, "--chunk-tokens", 32, "--device", "cpu")
    planned = awqdist("plan", source, "--recipe", tmp_path / "recipe.yaml", *shape, "--json")
    estimate = json.loads(planned.stdout)["estimate"]
    assert [layer["read_bytes"] for layer in estimate["layers"]] == layers
    assert estimate["embedding_bytes"] == embeddings + head
    assert estimate["read_bytes"] == sum(sum(sizes) for sizes in told.values())
    written = sum(file.stat().st_size for file in (tmp_path / "output").glob("*.safetensors"))
    assert estimate["written_bytes"] == pytest.approx(written, rel=0.1)  # of headers the plan knows nothing
    page = (tmp_path / "output" / "report.html").read_text()
    assert re.search(r"KiB by worker 0, [0-9.]+ KiB by the leader, to copy what is in no layer", page)
