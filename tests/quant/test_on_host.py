"""Layers larger than the device: what lies in host memory is copied to the device piece by piece, and the bytes are the same.

The device here is the CPU with a budget that is not its own: every piece is a copy, and those that are alive are counted.
"""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import awqdist
from support.family_oracles import token_ids
from support.quant_oracles import row_errors
from support.tiny_llama import RECIPE
from support.tiny_models import tiny_checkpoint
from torch import Tensor

from awqdist.backends.local import NoTransport
from awqdist.errors import OffloadError
from awqdist.plan.memory import estimate
from awqdist.quant import offload
from awqdist.quant.moments import Moments
from awqdist.quant.offload import OFFLOAD_LEVELS, HostMemory, OnHost
from awqdist.quant.search import BATCH_BYTES
from awqdist.recipe import load_recipe
from awqdist.run import worker
from awqdist.run.events import Event
from awqdist.run.job import Job, prepare
from awqdist.run.memory import layer_cost, layer_memory
from awqdist.run.schedule import Schedule
from awqdist.run.worker import Assignment, run_worker
from awqdist.settings import RunSettings

CPU = torch.device("cpu")
WIDTH = 700
SAMPLES = token_ids(8)


class CountingDevice:
    """Makes copies. bytes_alive: of those that somebody holds; most: at any time."""

    def __init__(self) -> None:
        self.bytes_alive = self.most = self.times = 0

    def __call__(self, tensor: Tensor, device: torch.device = CPU) -> Tensor:
        assert tensor.device.type == device.type == "cpu"
        copy = tensor.clone(memory_format=torch.contiguous_format)
        size = copy.numel() * copy.element_size()
        self.bytes_alive += size
        self.times += 1
        self.most = max(self.most, self.bytes_alive)
        weakref.finalize(copy, self._given_back, size)
        return copy

    def _given_back(self, size: int) -> None:
        self.bytes_alive -= size


def statistics_of(chunks: list[Tensor], host: HostMemory | None) -> Moments:
    statistics = Moments(WIDTH, sum(c.shape[0] for c in chunks), CPU, host)
    for chunk in chunks:
        statistics.add(chunk)
    return statistics


