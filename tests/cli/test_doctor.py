"""`awqdist doctor`: what it finds on this machine, what it says of others, and the profile that it writes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import awqdist, folder_as_it_was

from awqdist.doctor import health
from awqdist.doctor.health import Check, check_folder, check_machine
from awqdist.doctor.profile import measure_machine
from awqdist.errors import AwqdistError, OffloadError
from awqdist.plan.machine import MachineProfile


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """No Ray of other tests, and a small file to measure with."""
    monkeypatch.setattr("awqdist.doctor.profile._FILE_BYTES", 1 << 25)
    monkeypatch.setattr("awqdist.doctor.profile._MEASURE_S", 0.01)
    monkeypatch.setattr("awqdist.backends.ray.describe_cluster", lambda address: "a cluster of 3 nodes")


def states(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.state for check in checks}


def test_every_line_says_how_it_is_and_nothing_is_left_behind(tmp_path: Path) -> None:
    with folder_as_it_was(tmp_path):
        outcome = awqdist("doctor", tmp_path)
    assert outcome.code == 0, outcome.stdout
    lines = outcome.stdout.splitlines()
    names = [line.split()[1] for line in lines if not line.startswith("     ")]
    assert names[:3] == ["Python:", "libraries:", "host:"]
    assert {"rename:", "fsync:", "locks:", "Ray:"} <= set(names)
    assert all(line.split()[0] in ("ok", "warn") for line in lines if not line.startswith("     "))
    assert "disk: read" in lines[-1]


def test_the_profile_is_written_and_read_back(tmp_path: Path) -> None:
    outcome = awqdist("doctor", tmp_path, "--profile", tmp_path / "machine.json", "--json")
    told = json.loads(outcome.stdout)
    profile = MachineProfile.load(tmp_path / "machine.json")
    assert told["profile"]["read_bytes_per_s"] == profile.read_bytes_per_s > 1e6
    assert profile.write_bytes_per_s > 1e6
    assert set(profile.matmul_flops_per_s) == {"float32", "bfloat16"}
    assert min(profile.matmul_flops_per_s.values()) > 1e8
    assert profile.threads == torch.get_num_threads()
    assert min(profile.checksum_bytes_per_s, profile.hash_bytes_per_s, profile.memory_bytes_per_s) > 1e7
    assert profile.network_bytes_per_s is None
    assert {check["state"] for check in told["checks"]} <= {"ok", "warn"}


@pytest.mark.gpu
def test_the_rates_of_a_gpu_are_those_of_one(tmp_path: Path) -> None:
    profile = measure_machine(tmp_path, torch.device("cuda"))
    assert profile.host_to_device_bytes_per_s is not None
    assert profile.host_to_device_bytes_per_s > 1e9
    assert profile.matmul_flops_per_s["bfloat16"] > 1e13


@pytest.mark.parametrize("text", ["", "[]", '{"kind": "other"}', '{"kind": "awqdist machine profile 2", "host": "x"}'])
def test_what_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "profile.json").write_text(text)
    with pytest.raises(AwqdistError, match=r"is not a machine profile .*create one with `awqdist doctor --profile "):
        MachineProfile.load(tmp_path / "profile.json")


def test_a_folder_that_will_be_made_is_checked_where_it_will_be_made(tmp_path: Path) -> None:
    checks = check_folder(tmp_path / "a" / "b")
    assert str(tmp_path) in checks[0].found
    assert set(states(checks).values()) <= {"ok", "warn"}
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_folder_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = awqdist("doctor", tmp_path / "file")
    assert outcome.code == 1
    assert f"fail folder: {tmp_path / 'file'} is a file → give a folder" in outcome.stdout


Patch = tuple[str, Any, str, str]


def no_lock(descriptor: int, operation: int) -> None:
    """A file system that says yes to every lock."""


def no_sync(descriptor: int) -> None:
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


@pytest.mark.parametrize(
    ("module", "name", "broken", "check", "message"),
    [
        (fcntl, "flock", no_lock, "locks", "could be locked again"),
        (os, "fsync", no_sync, "fsync", "Invalid argument"),
    ],
    ids=["locks", "fsync"],
)
def test_a_file_system_that_breaks_a_promise_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, broken: Any, check: str, message: str
) -> None:
    monkeypatch.setattr(module, name, broken)
    found = {c.name: c for c in check_folder(tmp_path)}[check]
    assert found.state == "fail"
    assert message in found.found
    assert found.remedy.startswith("put OUTPUT ")


def test_a_rename_that_lets_a_reader_see_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_two_steps(self: Path, target: Path) -> None:
        target.unlink()
        target.write_bytes(b"")
        target.write_bytes(self.read_bytes())

    monkeypatch.setattr(Path, "rename", in_two_steps)
    assert states(check_folder(tmp_path))["rename"] == "fail"


def test_little_space_is_a_warning_and_none_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, state in (("_LITTLE_BYTES", "warn"), ("_HARDLY_ANY_BYTES", "fail")):
        monkeypatch.setattr(health, limit, 1 << 60)
        assert states(check_folder(tmp_path))["free space"] == state


def test_a_library_in_another_version_than_is_required_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "requires", lambda name: ["torch>=99", "no-such-library", "ruff; extra == 'dev'"])
    found = {check.name: check for check in check_machine()}["libraries"]
    assert found.state == "fail"
    assert "is not >=99" in found.found
    assert "no-such-library is missing" in found.found
    assert "ruff" not in found.found


def test_a_cluster_that_cannot_be_joined_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(address: str | None) -> str:
        raise AwqdistError(f"no Ray cluster can be joined at {address}: refused; give HOST:PORT of its head")

    monkeypatch.setattr("awqdist.backends.ray.describe_cluster", nowhere)
    outcome = awqdist("doctor", tmp_path, "--ray-address", "127.0.0.1:1")
    assert outcome.code == 1
    assert (
        "fail Ray: no Ray cluster can be joined at 127.0.0.1:1: refused → give HOST:PORT of its head" in outcome.stdout
    )


def test_an_operator_that_does_not_compile_fails_only_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(tell: Any) -> None:
        tell("compiling …")
        raise OffloadError("DeepSpeed's async_io operator needs libaio and its headers; install libaio-dev")

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr("awqdist.doctor.health.build_operator", refuse)
    plain = awqdist("doctor", tmp_path)
    assert plain.code == 0
    assert "warn DeepNVMe: DeepSpeed's pin_memory operator is not compiled" in plain.stdout
    asked = awqdist("doctor", tmp_path, "--build-nvme")
    assert asked.code == 1
    assert "fail build: DeepSpeed's async_io operator needs libaio and its headers → install libaio-dev" in asked.stdout


@pytest.mark.nvme
def test_an_operator_that_is_compiled_is_not_compiled_again(tmp_path: Path) -> None:
    outcome = awqdist("doctor", tmp_path, "--build-nvme")
    assert "compiled already" in outcome.stdout
    assert "ok   build: DeepNVMe's operator is compiled and loads" in outcome.stdout
    assert "ok   DeepNVMe: async_io of deepspeed" in outcome.stdout
