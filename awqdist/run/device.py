"""Where the arithmetic happens, in which dtype, and how much memory it takes."""

from __future__ import annotations

import os
import resource
import sys

import torch

from awqdist.errors import AwqdistError
from awqdist.quant.offload import resident_bytes
from awqdist.quant.precision import has_fast_bfloat16
from awqdist.run.events import WorkerStatus

_SLURM_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def choose_device(name: str) -> torch.device:
    """The device of a name such as "auto", "cpu" or "cuda:1". Raises AwqdistError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise AwqdistError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise AwqdistError(
            f"device {name} is not there: {torch.cuda.device_count()} CUDA devices found; use --device cpu"
        )
    if device.type not in ("cpu", "cuda"):
        raise AwqdistError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    return device


def launcher_value(name: str) -> str | None:
    """Returns RANK, WORLD_SIZE or LOCAL_RANK as torchrun, accelerate and deepspeed set it, or as srun calls it; None if not set."""
    return os.environ.get(name) or os.environ.get(_SLURM_NAMES[name])


def compute_dtype(device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
    """What layers are run in: the checkpoint's dtype, but float32 on a CPU that would only emulate the narrower one."""
    if device.type == "cuda" or checkpoint == torch.float32:
        return checkpoint
    return checkpoint if checkpoint == torch.bfloat16 and has_fast_bfloat16(device) else torch.float32


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: of the GPU, or resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def worker_status(device: torch.device) -> WorkerStatus:
    """What this process and its GPU hold now, and how busy the GPU is where the driver can be asked."""
    resident = resident_bytes()
    if device.type != "cuda":
        return WorkerStatus(resident, 0, None)
    try:
        utilization = torch.cuda.utilization(device)
    except (ImportError, RuntimeError):  # NVML's Python package is not installed, or the driver does not answer
        utilization = None
    return WorkerStatus(resident, torch.cuda.memory_allocated(device), utilization)
