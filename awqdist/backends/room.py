"""Which backend a run gets, how many workers, and what each of them asks for. No Ray and no process groups: names and numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

from awqdist.errors import AwqdistError
from awqdist.settings import Placement

BACKENDS = ("local", "ray", "torchrun")
_SLURM_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


@dataclass(frozen=True, slots=True)
class Room:
    """num_workers of them, each with `cpus` processors (less than one where several share it) and perhaps a GPU."""

    num_workers: int
    cpus: float
    on_gpu: bool

    @property
    def threads(self) -> int:
        """How many threads a worker may keep busy."""
        return max(1, int(self.cpus))

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray is to reserve for one worker."""
        return {"CPU": self.cpus, **({"GPU": 1.0} if self.on_gpu else {})}


def choose_backend(placement: Placement) -> str:
    """One of BACKENDS; "auto" is torchrun where a launcher made this process one of several ranks, else local. Raises AwqdistError."""
    if placement.backend == "auto":
        return "torchrun" if int(launcher_value("WORLD_SIZE") or 1) > 1 else "local"
    if placement.backend not in BACKENDS:
        raise AwqdistError(f"unknown backend {placement.backend!r}; use auto, {', '.join(BACKENDS)}")
    return placement.backend


def launcher_value(name: str) -> str | None:
    """RANK, WORLD_SIZE or LOCAL_RANK as torchrun, accelerate and deepspeed set it, or as srun calls it."""
    return os.environ.get(name) or os.environ.get(_SLURM_NAMES[name])


def room_for_workers(nodes: Sequence[dict[str, float]], num_workers: int | None, device: str) -> Room:
    """nodes: resources of every node ("CPU", "GPU"); num_workers: None for one on every GPU, or one on every node if there is none;
    device: "auto", "cpu" or "cuda". Raises AwqdistError if GPUs are asked for and there are none."""
    on_gpu = device != "cpu" and any(node.get("GPU", 0) for node in nodes)
    if device.startswith("cuda") and not on_gpu:
        raise AwqdistError("the Ray cluster has no GPU; use --device cpu")
    kind = "GPU" if on_gpu else "CPU"
    able = [node for node in nodes if node.get(kind, 0) >= 1 and node.get("CPU", 0) >= 1]
    if not able:
        raise AwqdistError(
            f"the Ray cluster has no node with a {kind} and a CPU for the worker; start one with `ray start`"
        )
    if on_gpu:
        num_gpus = int(sum(node["GPU"] for node in able))
        count = num_workers or num_gpus
        if count > num_gpus:
            raise AwqdistError(
                f"{count} workers need a GPU each, the Ray cluster has {num_gpus}; use fewer --num-workers"
            )
        return Room(count, float(max(1, min(int(node["CPU"] // node["GPU"]) for node in able))), True)
    count = num_workers or len(able)
    share = min(node["CPU"] for node in able) / ceil(count / len(able))
    return Room(count, float(int(share)) if share >= 1 else max(floor(share * 100) / 100, 0.01), False)