@pytest.mark.parametrize("num_tokens", [300, 1200], ids=["rows", "matrix"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_statistics_in_host_memory_are_the_same_in_every_bit(num_tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    chunks = list(torch.randn(num_tokens, WIDTH, generator=generator).to(dtype).split(200))
    difference = torch.randn(50, WIDTH, generator=generator)
    device = CountingDevice()
    whole, tiled = statistics_of(chunks, None), statistics_of(chunks, HostMemory(device, whole_matrices=False))

    assert torch.equal(row_errors(whole, difference), row_errors(tiled, difference))
    assert torch.equal(whole.gram(), tiled.gram())
    assert torch.equal(whole.mean_abs, tiled.mean_abs)
    smoothed = [s.take_smoothed_gram(torch.linspace(0.5, 2, WIDTH)) for s in (whole, tiled)]
    assert torch.equal(*smoothed)
    assert 0 < device.most <= 4 * WIDTH * (256 + 200)  # a tile, and a chunk of rows
    assert device.bytes_alive == 0


def test_one_matrix_at_a_time_is_copied_whole_if_there_is_room_for_it() -> None:
    chunks = list(torch.randn(1200, WIDTH, generator=torch.Generator().manual_seed(0)).split(200))
    device = CountingDevice()
    gram = statistics_of(chunks, HostMemory(device)).take_smoothed_gram(torch.ones(WIDTH))
    assert device.bytes_alive == 4 * WIDTH**2
    assert torch.equal(gram, statistics_of(chunks, None).take_smoothed_gram(torch.ones(WIDTH)))


def prepared(folder: Path, family: str, name: str, budget: int | None) -> Job:
    """A job whose device has a budget, which the command line refuses for a CPU."""
    output = folder / name
    (output / ".awqdist").mkdir(parents=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    settings = RunSettings(
        folder / family,
        output,
        device="cpu",
        num_samples=SAMPLES.shape[0],
        sequence_length=SAMPLES.shape[1],
        chunk_tokens=96,
        threads=1,
    )
    job = prepare(load_recipe(str(recipe)), settings)
    return replace(job, settings=replace(settings, gpu_memory=budget))


def quantized(job: Job) -> dict[str, bytes]:
    def ignore(event: Event) -> None:
        pass

    num_chunks = -(-job.settings.num_samples // max(1, job.settings.chunk_tokens // job.settings.sequence_length))
    run_worker(
        job, SAMPLES, Assignment(0, Schedule(0, len(job.plan.tasks), 1, num_chunks), {}, None), NoTransport(), ignore
    )
    return {file.name: file.read_bytes() for file in job.settings.output.glob("*.safetensors")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("on-host")
    tiny_checkpoint("deepseek-v3", folder / "deepseek-v3", torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, bytes]:
    return quantized(prepared(folder, "deepseek-v3", "all on the device", None))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> CountingDevice:
    device = CountingDevice()
    monkeypatch.setattr(offload, "copied", device)
    return device


@pytest.mark.parametrize("level", OFFLOAD_LEVELS[1:], ids=str)
def test_an_offloaded_layer_is_written_in_the_same_bytes(
    level: OnHost, folder: Path, expected: dict[str, bytes], device: CountingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "on_host_of", lambda job, plan: level)
    assert quantized(prepared(folder, "deepseek-v3", str(level), None)) == expected
    assert device.times > 0
    assert device.bytes_alive == 0


def test_experts_come_to_the_device_a_few_at_a_time_when_the_budget_says_so(
    folder: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BATCH_BYTES, "cpu", 1)  # experts are searched one by one, as if they were large
    monkeypatch.setitem(BATCH_BYTES, "cuda", 1)
    job = prepared(folder, "deepseek-v3", "a budget", None)
    on_gpu = replace(job, device=torch.device("cuda"))
    whole = estimate(on_gpu).layers[1]
    budget = layer_cost(on_gpu, job.plan.layers[1], OnHost(experts=True)).device_bytes
    layer = layer_memory(replace(on_gpu, settings=replace(job.settings, gpu_memory=budget)), job.plan.layers[1])
    assert layer.on_host.experts
    assert layer.device_bytes <= budget < whole.device_bytes
    assert layer.host_bytes >= layer.loaded_bytes

    device = CountingDevice()
    monkeypatch.setattr(offload, "copied", device)
    monkeypatch.setattr(worker, "on_host_of", lambda job, plan: layer.on_host)
    assert quantized(job) == expected

    sizes = [entry.num_bytes for name, entry in job.index.entries.items() if "layers.1.mlp.experts." in name]
    assert len(sizes) == 24
    rows = 4 * SAMPLES.numel() * 64  # float32, where bfloat16 is not fast
    assert device.most <= max(4 * max(sizes), rows)  # the parts of one expert, or its rows


def test_a_budget_that_is_too_small_for_one_layer_is_refused_with_the_figure(folder: Path) -> None:
    with pytest.raises(OffloadError, match=r"^--gpu-memory 0.1 MB is too little: .* one layer needs about \d+\.\d MB"):
        estimate(prepared(folder, "deepseek-v3", "refused", 100_000))


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_a_budget_of_a_gpu_is_refused_where_a_cpu_does_the_work(command: str, folder: Path) -> None:
    outputs = [folder / "none"] if command == "quantize" else []
    outcome = awqdist(command, folder / "deepseek-v3", *outputs, "--device", "cpu", "--gpu-memory", "1GB")
    assert outcome.error_line().startswith("--gpu-memory is given, but the layers are worked on by the CPU")


def test_plan_says_what_has_no_room_on_the_gpu(folder: Path) -> None:
    def planned(*options: object) -> dict[str, Any]:
        found = awqdist(
            "plan", folder / "deepseek-v3", "--device", "cuda", "--recipe", folder / "recipe.yaml", "--json", *options
        )
        assert found.code == 0, found.stderr
        return json.loads(found.stdout)  # type: ignore[no-any-return]

    (folder / "recipe.yaml").write_text(RECIPE)
    largest = planned()["estimate"]["peak_device_bytes"]
    less = planned("--gpu-memory", largest - 1)
    assert less["estimate"]["peak_device_bytes"] < largest
    assert [place["level"] for place in less["placement"] if "layer at work:" in place["what"]] == ["host"]
