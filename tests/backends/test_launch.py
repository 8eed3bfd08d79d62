"""The scripts of launch/, used as a reader of launch/README.md would use them. Where they need other machines, small scripts stand in for
ssh, rsync and hostname and do on this machine what they are asked to do elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml
from support.command_line import model_files
from support.rings import free_port
from support.tiny_llama import Tiny

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(file.name for file in LAUNCH.iterdir() if file.suffix in (".sh", ".py", ".sbatch"))
STAND_INS = {
    "ssh": """#!/bin/bash
        while :; do case "$1" in -tt) one_stream=yes; shift ;; -i | -o) shift 2 ;; *) break ;; esac; done
        shift # USER@HOST
        if [ -n "$one_stream" ]; then exec 2>&1; fi
        cd && exec bash -c "$*" """,
    "rsync": """#!/bin/bash
        target=${*: -1} source=${*: -2:1}
        target=$HOME/${target#*:\\~/}
        mkdir -p "$(dirname "$target")"
        if [ -d "$source" ]; then mkdir -p "$target" && source=$source/.; fi
        cp -r "$source" "$target" """,
    "hostname": """#!/bin/bash
        echo 127.0.0.1""",
}
# What KubeRay's operator reads, for the fields that we write (ray-operator/apis/ray/v1 of KubeRay 1.2 to 1.5).
RAY_JOB_FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"entrypoint", "shutdownAfterJobFinishes", "backoffLimit", "rayClusterSpec"},
    "spec.rayClusterSpec": {"rayVersion", "headGroupSpec", "workerGroupSpecs"},
    "spec.rayClusterSpec.headGroupSpec": {"rayStartParams", "template"},
    "spec.rayClusterSpec.workerGroupSpecs.0": {
        "groupName",
        "replicas",
        "minReplicas",
        "maxReplicas",
        "rayStartParams",
        "template",
    },
}


@dataclass(frozen=True)
class Launched:
    """How a launcher ended. output: both of its streams, in order."""

    code: int
    output: str

    @property
    def last_line(self) -> str:
        return [line for line in self.output.splitlines() if line.strip()][-1]


def ended(process: subprocess.Popen[str]) -> Launched:
    output, _ = process.communicate(timeout=300)
    return Launched(process.returncode, output)


@dataclass(frozen=True)
class User:
    """Somebody at a terminal of this machine. folder: holds their home and all that Ray writes; environment: of their commands."""

    folder: Path
    environment: dict[str, str]

    def starts(self, *command: object, at: Path, **more: str) -> subprocess.Popen[str]:
        """A command, with more variables, in a folder."""
        return subprocess.Popen(
            list(map(str, command)),
            env={**self.environment, **more},
            cwd=at,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def runs(self, *command: object, at: Path) -> Launched:
        return ended(self.starts(*command, at=at))

    @property
    def processes(self) -> list[psutil.Process]:
        """All that live of those that were started with this environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RAY_TMPDIR") == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


@pytest.fixture(scope="module")
def user() -> Iterator[User]:
    """Nothing of theirs is left afterwards: no process, no file, no segment of shared memory."""
    shared_memory = {name for name in os.listdir("/dev/shm") if name.startswith(("plasma", "ray"))}
    with tempfile.TemporaryDirectory(
        prefix="awq", dir="/tmp"
    ) as name:  # paths of Ray's sockets have at most 107 characters
        folder = Path(name)
        (folder / "bin").mkdir()
        for program, text in STAND_INS.items():
            (folder / "bin" / program).write_text(text)
            (folder / "bin" / program).chmod(0o755)
        path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        (folder / ".bashrc").write_text(f"export PATH='{path}'\n")  # as the set-up commands do
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
        user = User(
            folder,
            {
                **ours,
                "PATH": path,
                "HOME": str(folder),
                "TMPDIR": str(folder),
                "RAY_TMPDIR": str(folder),
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray binds to 127.0.0.1 only
                "RAY_AUTH_MODE": "disabled",
                "RAY_USAGE_STATS_ENABLED": "0",
                "GLOO_SOCKET_IFNAME": "lo",
                "DS_ACCELERATOR": "cpu",
                "NPROC": "2",
                "MAX_RESTARTS": "0",
            },
        )
        yield user
        assert user.processes == []
    assert {name for name in os.listdir("/dev/shm") if name.startswith(("plasma", "ray"))} <= shared_memory


@dataclass(frozen=True)
class Head:
    """A cluster of one node that `ray up` has started. config: what `ray submit` is given; address: for `ray job submit`."""

    config: Path
    address: str


@pytest.fixture(scope="module")
def head(user: User) -> Iterator[Head]:
    """launch/ray-cluster.yaml on this machine: with ports of its own, and without the commands that install awqdist."""
    port, dashboard = free_port(), free_port()
    start = f"ray start --head --port={port} --node-ip-address=127.0.0.1 --num-cpus=2 --object-store-memory=100000000"
    start += f" --dashboard-port={dashboard} --dashboard-agent-listen-port={free_port()} --include-log-monitor=false"
    start += f" --ray-client-server-port={free_port()} --min-worker-port=0 --max-worker-port=0"
    config = yaml.safe_load((LAUNCH / "ray-cluster.yaml").read_text())
    config |= {
        "cluster_name": user.folder.name,
        "provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []},
        "auth": {"ssh_user": "somebody"},
        "setup_commands": [f"export RAY_ADDRESS=127.0.0.1:{port}; echo export RAY_ADDRESS=$RAY_ADDRESS >> ~/.bashrc"],
        "head_start_ray_commands": [f"unset RAY_ADDRESS; {start}"],
    }
    file = user.folder / "ray-cluster.yaml"
    file.write_text(yaml.safe_dump(config))
    known = set(Path("/tmp").glob("ray_ssh_*/*"))
    try:
        up = user.runs("ray", "up", "--yes", "--no-config-cache", file, at=ROOT)
        assert up.code == 0, up.output
        yield Head(file, f"http://127.0.0.1:{dashboard}")
    finally:
        stop(user)
        for folder in set(Path("/tmp").glob("ray_ssh_*/*")) - known:  # Ray's own choice of a place
            shutil.rmtree(folder)
            with contextlib.suppress(OSError):
                folder.parent.rmdir()


def stop(user: User) -> None:
    """As `ray stop`, which would also end the Ray of others."""
    deadline = time.monotonic() + 20
    while left := user.processes:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.ray
def test_ray_jobs_end_with_the_model_where_the_user_meant_it_or_with_the_reason(
    user: User, head: Head, tiny: Tiny, undisturbed: Path, tmp_path: Path
) -> None:
    def submit(model: Path, output: str) -> subprocess.Popen[str]:
        options = tiny.options("--num-workers", 2, "--threads", 1)
        return user.starts(LAUNCH / "ray-job.sh", model, output, *options, at=tmp_path, RAY_ADDRESS=head.address)

    good, bad = submit(tiny.model, "out put"), submit(tmp_path / "nowhere", "output")
    finished, failed = ended(good), ended(bad)
    assert finished.code == 0, finished.output
    assert model_files(tmp_path / "out put") == model_files(undisturbed)
    assert failed.code != 0
    assert failed.last_line.startswith("awqdist: error: model folder not found: "), failed.output


@pytest.mark.ray
def test_ray_submit_copies_one_file_and_ends_with_the_model_or_with_the_reason(
    user: User, head: Head, tiny: Tiny, undisturbed: Path, tmp_path: Path
) -> None:
    def submit(output: object, num_workers: int) -> subprocess.Popen[str]:
        options = tiny.options("--num-workers", num_workers, "--threads", 1)
        command = (
            "ray",
            "submit",
            "--no-config-cache",
            head.config,
            LAUNCH / "ray_submit.py",
            "--",
            tiny.model,
            output,
        )
        return user.starts(*command, *options, at=ROOT)

    started = [submit(tmp_path / "output", 1), submit(tmp_path / "nothing", 0), submit("relative", 1)]
    finished, *failed = map(ended, started)
    assert finished.code == 0, finished.output
    assert model_files(tmp_path / "output") == model_files(undisturbed)
    assert (user.folder / "ray_submit.py").read_bytes() == (LAUNCH / "ray_submit.py").read_bytes()
    for run, reason in zip(failed, ["awqdist: error: Invalid value", "ray_submit.py: error: "], strict=True):
        assert run.code != 0
        own, _ = run.output.split("Error: Command failed:")  # what Ray adds: the command that failed
        assert own.splitlines()[-1].startswith(reason), run.output


@pytest.mark.torchrun
@pytest.mark.parametrize(
    "command",
    [
        pytest.param([LAUNCH / "torchrun.sh"], id="torchrun"),
        pytest.param([LAUNCH / "deepspeed-hostfile.sh", "hosts"], id="deepspeed"),
        pytest.param(
            ["accelerate", "launch", "--multi_gpu", "--num_processes", 2, "-m", "awqdist", "quantize"],
            id="accelerate",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_launcher_of_ranks_writes_the_bytes_of_a_single_worker(
    user: User, tiny: Tiny, undisturbed: Path, tmp_path: Path, command: list[Any]
) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    run = user.runs(*command, tiny.model, "output", *tiny.options("--threads", 1), at=tmp_path)
    assert run.code == 0, run.output
    begun = next(json.loads(line) for line in run.output.splitlines() if '"RunStarted"' in line)
    assert (begun["backend"], begun["num_workers"]) == ("torchrun", 2)
    assert model_files(tmp_path / "output") == model_files(undisturbed)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_parses_is_short_and_says_how_to_run_it(name: str) -> None:
    file = LAUNCH / name
    lines = file.read_text().splitlines()
    assert len(lines) <= 20
    assert f"launch/{name} " in "\n".join(lines[:6])
    if file.suffix == ".py":
        compile(file.read_text(), name, "exec")
    else:
        checked = subprocess.run(["bash", "-n", file], capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")
    assert file.suffix == ".py" or os.access(file, os.X_OK)


def test_the_cluster_follows_rays_schema() -> None:
    ray = pytest.importorskip("ray")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    config = yaml.safe_load((LAUNCH / "ray-cluster.yaml").read_text())
    jsonschema.validate(config, schema)
    for mounted in config["file_mounts"].values():
        assert (ROOT / mounted).exists()


def test_the_kubernetes_job_has_only_fields_that_kuberay_knows() -> None:
    job = yaml.safe_load((LAUNCH / "kuberay-rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    for path, known in RAY_JOB_FIELDS.items():
        part = job
        for key in filter(None, path.split(".")):
            part = part[int(key)] if isinstance(part, list) else part[key]
        assert set(part) <= known, path
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
