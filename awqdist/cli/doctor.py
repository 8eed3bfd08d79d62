"""Prints what `awqdist doctor` finds: the checks of the environment, and the measured throughput of the machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from awqdist.backends.ray import describe_cluster
from awqdist.doctor.folder_health import check_folder
from awqdist.doctor.health import Check, check_machine
from awqdist.doctor.machine import measure_machine
from awqdist.errors import AwqdistError, OffloadError
from awqdist.offload.nvme import BUILD_COMMAND, build_operator
from awqdist.plan.machine import MachineProfile
from awqdist.run.device import choose_device

_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}
_console = Console()


def examine(
    folder: Path, *, build_nvme: bool, profile: Path | None, ray_address: str | None, as_json: bool = False
) -> None:
    """Prints every check and the throughput of the machine; exit status 1 if any check failed.

    Args:
        folder: The output folder, or a folder on the disk in question.
        build_nvme: Compile DeepNVMe's operator first.
        profile: File to write the throughput to.
        ray_address: Address of the Ray cluster.
        as_json: Print one JSON object.
    """
    checks: list[Check] = []

    def show(found: list[Check]) -> None:
        checks.extend(found)
        if not as_json:
            for check in found:
                _print(check)

    if build_nvme:
        show([_built(quiet=as_json)])
    show(check_machine())
    show(check_folder(folder))
    show([_ray(ray_address)])
    rates = None
    if all(check.state != "fail" for check in checks if check.name in ("folder", "free space")):
        rates = _measured(folder)
        if profile is not None:
            rates.save(profile.absolute())
    if as_json:
        print(json.dumps({"checks": [asdict(check) for check in checks], "profile": rates and asdict(rates)}, indent=2))
    elif rates is not None:
        _print_rates(rates, profile)
    if any(check.state == "fail" for check in checks):
        raise SystemExit(1)


def _built(*, quiet: bool) -> Check:
    """Compiles DeepNVMe's operator. With `--build-nvme` it is a failure if that does not succeed."""
    try:
        build_operator(lambda message: None if quiet else _console.print(f"     {escape(message)}", soft_wrap=True))
    except OffloadError as error:
        reason, _, remedy = str(error).rpartition("; ")
        return Check("build", "fail", reason, f"{remedy}, then `{BUILD_COMMAND}` again")
    return Check("build", "ok", "DeepNVMe's operator is compiled and loads")


def _ray(address: str | None) -> Check:
    try:
        return Check("Ray", "ok", describe_cluster(address))
    except AwqdistError as error:
        reason, _, remedy = str(error).rpartition("; ")
        return Check("Ray", "fail", reason, remedy)


def _measured(folder: Path) -> MachineProfile:
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    try:
        return measure_machine(place, choose_device("auto"))
    except OSError as error:
        raise AwqdistError(f"cannot measure in {place}: {error.strerror or error}; give another folder") from error


def _print(check: Check) -> None:
    remedy = f" → {check.remedy}" if check.remedy else ""
    color = _COLORS[check.state]
    _console.print(
        f"[{color}]{check.state:4}[/{color}] {check.name}: {escape(check.found + remedy)}",
        soft_wrap=True,
        highlight=False,
    )


def _print_rates(rates: MachineProfile, profile: Path | None) -> None:
    products = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in rates.matmul_flops_per_s.items())
    copies = rates.host_to_device_bytes_per_s
    to_device = f", to the GPU {copies / 1e9:.1f} GB/s" if copies else ""
    _console.print(
        f"     disk: read {rates.read_bytes_per_s / 1e9:.2f} GB/s, write {rates.write_bytes_per_s / 1e9:.2f} GB/s{to_device};"
        f" matmul on {rates.device}, TFLOP/s: {products}",
        soft_wrap=True,
        highlight=False,
    )
    if profile is not None:
        _console.print(f"     written to {escape(str(profile))}", soft_wrap=True, highlight=False)
