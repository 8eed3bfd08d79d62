"""Checks whether a machine and a folder have what a run needs; each check says what was found and what to do about it.

`examine` is the command `awqdist doctor`, which also prints the rates that `profile` measures.
"""

from __future__ import annotations

import ctypes.util
import fcntl
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.markup import escape
from torch import distributed

from awqdist.doctor.profile import measure_machine
from awqdist.errors import AwqdistError, OffloadError
from awqdist.offload.nvme import BUILD_COMMAND, build_operator, why_unavailable
from awqdist.plan.machine import MachineProfile
from awqdist.run.device import choose_device

_LEAST_LOCKED_BYTES = 1 << 28  # DeepNVMe locks a buffer for reading and one for writing
_LITTLE_BYTES = 10 * 10**9
_HARDLY_ANY_BYTES = 10**8
_NUM_RENAMES = 200
_PATIENCE_S = 20.0
_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}
_print = partial(Console().print, soft_wrap=True, highlight=False)
_HOLD = "import fcntl,os,sys,time; d=os.open(sys.argv[1],os.O_RDWR); fcntl.flock(d,fcntl.LOCK_EX); print(1,flush=True); time.sleep(60)"


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check. remedy: what to do, if the state is not "ok"."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def examine(folder: Path, *, build: bool, profile: Path | None, ray_address: str | None, as_json: bool = False) -> None:
    """Prints every check and the rates of the machine (`awqdist doctor`).

    Args:
        folder: OUTPUT, or a folder on the disk in question.
        build: compile DeepNVMe's operator first.
        profile: file for the measured rates.
        ray_address: of the cluster to join.
        as_json: print JSON instead of lines.

    Raises:
        AwqdistError: the rates cannot be measured in `folder`.
        SystemExit: status 1 if any check failed.
    """
    checks: list[Check] = []

    def show(*found: Check) -> None:
        checks.extend(found)
        for check in found if not as_json else ():
            remedy = f" → {check.remedy}" if check.remedy else ""
            color = _COLORS[check.state]
            _print(f"[{color}]{check.state:4}[/{color}] {check.name}: {escape(check.found + remedy)}")

    if build:
        show(build_nvme(lambda line: None if as_json else _print(f"     {escape(line)}")))
    show(*check_machine())
    show(*check_folder(folder))
    show(check_ray(ray_address))
    rates = None
    if all(check.state != "fail" for check in checks if check.name in ("folder", "free space")):
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
        try:
            rates = measure_machine(place, choose_device("auto"))
        except OSError as error:
            raise AwqdistError(f"cannot measure in {place}: {error.strerror or error}; give another folder") from error
        if profile is not None:
            rates.save(profile.absolute())
    if as_json:
        print(json.dumps({"checks": [asdict(check) for check in checks], "profile": rates and asdict(rates)}, indent=2))
    elif rates is not None:
        _print_rates(rates, profile)
    if any(check.state == "fail" for check in checks):
        raise SystemExit(1)


def _print_rates(rates: MachineProfile, profile: Path | None) -> None:
    products = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in rates.matmul_flops_per_s.items())
    copies = rates.host_to_device_bytes_per_s
    to_device = f", to the GPU {copies / 1e9:.1f} GB/s" if copies else ""
    _print(
        f"     disk: read {rates.read_bytes_per_s / 1e9:.2f} GB/s, write {rates.write_bytes_per_s / 1e9:.2f} GB/s{to_device};"
        f" matmul on {rates.device}, TFLOP/s: {products}"
    )
    if profile is not None:
        _print(f"     written to {escape(str(profile))}")


def check_machine() -> list[Check]:
    """Checks versions, devices and libraries."""
    return [_python(), _libraries(), _host(), _gpus(), _nccl(), _libaio(), _deepnvme()]


def check_ray(address: str | None) -> Check:
    """Checks that the Ray cluster that a run would use can be joined. Starts none."""
    from awqdist.backends.ray import describe_cluster

    try:
        return Check("Ray", "ok", describe_cluster(address))
    except AwqdistError as error:
        reason, _, remedy = str(error).rpartition("; ")
        return Check("Ray", "fail", reason, remedy)


def build_nvme(tell: Callable[[str], None]) -> Check:
    """Compiles DeepNVMe's operator if necessary; the check fails if that does not work. tell: called with lines about the progress."""
    try:
        build_operator(tell)
    except OffloadError as error:
        reason, _, remedy = str(error).rpartition("; ")
        return Check("build", "fail", reason, f"{remedy}, then `{BUILD_COMMAND}` again")
    return Check("build", "ok", "DeepNVMe's operator is compiled and loads")


