"""What `plan` foretells is what a run then does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.command_line import awqdist
from support.tiny_llama import RECIPE, TEXT, Tiny, write_llama, write_tokenizer

from awqdist.errors import OffloadError
from awqdist.plan.memory import Estimate, estimate
from awqdist.recipe import load_recipe
from awqdist.run.job import prepare
from awqdist.settings import RunSettings


def foretold(model: Path, recipe: Path, output: Path = Path("output"), **settings: object) -> Estimate:
    given = RunSettings(model, output, num_samples=8, sequence_length=32, device="cpu", **settings)  # type: ignore[arg-type]
    return estimate(prepare(load_recipe(recipe), given))


RECIPES = {
    "4 bit": RECIPE,
    "symmetric": RECIPE.replace("symmetric: false", "symmetric: true"),
    "8 bit": RECIPE.replace("num_bits: 4", "num_bits: 8"),
    "groups of 64": RECIPE.replace("group_size: 32", "group_size: 64"),
    "some left out": RECIPE.replace("[lm_head]", "[lm_head, 're:.*v_proj']"),
    "lm_head too": RECIPE.replace("[lm_head]", "[]"),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_the_bytes_written_are_those_foretold(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPES[kind])
    expected = foretold(tiny.model, recipe)
    options = tiny.options("--recipe", recipe)
    assert awqdist("quantize", tiny.model, tmp_path / "output", *options).code == 0
    index = json.loads((tmp_path / "output" / "model.safetensors.index.json").read_text())
    assert expected.written_bytes == index["metadata"]["total_size"]
    files = sum(file.stat().st_size for file in (tmp_path / "output").glob("*.safetensors"))
    assert expected.written_bytes < files


def test_the_bytes_written_for_autoawq_are_those_foretold(tiny: Tiny, tmp_path: Path) -> None:
    expected = foretold(tiny.model, tiny.recipe, format="autoawq")
    assert awqdist("quantize", tiny.model, tmp_path / "output", *tiny.options("--format", "autoawq")).code == 0
    index = json.loads((tmp_path / "output" / "model.safetensors.index.json").read_text())
    assert expected.written_bytes == pytest.approx(index["metadata"]["total_size"], rel=0.01)


def test_the_bytes_written_of_a_tied_model_in_float32_are_those_foretold(tiny: Tiny, tmp_path: Path) -> None:
    fields = {"num_hidden_layers": 2, "attention_bias": True, "tie_word_embeddings": True}
    model = write_llama(tmp_path / "model", dtype=torch.float32, **fields)
    write_tokenizer(model)
    expected = foretold(model, tiny.recipe)
    assert awqdist("quantize", model, tmp_path / "output", *tiny.options()).code == 0
    index = json.loads((tmp_path / "output" / "model.safetensors.index.json").read_text())
    assert expected.written_bytes == index["metadata"]["total_size"]


def test_every_tensor_is_read_once_and_the_embeddings_twice(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = foretold(tiny.model, tiny.recipe)
    read = 0
    preadv = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        count = preadv(descriptor, buffers, offset)
        read += count
        return count

    monkeypatch.setattr(os, "preadv", counting)
    assert awqdist("quantize", tiny.model, tmp_path / "output", *tiny.options()).code == 0
    # beside the tensors: samples of 256 bytes of each layer's nine, and snapshots, which are not read here
    assert expected.read_bytes <= read <= expected.read_bytes + 256 * 9 * 4 * 2 + 1024


def test_memory_grows_with_what_it_is_needed_for(tiny: Tiny) -> None:
    base = foretold(tiny.model, tiny.recipe)
    assert base.activation_bytes == 8 * 32 * 64 * 2
    assert base.peak_device_bytes == 0  # on a CPU, all is host memory
    assert base.peak_host_bytes > base.activation_bytes
    narrower = foretold(tiny.model, tiny.recipe, chunk_tokens=32)
    assert narrower.peak_host_bytes < base.peak_host_bytes
    assert narrower.read_bytes == base.read_bytes


def test_the_sum_of_the_layers_is_the_whole(tiny: Tiny) -> None:
    whole = foretold(tiny.model, tiny.recipe)
    outside = 128 * 64 * 2 * 2 + 64 * 2  # embeddings, lm_head, final norm
    assert whole.written_bytes == sum(layer.written_bytes for layer in whole.layers) + outside
    assert len({layer.written_bytes for layer in whole.layers}) == 1


def test_offloaded_activations_take_a_disk_instead_of_memory(tiny: Tiny) -> None:
    kept, offloaded = foretold(tiny.model, tiny.recipe), foretold(tiny.model, tiny.recipe, offload="disk")
    assert (kept.chunks.memory_bytes, kept.chunks.offloaded_bytes) == (8 * 32 * 64 * 2, 0)
    assert (offloaded.chunks.memory_bytes, offloaded.chunks.offloaded_bytes) == (0, 8 * 32 * 64 * 2)
    assert offloaded.chunks.moved_bytes == 4 * 8 * 32 * 64 * 2
    assert kept.activation_bytes == offloaded.activation_bytes


def test_memory_that_is_given_is_used_and_not_exceeded(tiny: Tiny) -> None:
    def with_memory(num_bytes: int) -> Estimate:
        return foretold(tiny.model, tiny.recipe, offload="disk", cpu_memory=num_bytes, chunk_tokens=32)

    least = foretold(tiny.model, tiny.recipe, offload="disk", chunk_tokens=32).peak_host_bytes
    some, plenty = with_memory(least + 10_000), with_memory(1 << 40)
    assert (some.chunks.memory_bytes, some.chunks.offloaded_bytes) == (10_000, 8 * 32 * 64 * 2 - 10_000)
    assert some.peak_host_bytes == least + 10_000
    assert plenty.chunks.offloaded_bytes == plenty.chunks.moved_bytes == 0
    with pytest.raises(OffloadError, match=r"is too little: a worker needs about .* MB to hold one layer"):
        with_memory(least - 1)
    with pytest.raises(OffloadError, match=r"MB to hold all activations; use --offload disk"):
        foretold(tiny.model, tiny.recipe, cpu_memory=least, chunk_tokens=32)


def test_snapshots_take_the_activations_once_more(tiny: Tiny) -> None:
    often = foretold(tiny.model, tiny.recipe, snapshot_every=1)
    assert often.chunks.memory_bytes == 2 * often.activation_bytes
    assert often.snapshot_bytes == 3 * often.activation_bytes


@pytest.mark.slow
@pytest.mark.parametrize("level", ["cpu", "disk"])
def test_the_peak_of_host_memory_is_foretold_within_15_percent(tmp_path: Path, level: str) -> None:
    """A Llama of 60 MB whose activations weigh as much as two of its layers, in a process of its own."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3}
    model, text, recipe = tmp_path / "model", tmp_path / "text.txt", tmp_path / "recipe.yaml"
    write_llama(model, num_attention_heads=16, num_key_value_heads=8, **sizes)
    write_tokenizer(model)
    text.write_text(TEXT * 20)
    recipe.write_text(RECIPE)
    settings = RunSettings(
        model, tmp_path / "output", device="cpu", num_samples=128, sequence_length=128, snapshot_every=1, offload=level
    )
    expected = estimate(prepare(load_recipe(str(recipe)), settings)).peak_host_bytes
    command = [sys.executable, "-m", "awqdist", "quantize", model, tmp_path / "output", "--recipe", recipe]
    command += ["--calibration", text, "--num-samples", 128, "--seq-len", 128, "--offload", level, "--no-report"]
    command += ["--snapshot-every", 1, "--device", "cpu", "--progress", "json", "--threads", 1]
    assert peak_of_process(list(map(str, command))) == pytest.approx(expected, rel=0.15)


def peak_of_process(command: list[str]) -> int:
    """The most bytes that were resident. wait4 would tell those of this process, where they are more."""
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
        while child.poll() is None:
            status = Path(f"/proc/{child.pid}/status").read_text()
            peak = max([peak, *(1024 * int(kb) for kb in re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE))])
            time.sleep(0.02)
    assert child.returncode == 0
    return peak
