"""`awqdist doctor`: checks the environment and measures its throughput."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from awqdist.doctor.health import Check, build_nvme, check_folder, check_machine, check_ray
from awqdist.doctor.profile import measure_machine
from awqdist.errors import AwqdistError
from awqdist.plan.machine import MachineProfile
from awqdist.run.device import choose_device

_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}
_console = Console()


def examine(folder: Path, *, build: bool, profile: Path | None, ray_address: str | None, as_json: bool = False) -> None:
    """Shows every check and the rates of the machine.

    Args:
        folder: OUTPUT, or a folder on the disk in question.
        build: compile DeepNVMe's operator first.
        profile: file for the measured rates.
        ray_address: of the cluster to join.
        as_json: print JSON instead of lines.

    Raises:
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
        rates = _measured(folder)
        if profile is not None:
            rates.save(profile.absolute())
    if as_json:
        print(json.dumps({"checks": [asdict(check) for check in checks], "profile": rates and asdict(rates)}, indent=2))
    elif rates is not None:
        _print_rates(rates, profile)
    if any(check.state == "fail" for check in checks):
        raise SystemExit(1)


def _measured(folder: Path) -> MachineProfile:
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    try:
        return measure_machine(place, choose_device("auto"))
    except OSError as error:
        raise AwqdistError(f"cannot measure in {place}: {error.strerror or error}; give another folder") from error


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


def _print(line: str) -> None:
    _console.print(line, soft_wrap=True, highlight=False)
