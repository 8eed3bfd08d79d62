"""Whatever is wrong with the input: one line that says what and what to do, exit status 2, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import Outcome, awqdist, contents, folder_as_it_was, model_files, start
from support.tiny_llama import RECIPE, Tiny
from torch import Tensor

Copied = Callable[..., Path]


def refusal(tiny: Tiny, tmp_path: Path, *options: object, model: object = None, **places: object) -> str:
    """The line with which a run is refused before it writes anything. places: `output`."""
    output = places.get("output", tmp_path / "output")
    line = awqdist("quantize", model or tiny.model, output, *tiny.options(*options)).error_line()
    assert not (tmp_path / "output").exists()
    return line


# The model's folder


def test_a_missing_folder_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    assert "model folder not found" in refusal(tiny, tmp_path, model=tmp_path / "nowhere")


def test_a_file_in_place_of_a_folder_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    assert "is a file" in refusal(tiny, tmp_path, model=tiny.model / "config.json")


def test_a_hub_id_without_the_hub_is_refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refusal(tiny, tmp_path, model="nobody/has-this-model")
    assert "nobody/has-this-model" in line
    assert "download it elsewhere and give its folder" in line


def test_an_empty_folder_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds neither model.safetensors" in refusal(tiny, tmp_path, model=tmp_path / "empty")


def test_weights_in_another_format_are_refused_with_a_way_out(tiny: Tiny, tmp_path: Path, copied: Copied) -> None:
    model = copied()
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    line = refusal(tiny, tmp_path, model=model)
    assert "pytorch_model.bin" in line
    assert "safetensors" in line


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (None, "no config.json"),
        (b"{", "config.json"),
        (b"\x00\xff\xfe", "config.json"),
        (b"", "config.json"),
        (b"[]", "config.json"),
        (b"{}", "config.json"),
        (b'{"model_type": "no-such-type"}', "no-such-type"),
        (b'{"model_type": "llama", "hidden_size": "wide"}', "config.json"),
        (b'{"model_type": "bert"}', "bert"),
        (b'{"model_type": "clip"}', "CLIP"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(
    tiny: Tiny, tmp_path: Path, copied: Copied, config: bytes | None, named: str
) -> None:
    model = copied()
    (model / "config.json").unlink()
    if config is not None:
        (model / "config.json").write_bytes(config)
    assert named.lower() in refusal(tiny, tmp_path, model=model).lower()


def change_config(model: Path, **changes: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def test_an_architecture_that_transformers_does_not_have_is_refused(tiny: Tiny, tmp_path: Path, copied: Copied) -> None:
    model = copied()
    change_config(model, architectures=["NobodysForCausalLM"], model_type="nobodys")
    assert "nobodys" in refusal(tiny, tmp_path, model=model)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 5}, {"num_hidden_layers": 3}, {"hidden_size": 96}])
def test_a_config_that_is_not_of_these_weights_is_refused_or_served(
    tiny: Tiny, tmp_path: Path, copied: Copied, changes: dict[str, int]
) -> None:
    model = copied()
    change_config(model, **changes)
    if changes == {"num_hidden_layers": 3}:  # a model whose last layer nobody asks for; it is copied
        assert awqdist("quantize", model, tmp_path / "output", *tiny.options()).code == 0
        return
    line = refusal(tiny, tmp_path, model=model)
    assert ("lacks the tensor" if "num_hidden_layers" in changes else "shape") in line


def test_a_quantized_source_is_refused(tiny: Tiny, tmp_path: Path, undisturbed: Path) -> None:
    assert "already quantized" in refusal(tiny, tmp_path, model=undisturbed)


def test_a_source_without_tokenizer_is_refused(tiny: Tiny, tmp_path: Path, copied: Copied) -> None:
    model = copied()
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refusal(tiny, tmp_path, model=model)


# Its tensors


def sharded(model: Path) -> Path:
    """Splits the weights into two shards with an index."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, model / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


def test_shards_give_the_same_bytes_as_one_file(tiny: Tiny, tmp_path: Path, undisturbed: Path, copied: Copied) -> None:
    outcome = awqdist("quantize", sharded(copied()), tmp_path / "output", *tiny.options())
    assert outcome.code == 0, outcome.stderr
    layers = {name: data for name, data in model_files(undisturbed).items() if "layer" in name}
    assert {name: model_files(tmp_path / "output")[name] for name in layers} == layers


