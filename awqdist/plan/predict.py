"""How long a run takes on a machine of which only a profile is known: each layer's work over the machine's rates.

An operation on values takes as long as it moves them or as it takes to be started, whichever is longer; matrix products come on top.
The constants are what such products reach of the profile's rate, which is that of large square ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from awqdist.layer.plan import LayerPlan
from awqdist.plan.estimate_layer import LayerEstimate, chunk_tokens, compute_bytes, token_bytes
from awqdist.plan.machine import MachineProfile
from awqdist.plan.simulate import Simulation, StepTimes, simulate
from awqdist.plan.work import LayerWork
from awqdist.plan.work_units import STAGES, Product, Work
from awqdist.run.job import Job
from awqdist.run.schedule import Schedule

_REACHED: dict[Product, float] = {
    "layer": 0.85,
    "attention": 0.15,
    "statistics": 0.8,
    "exact": 0.75,
    "rough": 0.7,
    "factor": 0.7,
}
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
    job: Job, layers: Sequence[LayerEstimate], profile: MachineProfile, schedule: Schedule, workers_per_machine: int = 1
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
    job: Job, task: LayerPlan, layer: LayerEstimate, profile: MachineProfile, sharing: int
) -> LayerForecast:
    work = LayerWork(job, task).stages
    seconds: dict[str, float] = {stage: _seconds(work[stage], profile, job) for stage in STAGES}
    chunks = 2 * job.settings.num_samples * job.settings.sequence_length * token_bytes(job)  # to the device and back
    seconds["forward"] += layer.loaded_bytes / profile.host_memory_bytes_per_s  # looked through for what is not finite
    if profile.host_to_device_bytes_per_s:
        seconds["forward"] += (layer.loaded_bytes + chunks) / profile.host_to_device_bytes_per_s
        seconds["round"] += layer.written_bytes / profile.host_to_device_bytes_per_s
    packed = sum(prod(e.shape) for e in map(job.index.entries.__getitem__, task.tensors.values()) if e.packing)
    read_s = layer.read_bytes * (sharing / profile.read_bytes_per_s + 1 / profile.checksum_bytes_per_s)
    seconds["read"] = (read_s + packed / profile.dequantized_per_s) / _BESIDE
    write_s = layer.written_bytes * (sharing / profile.write_bytes_per_s + 1 / profile.hash_bytes_per_s)
    seconds["write"] = _FILE_S + write_s
    return LayerForecast(task.index, seconds, {stage: work[stage].total_flops for stage in STAGES})


def _seconds(work: Work, profile: MachineProfile, job: Job) -> float:
    products = sum(flops / _rate(product, profile, job) for product, flops in work.flops.items())
    return products + 4 * work.values / profile.memory_bytes_per_s + work.operations * profile.operation_s


def _rate(product: Product, profile: MachineProfile, job: Job) -> float:
    """Operations per second of a kind of matrix product."""
    rates = profile.matmul_flops_per_s
    wide, narrow = rates["float32"], rates["bfloat16"]
    layer = wide if compute_bytes(job) == 4 else narrow
    found = {
        "layer": layer,
        "attention": layer,
        "statistics": rates.get("tfloat32", wide),
        "exact": wide,
        "rough": max(wide, narrow),
        "factor": wide,
    }
    return _REACHED[product] * found[product]
