"""One contract for all backends: whatever the number of workers and whoever launched them, the bytes are those of a single worker."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.command_line import Outcome, model_files
from support.rings import RayCluster, Ring, Run, await_messages, messages, ray_cluster, run
from support.tiny_llama import Tiny, write_tiny

NUM_LAYERS = 9
RINGS = [
    pytest.param("local", 1, id="local"),
    pytest.param("ray", 1, id="ray, 1 worker", marks=pytest.mark.ray),
    pytest.param("ray", 2, id="ray, 2 workers", marks=pytest.mark.ray),
    pytest.param("ray", 3, id="ray, 3 workers", marks=pytest.mark.ray),
    pytest.param("torchrun", 2, id="torchrun, 2 ranks", marks=pytest.mark.torchrun),
    pytest.param("torchrun", 3, id="torchrun, 3 ranks", marks=pytest.mark.torchrun),
]
SEVERAL = [
    pytest.param("ray", 2, id="ray", marks=pytest.mark.ray),
    pytest.param("torchrun", 2, id="torchrun", marks=pytest.mark.torchrun),
]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A model with enough layers for several rounds of a ring."""
    return write_tiny(tmp_path_factory.mktemp("deep"), NUM_LAYERS)


@pytest.fixture(scope="module")
def alone(deep: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one worker that nothing disturbed. Not to be changed."""
    output = tmp_path_factory.mktemp("alone") / "output"
    assert run(Ring("local", 1), deep, output).code == 0
    return output


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster() as started:
        started.add_node(num_cpus=3)
        yield started


def ring(request: pytest.FixtureRequest, backend: str, num_workers: int) -> Ring:
    address = request.getfixturevalue("cluster").address if backend == "ray" else None
    return Ring(backend, num_workers, address)


@pytest.mark.parametrize(("backend", "num_workers"), RINGS)
def test_every_ring_writes_the_bytes_of_a_single_worker(
    request: pytest.FixtureRequest,
    deep: Tiny,
    alone: Path,
    tmp_path: Path,
    backend: str,
    num_workers: int,
) -> None:
    output = tmp_path / "output"
    outcome = run(ring(request, backend, num_workers), deep, output)
    assert outcome.code == 0, outcome.stderr
    assert model_files(output) == model_files(alone)
    assert sorted(path.name for path in (output / ".awqdist").iterdir()) == ["lock", "log.jsonl"]
    check_events(outcome, output, num_workers)


def check_events(outcome: Outcome, output: Path, num_workers: int) -> None:
    """Every layer was done once, by the worker whose turn it was, and the screen showed what the file tells."""
    told = messages(output)
    finished = {m["layer"]: m["worker"] for m in told if m["event"] == "LayerFinished"}
    assert finished == {layer: layer % num_workers for layer in range(NUM_LAYERS)}
    assert sum(m["event"] == "StageStarted" and m["stage"] == "search" for m in told) == NUM_LAYERS
    thinned = ("LogBegun", "WorkerStatus", "ChunkForwarded", "MappingSearched")
    heard = [line["event"] for line in outcome.events if line["event"] not in thinned]
    assert [m["event"] for m in told if m["event"] not in thinned] == heard
    assert next(m["num_workers"] for m in told if m["event"] == "RunStarted") == num_workers


@pytest.mark.parametrize(("backend", "num_workers"), SEVERAL)
def test_bad_weights_in_the_layer_of_any_worker_end_the_run_with_one_clear_line(
    request: pytest.FixtureRequest, deep: Tiny, tmp_path: Path, backend: str, num_workers: int
) -> None:
    spoiled = write_tiny(tmp_path, NUM_LAYERS)
    tensors = load_file(spoiled.model / "model.safetensors")
    tensors["model.layers.5.mlp.up_proj.weight"][3, 4] = float("nan")  # layer 5 is the second worker's
    save_file(tensors, spoiled.model / "model.safetensors", metadata={"format": "pt"})
    outcome = run(ring(request, backend, num_workers), spoiled, tmp_path / "output")
    assert outcome.code != 0
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("awqdist: error: ")]
    assert "model.layers.5.mlp.up_proj.weight holds 1 values that are NaN or infinite" in lines[0]
    assert not (tmp_path / "output" / "model.safetensors.index.json").exists()
    finished = [m["layer"] for m in messages(tmp_path / "output") if m["event"] == "LayerFinished"]
    if backend == "ray":  # torchrun ends the ranks that go on
        assert outcome.code == 2
        assert set(finished) >= {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("backend", "num_workers", "number"),
    [
        pytest.param("ray", 2, signal.SIGTERM, id="ray", marks=pytest.mark.ray),
        pytest.param("torchrun", 2, signal.SIGINT, id="torchrun", marks=pytest.mark.torchrun),
    ],
)
def test_an_interrupted_ring_ends_within_ten_seconds_and_is_resumed_by_another(
    request: pytest.FixtureRequest,
    deep: Tiny,
    alone: Path,
    tmp_path: Path,
    backend: str,
    num_workers: int,
    number: signal.Signals,
) -> None:
    output = tmp_path / "output"
    with Run(ring(request, backend, num_workers).command(deep, output, "--snapshot-every", 2), tmp_path) as launched:
        await_messages(output, lambda told: sum(m["event"] == "LayerFinished" for m in told) >= 2, launched)
        start = time.monotonic()
        launched.process.send_signal(number)
        outcome = launched.wait()
        assert time.monotonic() - start < 10
    assert "the same command resumes" in outcome.stderr
    if backend == "ray":
        assert outcome.code == 128 + number
    finished = {m["layer"] for m in messages(output) if m["event"] == "LayerFinished"}
    resumed = run(Ring("local", 1), deep, output, "--snapshot-every", 2)
    assert resumed.code == 0, resumed.stderr
    assert model_files(output) == model_files(alone)
    assert {line["layer"] for line in resumed.events if line["event"] == "LayerFinished"}.isdisjoint(finished)


@pytest.mark.ray
def test_a_cluster_that_is_not_there_is_refused_at_once(deep: Tiny, tmp_path: Path) -> None:
    nowhere = run(Ring("ray", 1, address="127.0.0.1:1"), deep, tmp_path / "output")
    assert nowhere.error_line().startswith("no Ray cluster can be joined at 127.0.0.1:1")
