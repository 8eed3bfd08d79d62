"""Whether a machine has what a run needs: versions, devices, libraries. Each check says what was found, and what to do about it."""

from __future__ import annotations

import ctypes.util
import os
import platform
import resource
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import torch
from torch import distributed

from awqdist.offload.nvme import BUILD_COMMAND, why_unavailable

State = Literal["ok", "warn", "fail"]
_LEAST_LOCKED_BYTES = 1 << 28  # DeepNVMe locks a buffer for reading and one for writing


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor. remedy: what to do, where the state is not ok."""

    name: str
    state: State
    found: str
    remedy: str = ""


def check_machine() -> list[Check]:
    """All checks that need no folder and no cluster."""
    return [_python(), _libraries(), _memory(), _devices(), _nccl(), _libaio(), check_operator()]


def check_operator() -> Check:
    """DeepNVMe's operator: optional, so its absence is a warning."""
    reason = why_unavailable()
    if reason is None:
        return Check("DeepNVMe", "ok", f"async_io of deepspeed {version('deepspeed')} is compiled")
    return Check("DeepNVMe", "warn", reason, f"for --offload nvme run `{BUILD_COMMAND}`; --offload disk works without")


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform != "linux":
        return Check(
            "Python", "warn", found, "awqdist is tested on Linux; elsewhere --offload nvme and some checks do not work"
        )
    return Check("Python", "ok", found)


def _libraries() -> Check:
    """Every library that awqdist requires, in a version that it takes."""
    from packaging.requirements import Requirement

    found, wrong = [], []
    for line in requires("awqdist") or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        found.append(f"{requirement.name} {installed}")
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    if wrong:
        return Check(
            "libraries", "fail", "; ".join(wrong), "pip install --upgrade awqdist, in an environment of its own"
        )
    return Check("libraries", "ok", ", ".join(found))


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit_bytes()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limited = f", limited to {limit / 1e9:.1f} GB by a control group" if limit is not None and limit < total else ""
    return Check("host", "ok", f"{cores} cores, {total / 1e9:.1f} GB of memory{limited}")


def memory_limit_bytes() -> int | None:
    """What this process's control group allows; None if nothing does."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() and int(text) < 1 << 60 else None
    return None


def _devices() -> Check:
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return Check("GPUs", "ok", f"none: torch {torch.__version__} is built for CPUs")
        if not Path("/proc/driver/nvidia").exists():
            return Check("GPUs", "ok", "none")
        remedy = "install a driver for CUDA " + torch.version.cuda
        return Check("GPUs", "fail", "there is an NVIDIA driver, but torch cannot use it", remedy)
    names = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        names.append(f"{torch.cuda.get_device_name(number)} ({free / 1e9:.0f} of {total / 1e9:.0f} GB free)")
    return Check("GPUs", "ok", f"{', '.join(names)}; CUDA {torch.version.cuda}")


def _nccl() -> Check:
    if not torch.cuda.is_available():
        return Check("NCCL", "ok", "not needed without GPUs")
    if not distributed.is_nccl_available():
        return Check("NCCL", "fail", "torch is built without it", "install a torch with NCCL for torchrun on GPUs")
    return Check("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))


def _libaio() -> Check:
    library = ctypes.util.find_library("aio")
    if library is None:
        return Check(
            "libaio", "warn", "not found", "for --offload nvme install libaio-dev (Debian, Ubuntu) or libaio-devel"
        )
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if os.geteuid() != 0 and soft != resource.RLIM_INFINITY and soft < _LEAST_LOCKED_BYTES:
        found = f"{library}, but only {soft / 1e6:.0f} MB of memory may be locked"
        return Check("libaio", "warn", found, "for --offload nvme raise `ulimit -l` to 262144 or more")
    return Check("libaio", "ok", library)
