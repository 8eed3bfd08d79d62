"""Runs of several workers, as processes of their own: Ray on a cluster of this machine, and torchrun. Everything binds to 127.0.0.1."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from support.command_line import Outcome
from support.tiny_llama import Tiny

TIMEOUT_S = 120


@dataclass(frozen=True)
class Ring:
    """How a run is launched. backend: local, ray or torchrun; address: of the Ray cluster."""

    backend: str
    num_workers: int
    address: str | None = None

    def command(self, tiny: Tiny, output: Path, *options: object) -> list[str]:
        quantize = ["-m", "awqdist", "quantize", tiny.model, output, *tiny.options(*options), "--threads", 1]
        if self.backend == "torchrun":
            launcher = ["-m", "torch.distributed.run", "--nproc-per-node", self.num_workers]
            command = [*launcher, "--master-addr", "127.0.0.1", "--master-port", free_port(), *quantize]
        else:
            command = [*quantize, "--backend", self.backend]
            if self.backend == "ray":
                command += ["--num-workers", self.num_workers, "--ray-address", self.address]
        return [sys.executable, *map(str, command)]


class Run:
    """A launched run. Leaving it kills what is left of it."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self._files = folder / f"run-{time.monotonic_ns()}.stdout", folder / f"run-{time.monotonic_ns()}.stderr"
        with self._files[0].open("w") as stdout, self._files[1].open("w") as stderr:
            self.process = subprocess.Popen(command, stdout=stdout, stderr=stderr, start_new_session=True)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self) -> Outcome:
        code = self.process.wait(TIMEOUT_S)
        return Outcome(code, *(file.read_text() for file in self._files))


def run(ring: Ring, tiny: Tiny, output: Path, *options: object) -> Outcome:
    """A whole run."""
    with Run(ring.command(tiny, output, *options), output.parent) as launched:
        return launched.wait()


def messages(output: Path) -> list[dict[str, Any]]:
    """The whole lines of the log so far."""
    file = output / ".awqdist" / "log.jsonl"
    found = []
    for line in file.read_text().splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def await_messages(output: Path, count: Callable[[list[dict[str, Any]]], bool], launched: Run) -> list[dict[str, Any]]:
    """Waits until the messages of a run are enough, or until it has ended."""
    deadline = time.monotonic() + TIMEOUT_S
    while not count(found := messages(output)) and launched.process.poll() is None:
        assert time.monotonic() < deadline, f"only {len(found)} messages came"
        time.sleep(0.005)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class RayCluster:
    """Simulated nodes with one CPU each. The head has none: it cannot be lost, as on a real cluster of which the driver is part."""

    cluster: Any
    nodes: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add_node(self, num_cpus: int = 1) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=num_cpus, include_dashboard=False, object_store_memory=10**8))

    def lose_node(self, place: int) -> None:
        """Kills a node's raylet, as when its machine goes."""
        self.cluster.remove_node(self.nodes.pop(place), allow_graceful=False)


@contextlib.contextmanager
def ray_cluster() -> Iterator[RayCluster]:
    """A cluster that leaves no process, no session file and no segment of shared memory behind."""
    os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
    ray_utils = pytest.importorskip("ray.cluster_utils")
    Path("/tmp/ray").mkdir(exist_ok=True)  # where Ray notes the address, whatever temp_dir says
    folder = Path(tempfile.mkdtemp(prefix="awq", dir="/tmp"))  # short: paths of sockets have at most 107 characters
    before = set(os.listdir("/dev/shm"))
    head = {"num_cpus": 0, "include_dashboard": False, "node_ip_address": "127.0.0.1", "object_store_memory": 10**8}
    config = {"health_check_period_ms": 500, "health_check_failure_threshold": 4, "health_check_timeout_ms": 500}
    cluster = ray_utils.Cluster(
        initialize_head=True, head_node_args={**head, "_system_config": config, "temp_dir": str(folder)}
    )
    try:
        yield RayCluster(cluster)
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        assert set(os.listdir("/dev/shm")) <= before
