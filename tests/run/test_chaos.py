"""Whatever is killed, and whenever: the run that is started again, by whichever backend, writes the bytes of an undisturbed one, and no
finished layer is searched twice."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.command_line import model_files
from support.rings import RayCluster, Ring, Run, await_messages, messages, ray_cluster, run
from support.tiny_llama import Tiny, write_tiny

NUM_LAYERS = 20
NUM_NODES = 3
SEED = random.SystemRandom().randrange(1 << 32)  # printed by every failing test
KINDS = {
    "actor": "ray",
    "node": "ray",
    "driver": "ray",
    "rank": "torchrun",
    "machine": "torchrun",
}  # what is killed, where


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
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
        for _ in range(NUM_NODES):
            started.add_node()
        yield started


class Chaos:
    """Kills what it is told to, at moments that a seed decides, until nothing is left to kill; then lets the run come to its end."""

    def __init__(self, deep: Tiny, alone: Path, cluster: RayCluster, folder: Path, seed: int) -> None:
        self._deep, self._alone, self._cluster, self._folder = deep, alone, cluster, folder
        self._chance = random.Random(seed)
        self._run: Run | None = None
        self._backend = ""
        self._begin_anew()

    def __enter__(self) -> Chaos:
        return self

    def __exit__(self, *error: object) -> None:
        if self._run is not None:
            self._run.__exit__(*error)

    def kill(self, kind: str) -> None:
        while not self._is_running(KINDS[kind], self._chance.randint(1, 60)):
            if (self._output / "model.safetensors.index.json").exists():
                self._check()
                self._begin_anew()
        print(f"killed: {kind} of {self._backend}, after {len(messages(self._output))} messages")
        self._num_in_flight += NUM_NODES  # at most
        match kind:
            case "actor" | "rank":
                if living := self._living_workers():
                    os.kill(self._chance.choice(living), signal.SIGKILL)
                time.sleep(0.2)  # for the others to notice
            case "node":
                self._cluster.lose_node(self._chance.randrange(NUM_NODES))
                self._cluster.add_node()
            case "driver" | "machine":
                assert self._run is not None
                (os.kill if kind == "driver" else os.killpg)(self._run.process.pid, signal.SIGKILL)
                self._run.wait()
                self._run = None

    def finish(self) -> None:
        """Ends with one worker what several began."""
        if self._run is not None:
            self._run.wait()
            self._run = None
        if not (self._output / "model.safetensors.index.json").exists():
            outcome = run(Ring("local", 1), self._deep, self._output, "--snapshot-every", 3)
            assert outcome.code == 0, outcome.stderr
        self._check()

    def _is_running(self, backend: str, num_messages: int) -> bool:
        """Lets a run of that backend go on until so many more messages have come; False if it ended before."""
        if self._run is not None and self._backend != backend:
            self._run.wait()
            self._run = None
        before = len(messages(self._output))
        if self._run is None:
            if (self._output / "model.safetensors.index.json").exists():
                return False
            num_workers = self._chance.randint(2, NUM_NODES)
            command = Ring(backend, num_workers, address=self._cluster.address).command(
                self._deep, self._output, "--snapshot-every", 3
            )
            at = command.index("--nproc-per-node" if backend == "torchrun" else "--backend")
            self._run, self._backend = (
                Run([*command[:at], "--max-restarts", "99", *command[at:]], self._folder),
                backend,
            )
        await_messages(self._output, lambda told: len(told) >= before + num_messages, self._run)
        if self._run.process.poll() is None:
            return True
        self._run = None
        return False

    def _living_workers(self) -> list[int]:
        """The processes of the workers that began last, as far as they live; waits for the first while the run goes on."""
        while not (living := [pid for pid in self._process_ids() if is_worker(pid)]):
            if self._run is None or self._run.process.poll() is not None:
                return []
            time.sleep(0.01)
        return living

    def _process_ids(self) -> list[int]:
        latest: dict[int, int] = {
            m["worker"]: m["process_id"] for m in messages(self._output) if m["event"] == "WorkerStarted"
        }
        return sorted(latest.values())

    def _begin_anew(self) -> None:
        self._output = self._folder / f"output-{self._chance.randrange(10**9)}"
        self._num_in_flight = 0

    def _check(self) -> None:
        assert model_files(self._output) == model_files(self._alone)
        assert sorted(path.name for path in (self._output / ".awqdist").iterdir()) == ["lock", "log.jsonl"]
        told = messages(self._output)
        finished = [m["layer"] for m in told if m["event"] == "LayerFinished"]
        assert sorted(finished) == list(range(NUM_LAYERS))
        searched = [m for m in told if m["event"] == "StageStarted" and m["stage"] == "search"]
        assert len(searched) <= NUM_LAYERS + self._num_in_flight
        assert not any(searched_again(told, layer) for layer in finished)


def is_worker(process_id: int) -> bool:
    """Whether the process lives and is a rank or an actor: numbers of processes are used again."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{process_id}/cmdline").read_bytes()
        return command.startswith(b"ray::") or b"awqdist" in command
    return False


def searched_again(told: list[dict[str, Any]], layer: int) -> bool:
    """Whether a layer was searched after it was finished. (A leader may be killed after its log knew of it and before others heard.)"""
    of_layer = [m for m in told if m.get("layer") == layer]
    end = next((place for place, m in enumerate(of_layer) if m["event"] == "LayerFinished"), len(of_layer))
    return any(m["event"] == "StageStarted" and m["stage"] == "search" for m in of_layer[end:])


def kill_all(kinds: list[str], deep: Tiny, alone: Path, cluster: RayCluster, folder: Path, seed: int) -> None:
    print(f"seed {seed}")
    with Chaos(deep, alone, cluster, folder, seed) as chaos:
        for kind in kinds:
            chaos.kill(kind)
        chaos.finish()


@pytest.mark.ray
@pytest.mark.torchrun
def test_five_kills_cost_no_finished_layer(deep: Tiny, alone: Path, cluster: RayCluster, tmp_path: Path) -> None:
    kill_all(["actor", "node", "driver", "rank", "machine"], deep, alone, cluster, tmp_path, SEED)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.torchrun
@pytest.mark.parametrize("draw", range(3))
def test_thirty_kills_cost_no_finished_layer(
    deep: Tiny, alone: Path, cluster: RayCluster, tmp_path: Path, draw: int
) -> None:
    kinds = random.Random(SEED + draw).choices(list(KINDS), k=30)
    kill_all(kinds, deep, alone, cluster, tmp_path, SEED + draw)