@pytest.mark.parametrize("num_bytes", [0, 4, 100, 50_000, -1])
def test_a_truncated_shard_is_refused(tiny: Tiny, tmp_path: Path, copied: Copied, num_bytes: int) -> None:
    model = sharded(copied())
    shard = model / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:num_bytes])
    assert shard.name in refusal(tiny, tmp_path, model=model)


def test_a_shard_with_something_behind_its_end_is_refused(tiny: Tiny, tmp_path: Path, copied: Copied) -> None:
    model = copied()
    with (model / "model.safetensors").open("ab") as stream:
        stream.write(b"\0")
    assert "model.safetensors" in refusal(tiny, tmp_path, model=model)


def test_a_missing_shard_is_refused(tiny: Tiny, tmp_path: Path, copied: Copied) -> None:
    model = sharded(copied())
    (model / "model-00002-of-00002.safetensors").unlink()
    line = refusal(tiny, tmp_path, model=model)
    assert "shard not found" in line
    assert "model-00002-of-00002.safetensors" in line


def test_an_index_that_promises_a_missing_tensor_is_refused(tiny: Tiny, tmp_path: Path, copied: Copied) -> None:
    model = sharded(copied())
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.0.extra.weight"] = "model-00001-of-00002.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "promises tensor model.layers.0.extra.weight" in refusal(tiny, tmp_path, model=model)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 5}}'])
def test_a_broken_index_is_refused(tiny: Tiny, tmp_path: Path, copied: Copied, text: str) -> None:
    model = sharded(copied())
    (model / "model.safetensors.index.json").write_text(text)
    assert str(model) in refusal(tiny, tmp_path, model=model)


def test_a_missing_tensor_is_refused_by_its_name(tiny: Tiny, tmp_path: Path, copied: Copied) -> None:
    model = copied(lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    assert "lacks the tensor for model.layers.2.mlp.up_proj.weight" in refusal(tiny, tmp_path, model=model)


def test_a_tensor_of_another_shape_is_refused_by_its_name(tiny: Tiny, tmp_path: Path, copied: Copied) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:64].clone()

    line = refusal(tiny, tmp_path, model=copied(halve))
    assert "model.layers.1.mlp.up_proj.weight has shape (64, 64)" in line
    assert "(128, 64)" in line