def check_folder(folder: Path) -> list[Check]:
    """Checks free space, atomic renames, fsync, locks and direct I/O, and leaves nothing behind.

    Args:
        folder: may not exist yet; then the folder in which it will be made is checked.
    """
    place = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()), Path("/"))
    if not place.is_dir():
        return [Check("folder", "fail", f"{place} is a file", "give a folder")]
    try:
        probe = Path(tempfile.mkdtemp(prefix=".awqdist-doctor-", dir=place))
    except OSError as error:
        return [Check("folder", "fail", f"{place}: {error.strerror}", "choose a folder that you may write to")]
    try:
        checks = [_free_space(place)]
        for name, check, remedy in (
            ("rename", _rename, "put OUTPUT on a file system with atomic renames: a killed run could leave torn files"),
            ("fsync", _fsync, "put OUTPUT elsewhere: finished layers might be lost in a power failure"),
            ("locks", _locks, "put OUTPUT on a file system with flock: two runs could use one folder at once"),
        ):
            try:
                checks.append(Check(name, "ok", check(probe)))
            except (OSError, ValueError) as error:
                checks.append(Check(name, "fail", str(error), remedy))
        return [*checks, _direct_io(probe)]
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform == "linux":
        return Check("Python", "ok", found)
    return Check(
        "Python", "warn", found, "awqdist is tested on Linux; elsewhere --offload nvme and some checks do not work"
    )


def _libraries() -> Check:
    """Checks that every required library is installed in a supported version."""
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


def _host() -> Check:
    total, limited = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), ""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError):
            limit = Path(file).read_text().strip()
            if limit.isdigit() and int(limit) < total:
                limited = f", limited to {int(limit) / 1e9:.1f} GB by a control group"
            break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Check("host", "ok", f"{cores} cores, {total / 1e9:.1f} GB of memory{limited}")


def _gpus() -> Check:
    if torch.cuda.is_available():
        names = []
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            names.append(f"{torch.cuda.get_device_name(number)} ({free / 1e9:.0f} of {total / 1e9:.0f} GB free)")
        return Check("GPUs", "ok", f"{', '.join(names)}; CUDA {torch.version.cuda}")
    if torch.version.cuda is None:
        return Check("GPUs", "ok", f"none: torch {torch.__version__} is built for CPUs")
    if not Path("/proc/driver/nvidia").exists():
        return Check("GPUs", "ok", "none")
    remedy = "install a driver for CUDA " + torch.version.cuda
    return Check("GPUs", "fail", "an NVIDIA driver is installed, but torch cannot use it", remedy)


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


def _deepnvme() -> Check:
    reason = why_unavailable()
    if reason is None:
        return Check("DeepNVMe", "ok", f"async_io of deepspeed {version('deepspeed')} is compiled")
    return Check("DeepNVMe", "warn", reason, f"for --offload nvme run `{BUILD_COMMAND}`; --offload disk works without")


def _free_space(folder: Path) -> Check:
    mount, kind = "", "unknown"  # ext4, nfs4, tmpfs, …
    with suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, place, type_, *_ = line.split(" ")
            if folder.resolve().is_relative_to(place) and len(place) >= len(mount):
                mount, kind = place, type_
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.1f} GB in {folder} ({kind})"
    if free < _HARDLY_ANY_BYTES:
        return Check("free space", "fail", found, "free some; `awqdist plan` shows how much a run writes")
    if free < _LITTLE_BYTES:
        return Check("free space", "warn", found, "compare with what a run writes according to `awqdist plan`")
    if kind in ("tmpfs", "ramfs"):
        return Check("free space", "warn", found, "this is memory, not a disk: offloading there saves nothing")
    return Check("free space", "ok", found)


def _rename(probe: Path) -> str:
    """Checks that a reader always finds a whole file while it is being replaced. Raises ValueError or OSError if not."""
    file, contents = probe / "file", [bytes([48 + number]) * 8192 for number in range(2)]
    file.write_bytes(contents[0])
    wrong: list[str] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            try:
                if file.read_bytes() not in contents:
                    wrong.append("a reader saw a torn file during a rename")
            except FileNotFoundError:
                wrong.append("a file was missing for a moment during a rename")

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(_NUM_RENAMES):
            (probe / "new").write_bytes(contents[number % 2])
            (probe / "new").rename(file)
    finally:
        over.set()
        reader.join()
    if wrong:
        raise ValueError(wrong[0])
    return "replaces a file in one step"


def _fsync(probe: Path) -> str:
    for path, flags in ((probe / "synced", os.O_WRONLY | os.O_CREAT), (probe, os.O_RDONLY)):
        descriptor = os.open(path, flags)
        try:
            if path != probe:
                os.write(descriptor, b"x")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return "works for files and folders"


def _locks(probe: Path) -> str:
    """Checks that the lock of another process is respected, and ends when that process is killed. Raises ValueError or OSError if not."""
    file = probe / "lock"
    file.touch()
    holder = subprocess.Popen([sys.executable, "-S", "-c", _HOLD, str(file)], stdout=subprocess.PIPE)
    timer = threading.Timer(_PATIENCE_S, holder.kill)
    timer.start()
    descriptor = os.open(file, os.O_RDWR)
    try:
        assert holder.stdout is not None
        if not holder.stdout.readline():
            raise ValueError("a lock could not be acquired")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise ValueError("a file that another process has locked could be locked again")
        except BlockingIOError:
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError("the lock of a killed process is still held") from None
    finally:
        timer.cancel()
        os.close(descriptor)
        holder.kill()
        holder.communicate()
    return "flock is held, and released when its process dies"


def _direct_io(probe: Path) -> Check:
    with suppress(OSError):
        os.close(os.open(probe / "direct", os.O_WRONLY | os.O_CREAT | getattr(os, "O_DIRECT", 1 << 30), 0o600))
        return Check("direct I/O", "ok", "works")
    return Check("direct I/O", "warn", "not supported", "for --offload nvme give an --offload-dir on a local disk")
