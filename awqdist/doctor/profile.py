"""Measures the bandwidths and rates of a machine in a few seconds, as a profile from which `awqdist plan` predicts run times."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from socket import gethostname

import torch

from awqdist.checkpoint.sources import dequantize_fp8
from awqdist.plan.machine import MachineProfile
from awqdist.quant.precision import low_precision_if_exact

_FILE_BYTES = 1 << 28
_LEAST_FILE_BYTES = 1 << 24
_BLOCK_BYTES = 1 << 24
_COPY_BYTES = 1 << 28
_DIGEST_BYTES = 1 << 24
_NUM_OPERATIONS = 200
_MEASURE_S = 0.4  # how long each rate is measured


def measure_machine(folder: Path, device: torch.device) -> MachineProfile:
    """Measures a machine for some seconds.

    Args:
        folder: writable, on the disk to be measured.
        device: whose products and memory are measured.

    Raises:
        OSError: `folder` cannot be written to.
    """
    write, read = _disk_rates(folder)
    is_gpu, host = device.type == "cuda", torch.device("cpu")
    data = os.urandom(_DIGEST_BYTES)
    weight, scales = torch.randn(2048, 2048).to(torch.float8_e4m3fn), torch.ones(16, 16)
    dequantize_s = _seconds(lambda: dequantize_fp8(weight, scales, (128, 128), torch.bfloat16), host)
    rates = {
        str(dtype).removeprefix("torch."): _matmul_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    if is_gpu:
        with low_precision_if_exact(torch.bfloat16):
            rates["tfloat32"] = _matmul_rate(device, torch.float32)
    return MachineProfile(
        host=gethostname(),
        device=torch.cuda.get_device_name(device) if is_gpu else "cpu",
        threads=torch.get_num_threads(),
        read_bytes_per_s=read,
        write_bytes_per_s=write,
        checksum_bytes_per_s=_DIGEST_BYTES / _seconds(lambda: zlib.crc32(data), host),
        hash_bytes_per_s=_DIGEST_BYTES / _seconds(lambda: hashlib.sha256(data).digest(), host),
        dequantized_per_s=weight.numel() / dequantize_s,
        host_memory_bytes_per_s=_memory_rate(host),
        memory_bytes_per_s=_memory_rate(device),
        operation_s=_operation_s(device),
        host_to_device_bytes_per_s=_copy_rate(device) if is_gpu else None,
        device_memory_bytes=torch.cuda.get_device_properties(device).total_memory if is_gpu else None,
        matmul_flops_per_s=rates,
    )


def _disk_rates(folder: Path) -> tuple[float, float]:
    """Returns bytes per second of writing and syncing one file, and of reading it back from the disk as far as the system allows."""
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
    return _COPY_BYTES / _seconds(lambda: target.copy_(source), device)


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return float(2 * size**3 / _seconds(lambda: left @ right, device))


def _memory_rate(device: torch.device) -> float:
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _seconds(lambda: torch.neg(source, out=target), device)


def _operation_s(device: torch.device) -> float:
    """Returns the seconds of one small operation in a sequence of many, each on a row of matrices."""
    left, right, result = (torch.ones(_NUM_OPERATIONS, 64, device=device) for _ in range(3))

    def many() -> None:
        for i in range(_NUM_OPERATIONS):
            torch.sub(left[i], right[i], out=result[i])

    return _seconds(many, device) / _NUM_OPERATIONS


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Returns the least time that `work` took, of as many repetitions as fit into the measuring time."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    end, times = time.perf_counter() + _MEASURE_S, [once()]
    while time.perf_counter() < end:
        times.append(once())
    return min(times)