def rewrite_header(file: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    """Replaces the header of a safetensors file by `change` of it, or by the bytes that `change` returns."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    encoded = changed if isinstance(changed, bytes) else json.dumps(header if changed is None else changed).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda header: b"\xff\xfe garbage",
        lambda header: b"[1, 2]",
        lambda header: b"{}",
        lambda header: header["model.norm.weight"].pop("dtype") and None,
        lambda header: header["model.norm.weight"].update(data_offsets=[0]),
        lambda header: header["model.norm.weight"].update(data_offsets=[-128, 0]),
        lambda header: header["model.norm.weight"].update(data_offsets="here"),
        lambda header: header["model.norm.weight"].update(shape=None),
        lambda header: header["model.norm.weight"].update(shape=[65]),
        lambda header: header["model.norm.weight"].update(dtype="F32"),
        lambda header: header.update({"model.norm.weight": 5}),
    ],
)
def test_a_damaged_header_is_refused(
    tiny: Tiny, tmp_path: Path, copied: Copied, change: Callable[[dict[str, dict[str, object]]], object]
) -> None:
    model = copied()
    rewrite_header(model / "model.safetensors", change)
    assert "model.safetensors" in refusal(tiny, tmp_path, model=model)


def test_a_header_longer_than_its_file_is_refused(tiny: Tiny, tmp_path: Path, copied: Copied) -> None:
    model = copied()
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + data[8:])
    assert "truncated or not safetensors" in refusal(tiny, tmp_path, model=model)


def test_a_dtype_that_cannot_be_read_is_refused_before_the_first_layer(
    tiny: Tiny, tmp_path: Path, copied: Copied
) -> None:
    model = copied()
    rewrite_header(model / "model.safetensors", lambda header: header["lm_head.weight"].update(dtype="F4"))
    assert "lm_head.weight has dtype F4" in refusal(tiny, tmp_path, model=model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_a_weight_that_is_not_finite_is_refused_by_its_name(
    tiny: Tiny, tmp_path: Path, copied: Copied, name: str, value: float
) -> None:
    model = copied(lambda tensors: tensors[name][3].fill_(value))
    outcome = awqdist("quantize", model, tmp_path / "output", *tiny.options())
    assert outcome.code == 2
    assert len(outcome.stderr.splitlines()) == 1
    assert f"tensor {name} holds 64 values that are NaN or infinite" in outcome.stderr


@pytest.mark.parametrize(
    ("name", "num_kept"),
    [("model.layers.2.input_layernorm.weight", 2), ("model.norm.weight", 0), ("lm_head.weight", 0)],
)
def test_nothing_is_lost_by_a_weight_that_is_not_finite(
    tiny: Tiny, tmp_path: Path, undisturbed: Path, copied: Copied, name: str, num_kept: int
) -> None:
    """The layers before it are kept: with the weight repaired, the same command goes on."""
    model = copied(lambda tensors: tensors[name].view(-1)[0].fill_(float("nan")))
    output = tmp_path / "output"
    outcome = awqdist("quantize", model, output, *tiny.options())
    assert outcome.code == 2
    assert f"tensor {name} holds 1 values" in outcome.stderr
    assert not list(output.glob("*partial"))
    shutil.copyfile(tiny.model / "model.safetensors", model / "model.safetensors")
    again = awqdist("quantize", model, output, *tiny.options())
    assert again.code == 0, again.stderr
    assert again.events[0]["num_finished_layers"] == num_kept
    assert model_files(output) == model_files(undisturbed)


def test_activations_that_overflow_are_refused_with_their_layer(tiny: Tiny, tmp_path: Path, copied: Copied) -> None:
    model = copied(lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38))
    outcome = awqdist("quantize", model, tmp_path / "output", *tiny.options())
    assert outcome.code == 2
    assert len(outcome.stderr.splitlines()) == 1
    assert "layer " in outcome.stderr


def test_a_width_that_the_group_size_does_not_divide_is_refused_with_a_way_out(tiny: Tiny, tmp_path: Path) -> None:
    line = refusal(tiny, tmp_path, "--recipe", "default")  # groups of 128
    assert "linear model.layers.0.self_attn.q_proj has 64 inputs, which group size 128 does not divide" in line
    assert "group_size 64" in line
    assert "ignore" in line


# The calibration


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n\t ", "is empty"),
        ("short.txt", b"the quick brown fox", "is too short"),
        ("binary.txt", b"\x89PNG\r\n\x1a\n\xff\xfe\x00", "cannot read calibration text"),
        ("no-text.jsonl", b'{"content": "words"}\n', 'a "text" field'),
        ("number.jsonl", b'{"text": 5}\n', 'a "text" field'),
        ("list.jsonl", b"[1, 2]\n", 'a "text" field'),
        ("broken.jsonl", b'{"text": "words"\n', 'a "text" field'),
        ("empty.jsonl", b"", "is empty"),
    ],
)
def test_calibration_text_that_cannot_be_used_is_refused(
    tiny: Tiny, tmp_path: Path, name: str, data: bytes, words: str
) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    line = refusal(tiny, tmp_path, "--calibration", file)
    assert str(file) in line
    assert words in line


def test_too_short_a_text_is_refused_with_what_it_has_and_what_is_needed(tiny: Tiny, tmp_path: Path) -> None:
    line = refusal(tiny, tmp_path, "--num-samples", 5000)
    assert "5000 samples of 32 need 155000" in line  # 31 of the text and <s>
    assert "--num-samples" in line


@pytest.mark.parametrize("source", ["nowhere.txt", "./nowhere", "/nowhere/at/all", "a/b/c", "nowhere.jsonl"])
def test_missing_calibration_text_is_refused_without_asking_the_hub(tiny: Tiny, tmp_path: Path, source: str) -> None:
    assert f"calibration text not found: {Path(source)}" in refusal(tiny, tmp_path, "--calibration", source)


def test_a_hub_dataset_without_the_hub_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    line = refusal(tiny, tmp_path, "--calibration", "nobody/has-this-text:main:train")
    assert "nobody/has-this-text:main:train" in line
    assert "give a text file" in line


def test_a_folder_as_calibration_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    assert "is a folder" in refusal(tiny, tmp_path, "--calibration", tiny.model)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny: Tiny, tmp_path: Path, copied: Copied) -> None:
    def shrink(tensors: dict[str, Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:100].clone()

    model = copied(shrink)
    change_config(model, vocab_size=100)
    line = refusal(tiny, tmp_path, model=model)
    assert "the model knows 0 to 99" in line


# The recipe and the options


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (RECIPE.replace("n_grid", "n_gird"), "n_grid"),
        (RECIPE.replace("GPTQModifier", "GPTModifier"), "GPTQModifier"),
        ("default_stage: {", "not valid YAML"),
        ("a:\n\t- b", "line 2"),
        ("", "no modifiers"),
        (RECIPE.replace("ignore: [lm_head]", "ignore: [lm_haed]"), "lm_head"),
        (RECIPE.replace("ignore: [lm_head]", "ignore: ['re:.*nothing']"), "re:.*nothing"),
        (RECIPE.replace("ignore: [lm_head]", "ignore: ['re:.*proj', lm_head]"), "quantizes no linear"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_refused(tiny: Tiny, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert words in refusal(tiny, tmp_path, "--recipe", tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--recipe", "defualt"), "did you mean 'default'"),
        (("--recipe", "nowhere.yaml"), "nowhere.yaml"),
        (("--device", "gpu"), "unknown device 'gpu'"),
        (("--device", "meta"), "not supported"),
        (("--device", "cuda:99"), "not there"),
        (("--num-samples", 0), "--num-samples"),
        (("--num-samples", "many"), "--num-samples"),
        (("--seq-len", 7), "--seq-len"),
        (("--seed", -1), "--seed"),
        (("--chunk-tokens", 0), "--chunk-tokens"),
        (("--snapshot-every", 0), "--snapshot-every"),
        (("--format", "gguf"), "--format"),
        (("--progress", "loud"), "--progress"),
        (("--nonsense", 1), "--nonsense"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(
    tiny: Tiny, tmp_path: Path, options: tuple[object, ...], words: str
) -> None:
    assert words in refusal(tiny, tmp_path, *options)


def test_cuda_is_refused_where_there_is_none(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "device cuda is not there" in refusal(tiny, tmp_path, "--device", "cuda")


def test_autoawq_with_eight_bits_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("num_bits: 4", "num_bits: 8"))
    line = refusal(tiny, tmp_path, "--format", "autoawq", "--recipe", tmp_path / "recipe.yaml")
    assert "8 bit" in line


@pytest.mark.parametrize("arguments", [("quantize",), ("quantize", "model"), ("plan",), ("nonsense",), ("verify",)])
def test_wrong_usage_is_one_line_too(arguments: tuple[str, ...]) -> None:
    awqdist(*arguments).error_line()


# The output


@pytest.mark.parametrize("spelled", [lambda model: model, lambda model: model / ".." / model.name])
def test_the_models_own_folder_as_output_is_refused(
    tiny: Tiny, tmp_path: Path, spelled: Callable[[Path], Path]
) -> None:
    with folder_as_it_was(tiny.model):
        for more in ((), ("--overwrite",)):
            line = awqdist("quantize", tiny.model, spelled(tiny.model), *tiny.options(), *more).error_line()
            assert "the model's own folder" in line


def test_a_link_to_the_models_own_folder_as_output_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny.model)
    with folder_as_it_was(tiny.model):
        assert "own folder" in refusal(tiny, tmp_path, output=tmp_path / "link")


def test_a_file_as_output_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    assert "is a file" in refusal(tiny, tmp_path, output=tmp_path / "file")
    assert "cannot write" in refusal(tiny, tmp_path, output=tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "precious"


def test_somebody_elses_folder_as_output_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("precious")
    with folder_as_it_was(tmp_path / "theirs"):
        assert "not begun by awqdist" in refusal(tiny, tmp_path, output=tmp_path / "theirs")


def test_a_name_that_is_too_long_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    assert "cannot write" in refusal(tiny, tmp_path, output=tmp_path / ("x" * 300))


def as_nobody(tiny: Tiny, tmp_path: Path, output: Path) -> Outcome:
    """A run by a user who may not write everywhere."""
    temporary = Path(tempfile.gettempdir())
    for folder in (tiny.model, tiny.text.parent, tmp_path):
        for parent in [folder, *folder.parents]:
            if parent != temporary and parent.is_relative_to(temporary):
                parent.chmod(0o755)
    streams = tmp_path / "streams"
    streams.mkdir(mode=0o777)
    return start(
        streams, "quantize", tiny.model, output, *tiny.options(), prepare=lambda: os.setresuid(65534, 65534, 65534)
    ).wait()


def readable(tiny: Tiny, model: Path) -> Tiny:
    (model / "model.safetensors").chmod(0o644)
    return Tiny(model, tiny.text, tiny.recipe)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user or mount")
PACKAGE = Path(str(find_spec("awqdist").origin)).resolve()
open_to_all = all(parent.stat().st_mode & 0o005 == 0o005 for parent in PACKAGE.parents)
needs_another_user = pytest.mark.skipif(
    os.geteuid() != 0 or not open_to_all, reason="needs root, and a package that another user may read"
)


@needs_another_user
def test_an_output_that_may_not_be_written_is_refused(tiny: Tiny, tmp_path: Path, copied: Copied) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    outcome = as_nobody(readable(tiny, copied()), tmp_path, tmp_path / "locked" / "output")
    assert "cannot write" in outcome.error_line()
    assert "Permission denied" in outcome.stderr
    assert not any((tmp_path / "locked").iterdir())


@needs_another_user
def test_an_output_that_may_not_be_looked_into_is_refused(tiny: Tiny, tmp_path: Path, copied: Copied) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file").touch()
    (tmp_path / "secret").chmod(0o700)
    assert "not readable" in as_nobody(readable(tiny, copied()), tmp_path, tmp_path / "secret").error_line()


@needs_another_user
def test_a_source_that_may_not_be_read_is_refused(tiny: Tiny, tmp_path: Path, copied: Copied) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        model = copied()
        served = readable(tiny, model)
        (model / name).chmod(0o600)
        outcome = as_nobody(served, tmp_path, tmp_path / "output")
        assert name in outcome.stderr
        assert outcome.code == 2, outcome.stderr
        assert len(outcome.stderr.splitlines()) == 1, outcome.stderr
        shutil.rmtree(model)
        shutil.rmtree(tmp_path / "streams")


class Disk:
    """A file system in memory of a given size."""

    def __init__(self, folder: Path, size: str) -> None:
        folder.mkdir()
        self.folder = folder
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
        if mounted.returncode:
            folder.rmdir()
            pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    small = Disk(tmp_path / "disk", "40k")
    yield small
    subprocess.run(["umount", "-l", small.folder], check=True)


@needs_root
def test_a_full_disk_loses_nothing(tiny: Tiny, undisturbed: Path, disk: Disk) -> None:
    output = disk.folder / "output"
    finished = []
    for size in ("40k", "80k", "120k", "200k", "240k"):
        disk.remount(f"size={size}")
        outcome = awqdist("quantize", tiny.model, output, *tiny.options())
        assert outcome.code == 2, outcome
        assert len(outcome.stderr.splitlines()) == 1
        assert "no space left on the disk while writing" in outcome.stderr
        assert not list(output.glob("*partial"))
        finished.append(len(list(output.glob("model-layer-*.safetensors"))))
    assert finished == sorted(finished)
    disk.remount("size=10m")
    outcome = awqdist("quantize", tiny.model, output, *tiny.options())
    assert outcome.code == 0, outcome.stderr
    assert model_files(output) == model_files(undisturbed)


@needs_root
def test_a_read_only_disk_is_refused(tiny: Tiny, disk: Disk) -> None:
    disk.remount("ro")
    line = awqdist("quantize", tiny.model, disk.folder / "output", *tiny.options()).error_line()
    assert "Read-only file system" in line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "no space left on the disk"),
        (OSError(122, "Disk quota exceeded"), "no space left on the disk"),
        (OSError(30, "Read-only file system"), "choose a folder that you may write to"),
        (OSError(5, "Input/output error"), "Input/output error"),
    ],
)
def test_a_disk_that_fails_in_the_midst_loses_nothing(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, words: str
) -> None:
    calls = 0
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise error
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        outcome = awqdist("quantize", tiny.model, tmp_path / "output", *tiny.options())
    assert words in outcome.error_line()
    assert awqdist("quantize", tiny.model, tmp_path / "output", *tiny.options()).code == 0
    assert model_files(tmp_path / "output") == model_files(undisturbed)


def test_a_report_that_cannot_be_written_does_not_fail_the_run(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(summary: object, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("awqdist.cli.commands.write_report", fail)
    options = [option for option in tiny.options() if option != "--no-report"]
    outcome = awqdist("quantize", tiny.model, tmp_path / "output", *options)
    assert outcome.code == 0
    assert outcome.stderr.splitlines() == ["awqdist: warning: report.html was not written: No space left on device"]
    assert model_files(tmp_path / "output") == model_files(undisturbed)


# Odd but valid


@pytest.mark.parametrize(
    "options",
    [
        ("--num-samples", 1),
        ("--num-samples", 1, "--seq-len", 8),  # fewer tokens than inputs: rows in place of a Gram matrix
        ("--num-samples", 3, "--chunk-tokens", 64),  # the last chunk is smaller
        ("--chunk-tokens", 5),  # less than one sample
        ("--chunk-tokens", 10_000),
        ("--seq-len", 100),
        ("--seed", 7),
        ("--format", "autoawq"),
        ("--snapshot-every", 3),
        ("--progress", "plain"),
        ("--device", "auto"),
    ],
)
def test_odd_settings_give_a_model_that_verifies(tiny: Tiny, tmp_path: Path, options: tuple[object, ...]) -> None:
    outcome = awqdist("quantize", tiny.model, tmp_path / "output", *tiny.options(*options))
    assert outcome.code == 0, outcome.stderr
    checked = awqdist("verify", tmp_path / "output", "--source", tiny.model)
    assert checked.code == 0, checked.stdout


def test_paths_may_be_nested_relative_and_hold_spaces_and_any_letters(
    tiny: Tiny, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny.model, tmp_path / "mein Modell ß")
    shutil.copyfile(tiny.text, tmp_path / "Текст 中文.txt")
    monkeypatch.chdir(tmp_path)
    output = Path("neue Ordner") / "größer & 'schöner'" / "[1] {2} *"
    options = tiny.options("--calibration", "Текст 中文.txt", "--progress", "plain")
    assert awqdist("quantize", "mein Modell ß", output, *options).code == 0
    assert model_files(output) == model_files(undisturbed)
    shutil.rmtree(output / ".awqdist")
    assert awqdist("quantize", "mein Modell ß", output, *options, "--overwrite").code == 0
    assert model_files(output) == model_files(undisturbed)


def test_an_output_within_the_models_folder_is_no_harm(
    tiny: Tiny, tmp_path: Path, undisturbed: Path, copied: Copied
) -> None:
    model = copied()
    before = contents(model)
    assert awqdist("quantize", model, model / "w4", *tiny.options()).code == 0
    assert model_files(model / "w4") == model_files(undisturbed)
    shutil.rmtree(model / "w4")
    assert contents(model) == before


def test_the_source_is_never_written(tiny: Tiny, tmp_path: Path) -> None:
    with folder_as_it_was(tiny.model):
        assert awqdist("quantize", tiny.model, tmp_path / "output", *tiny.options()).code == 0


def test_a_jsonl_file_and_a_text_file_of_the_same_text_give_the_same_bytes(
    tiny: Tiny, tmp_path: Path, undisturbed: Path
) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": tiny.text.read_text(), "more": 1}) + "\n\n")
    options = tiny.options("--calibration", tmp_path / "text.jsonl")
    assert awqdist("quantize", tiny.model, tmp_path / "output", *options).code == 0
    assert model_files(tmp_path / "output") == model_files(undisturbed)
