"""What a machine can do: bandwidths and rates, measured in a few seconds, and kept as a profile that `awqdist plan` can read."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from socket import gethostname

import torch

from awqdist.checkpoint.writer import write_json
from awqdist.errors import AwqdistError

_KIND = "awqdist machine profile 1"
_FILE_BYTES = 1 << 28
_LEAST_FILE_BYTES = 1 << 24
_BLOCK_BYTES = 1 << 24
_COPY_BYTES = 1 << 28
_MATMUL_S = 0.4  # how long each rate is measured


@dataclass(frozen=True, slots=True)
class MachineProfile:
    """Rates of one machine. matmul_flops_per_s: by dtype, with 2·m·n·k operations for a product of (m, k) and (k, n)."""

    host: str
    device: str  # "cpu", or the name of the GPU
    threads: int  # of the CPU that the rates are of
    read_bytes_per_s: float
    write_bytes_per_s: float
    host_to_device_bytes_per_s: float | None  # None without a GPU
    matmul_flops_per_s: dict[str, float] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        """Writes the profile durably. Raises OutputError."""
        write_json(file, {"kind": _KIND, **asdict(self)})

    @classmethod
    def load(cls, file: Path) -> MachineProfile:
        """Raises AwqdistError for anything that `save` did not write."""
        try:
            data = json.loads(file.read_text())
            if data.pop("kind") != _KIND or set(data) != {field.name for field in fields(cls)}:
                raise ValueError("it is of another kind")
            return cls(**data)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise AwqdistError(
                f"{file} is no machine profile ({error}); make one with `awqdist doctor --profile {file}`"
            ) from None


def measure_machine(folder: Path, device: torch.device) -> MachineProfile:
    """Measures for some seconds. folder: on the disk in question, and writable. Raises OSError."""
    write, read = _disk_rates(folder)
    is_gpu = device.type == "cuda"
    dtypes = (torch.float32, torch.bfloat16)
    return MachineProfile(
        host=gethostname(),
        device=torch.cuda.get_device_name(device) if is_gpu else "cpu",
        threads=torch.get_num_threads(),
        read_bytes_per_s=read,
        write_bytes_per_s=write,
        host_to_device_bytes_per_s=_copy_rate(device) if is_gpu else None,
        matmul_flops_per_s={str(dtype).removeprefix("torch."): _matmul_rate(device, dtype) for dtype in dtypes},
    )


def _disk_rates(folder: Path) -> tuple[float, float]:
    """Bytes per second of writing one file, synced, and of reading it again from the disk itself as far as the system allows."""
    size = min(_FILE_BYTES, max(_LEAST_FILE_BYTES, shutil.disk_usage(folder).free // 10))
    block = memoryview(os.urandom(_BLOCK_BYTES))
    file = folder / f"awqdist-doctor-{os.getpid()}.tmp"
    try:
        start = time.perf_counter()
        with file.open("wb", buffering=0) as stream:
            for _ in range(size // _BLOCK_BYTES):
                stream.write(block)
            os.fsync(stream.fileno())
            write_s = time.perf_counter() - start
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start, buffer = time.perf_counter(), bytearray(_BLOCK_BYTES)
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
        read_s = time.perf_counter() - start
    finally:
        file.unlink(missing_ok=True)
    return size / write_s, size / read_s


def _copy_rate(device: torch.device) -> float:
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return _COPY_BYTES / _seconds_of(lambda: target.copy_(source), device)


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return float(2 * size**3 / _seconds_of(lambda: left @ right, device))


def _seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """The least time that a piece of work took, of as many as go into the measuring time."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    end, times = time.perf_counter() + _MATMUL_S, [once()]
    while time.perf_counter() < end:
        times.append(once())
    return min(times)
