"""Chooses the backend of a run, the number of its workers, and the CPUs and GPUs of each. Imports neither Ray nor process groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

from awqdist.errors import AwqdistError
from awqdist.run.device import launcher_value
from awqdist.settings import Placement

BACKENDS = ("local", "ray", "torchrun")


@dataclass(frozen=True, slots=True)
class Allocation:
    """The workers of a run, each with `cpus` CPUs (less than one where several share it) and perhaps a GPU."""

    num_workers: int
    cpus: float
    on_gpu: bool

    @property
    def threads(self) -> int:
        """Returns how many threads each worker may use."""
        return max(1, int(self.cpus))

    @property
    def bundle(self) -> dict[str, float]:
        """Returns the resources that Ray reserves for one worker."""
        return {"CPU": self.cpus, **({"GPU": 1.0} if self.on_gpu else {})}


def choose_backend(placement: Placement) -> str:
    """Returns one of BACKENDS; "auto" is torchrun if a launcher started several ranks, else local. Raises AwqdistError."""
    if placement.backend == "auto":
        return "torchrun" if int(launcher_value("WORLD_SIZE") or 1) > 1 else "local"
    if placement.backend not in BACKENDS:
        raise AwqdistError(f"unknown backend {placement.backend!r}; use auto, {', '.join(BACKENDS)}")
    return placement.backend


def allocate(nodes: Sequence[dict[str, float]], num_workers: int | None, device: str) -> Allocation:
    """Divides a Ray cluster among workers.

    Args:
        nodes: resources of every node ("CPU", "GPU").
        num_workers: None for one per GPU, or one per node if there is no GPU.
        device: "auto", "cpu" or "cuda".

    Raises:
        AwqdistError: there are too few GPUs, or no node can hold a worker.
    """
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
                f"{count} workers need one GPU each, the Ray cluster has {num_gpus}; use fewer --num-workers"
            )
        return Allocation(count, float(max(1, min(int(node["CPU"] // node["GPU"]) for node in able))), True)
    count = num_workers or len(able)
    share = min(node["CPU"] for node in able) / ceil(count / len(able))
    return Allocation(count, float(int(share)) if share >= 1 else max(floor(share * 100) / 100, 0.01), False)
