"""Forecasts how long a run takes on a machine of which only a profile is known.

Every kernel that a layer starts is known from measuring it on tensors without data (`layer/measure.py`). It takes as long as
its product, as the bytes that it moves, or as starting it takes, whichever is longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from awqdist.layer.measure import STAGES, Cost
from awqdist.layer.meter import Kernel
from awqdist.layer.plan import LayerPlan
from awqdist.plan.machine import MachineProfile
from awqdist.plan.simulate import Simulation, StepTimes, simulate
from awqdist.run.job import Job
from awqdist.run.memory import LayerMemory, chunk_tokens, layer_cost, token_bytes
from awqdist.run.schedule import Schedule

# what a kind of product reaches of the profile's rate, which is that of large square ones
_REACHED = {"attention": 0.15, "factor": 0.7}
_PRODUCTS_REACH = 0.8
_FACTOR_COLUMNS = 3000  # at so many columns a factorisation reaches half the rate of a product
_BESIDE = 0.5  # of the disk's rates, of threads that read and write beside one that computes
_FILE_S = 0.002  # to make one file durable


@dataclass(frozen=True, slots=True)
class LayerForecast:
    """Seconds of one layer on one worker, by stage, and floating-point operations. forward without statistics, which come with it."""

    layer: int
    seconds: dict[str, float]
    flops: dict[str, float]

    @property
    def forward_s(self) -> float:
        return self.seconds["forward"] + self.seconds["statistics"]

    @property
    def search_s(self) -> float:
        """All between the last forward and the write."""
        return self.seconds["search"] + self.seconds["check"] + self.seconds["round"]


@dataclass(frozen=True, slots=True)
class RunForecast:
    """A whole run. seconds: of all layers, by stage, as if one worker did them; times: of single steps, mean over the layers."""

    machine: str
    layers: tuple[LayerForecast, ...]
    seconds: dict[str, float]
    flops: dict[str, float]
    times: StepTimes
    result: Simulation

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "seconds": self.seconds,
            "flops": self.flops,
            "times": asdict(self.times),
            "makespan_s": self.result.makespan_s,
            "efficiency": self.result.efficiency,
            "layers": [asdict(layer) for layer in self.layers],
        }


def predict(
    job: Job, layers: Sequence[LayerMemory], profile: MachineProfile, schedule: Schedule, workers_per_machine: int = 1
) -> RunForecast:
    """The forecast of a run of `schedule` on machines that are all as `profile` says. layers: the estimates of all tasks.

    Workers of one machine share its disk, and hand chunks to each other through its memory.
    """
    chunk_bytes = chunk_tokens(job) * token_bytes(job)
    sharing = min(workers_per_machine, schedule.num_workers)
    known: dict[tuple[object, ...], LayerForecast] = {}
    forecasts = []
    for task, layer in zip(job.plan.tasks, layers, strict=True):
        kind = (task.kind, task.linears, task.sites, task.mappings, layer.read_bytes)
        if kind not in known:
            known[kind] = _layer_forecast(job, task, layer, profile, sharing)
        forecasts.append(replace(known[kind], layer=layer.layer))
    seconds = {stage: sum(f.seconds[stage] for f in forecasts) for stage in forecasts[0].seconds}
    flops: dict[str, float] = {stage: sum(f.flops[stage] for f in forecasts) for stage in STAGES}
    network = profile.network_bytes_per_s if schedule.num_workers > sharing else profile.host_memory_bytes_per_s / 2
    times = StepTimes(
        chunk_s=sum(f.forward_s for f in forecasts) / len(forecasts) / schedule.num_chunks,
        search_s=sum(f.search_s for f in forecasts) / len(forecasts),
        read_s=seconds["read"] / len(forecasts),
        write_s=seconds["write"] / len(forecasts),
        transfer_s=chunk_bytes / network if network else 0.0,
    )
    return RunForecast(profile.device, tuple(forecasts), seconds, flops, times, simulate(schedule, times))


def _layer_forecast(
    job: Job, task: LayerPlan, layer: LayerMemory, profile: MachineProfile, sharing: int
) -> LayerForecast:
    cost = layer_cost(job, task, layer.on_host)
    seconds = {stage: _seconds(cost, stage, profile, job.skeleton.dtype.itemsize) for stage in STAGES}
    seconds["forward"] += layer.loaded_bytes / profile.host_memory_bytes_per_s  # looked through for what is not finite
    packed = sum(prod(e.shape) for e in map(job.index.entries.__getitem__, task.tensors.values()) if e.packing)
    read_s = layer.read_bytes * (sharing / profile.read_bytes_per_s + 1 / profile.checksum_bytes_per_s)
    seconds["read"] = (read_s + packed / profile.dequantized_per_s) / _BESIDE
    write_s = layer.written_bytes * (sharing / profile.write_bytes_per_s + 1 / profile.hash_bytes_per_s)
    seconds["write"] = _FILE_S + write_s
    return LayerForecast(task.index, seconds, {stage: float(flops) for stage, flops in cost.flops.items()})


def _seconds(cost: Cost, stage: str, profile: MachineProfile, itemsize: int) -> float:
    """Returns the seconds of all kernels of a stage; itemsize: of the dtype that attention is computed in."""
    return sum(
        count * max(_product_s(kernel, profile, itemsize), _move_s(kernel, profile), profile.operation_s)
        for kernel, count in cost.kernels[stage].items()
    )


def _product_s(kernel: Kernel, profile: MachineProfile, itemsize: int) -> float:
    rates = profile.matmul_flops_per_s
    dtype = {"attention": "bfloat16" if itemsize < 4 else "float32", "factor": "float32", "float16": "bfloat16"}
    rate = rates.get(dtype.get(kernel.kind, kernel.kind), rates["float32"]) * _REACHED.get(kernel.kind, _PRODUCTS_REACH)
    if kernel.kind == "factor":
        columns = (3 * kernel.flops) ** (1 / 3)
        rate *= columns / (columns + _FACTOR_COLUMNS) if columns else 1.0
    return kernel.flops / rate


def _move_s(kernel: Kernel, profile: MachineProfile) -> float:
    is_copy = kernel.kind == "copy" and profile.host_to_device_bytes_per_s
    return kernel.num_bytes / (profile.host_to_device_bytes_per_s if is_copy else profile.memory_bytes_per_s)  # type: ignore[operator]
