"""`awqdist plan`: what a run would read, hold and write, where each thing would lie, and how long it would take."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from awqdist.checkpoint.sources import resolve_config
from awqdist.plan.config import prepare_to_plan
from awqdist.plan.machine import MachineProfile
from awqdist.plan.mappings import mapping_table, plan_json, print_left_out
from awqdist.plan.memory import Estimate, Placement, WorkerEstimate, assign, estimate, placement
from awqdist.plan.simulation import SimulationOptions, forecast, print_forecast, schedule_of
from awqdist.plan.time import RunForecast, predict
from awqdist.recipe import load_recipe
from awqdist.run.device import choose_device
from awqdist.run.job import Job
from awqdist.run.layer_plans import Plan
from awqdist.settings import RunSettings
from awqdist.units import show_bytes, show_layers, show_percent, show_seconds


@dataclass(frozen=True, slots=True)
class Machines:
    """What a run is foretold for. profile: None if no time is to be told; workers_per_machine: how many share a disk."""

    profile: MachineProfile | None = None
    workers_per_machine: int = 1

    def device(self, name: str) -> torch.device:
        """The device that is planned for; none needs to be there. Raises AwqdistError for a name that means none."""
        if name == "auto" and self.profile is not None:
            return torch.device("cpu" if self.profile.device == "cpu" else "cuda")
        return torch.device("cuda") if name.partition(":")[0] == "cuda" else choose_device(name)

    def lacking(self, expected: Estimate) -> str | None:
        """What does not fit the GPU, if anything."""
        most = self.profile.device_memory_bytes if self.profile else None
        if most is None or expected.peak_device_bytes <= most:
            return None
        return f"does not fit: the largest layer takes {show_bytes(expected.peak_device_bytes)}, the GPU has {show_bytes(most)}"


def load_machines(profile: Path | None, workers_per_machine: int) -> Machines:
    """Raises AwqdistError if `profile` is none."""
    return Machines(MachineProfile.load(profile) if profile else None, workers_per_machine)


def show_plan(
    settings: RunSettings, recipe: str, options: SimulationOptions, machines: Machines, *, as_json: bool
) -> None:
    """Shows the plan and the estimate of a run, or what a simulation of it tells."""
    options.check(has_times=machines.profile is not None)
    settings = replace(settings, model=resolve_config(str(settings.model)))
    job = prepare_to_plan(load_recipe(recipe), settings, machines.device(settings.device))
    expected = estimate(job)
    schedule = schedule_of(settings, len(job.plan.tasks), options.num_workers)
    workers = assign(job, expected, schedule)
    told = None
    if machines.profile is not None:
        told = predict(job, expected.layers, machines.profile, schedule, machines.workers_per_machine)
    seen = forecast(schedule, options, settings, told.times if told else None) if options.simulate else None
    if as_json:
        found = {
            **plan_json(job.plan),
            "estimate": expected.to_json(),
            "workers": [asdict(worker) for worker in workers],
            "placement": [asdict(place) for place in placement(job, expected)],
        }
        found |= {"forecast": told.to_json()} if told else {}
        print(json.dumps(found | ({"simulation": seen.to_json()} if seen else {}), indent=2))
        return
    console = Console()
    console.print(f"[bold]{job.plan.architecture}[/bold], {len(job.plan.layers)} layers, on {job.device}")
    if seen:
        print_forecast(console, seen, settings)
        return
    _print_estimate(console, job, expected, workers)
    if told:
        _print_forecast(console, told, options.num_workers)
    if lacking := machines.lacking(expected):
        console.print(f"[yellow]{lacking}[/yellow]", soft_wrap=True)
    console.print(mapping_table(job.plan))
    print_left_out(console, job)


def _print_estimate(console: Console, job: Job, expected: Estimate, workers: tuple[WorkerEstimate, ...]) -> None:
    console.print(_estimate_table(job.plan, expected))
    if len(workers) > 1:
        console.print(_workers_table(workers))
    console.print(_placement_table(placement(job, expected)))
    device = expected.peak_device_bytes
    moved = expected.chunks.moved_bytes
    offloaded = f"; activations offloaded: {show_bytes(moved)} written and read again in all" if moved else ""
    console.print(
        f"read {show_bytes(expected.read_bytes)}, write {show_bytes(expected.written_bytes)};"
        f" peak host memory {show_bytes(expected.peak_host_bytes)} (activations {show_bytes(expected.activation_bytes)}),"
        f" peak device memory {show_bytes(device) if device else 'none'}{offloaded}",
        soft_wrap=True,
    )


def _estimate_table(plan: Plan, expected: Estimate) -> Table:
    """Layers of equal figures share a row."""
    table = Table("layers", "read", "held at the peak", "written", "linears quantized", title="One worker")
    rows: dict[tuple[int, int, int, int], list[int]] = {}
    for task, layer in zip(plan.tasks, expected.layers, strict=True):
        key = (layer.read_bytes, layer.device_bytes, layer.written_bytes, len(task.quantized))
        rows.setdefault(key, []).append(layer.layer)
    for (read, held, written, count), layers in rows.items():
        table.add_row(show_layers(layers), show_bytes(read), show_bytes(held), show_bytes(written), str(count))
    return table


def _workers_table(workers: Iterable[WorkerEstimate]) -> Table:
    """The peaks of each worker, and what it moves in the whole run."""
    table = Table("worker", "layers", "GPU", "host", "disk", "network", title="Workers", title_justify="left")
    for worker in workers:
        sizes = (worker.device_bytes, worker.host_bytes, worker.disk_bytes, worker.sent_bytes)
        shown = (show_bytes(size) if size else "none" for size in sizes)
        table.add_row(str(worker.worker), show_layers(worker.layers) or "none", *shown)
    return table


def _placement_table(places: Iterable[Placement]) -> Table:
    table = Table("what", "where", "at most", title="What lies where", title_justify="left")
    for place in places:
        table.add_row(place.what, place.level, show_bytes(place.num_bytes))
    return table


def _print_forecast(console: Console, told: RunForecast, num_workers: int) -> None:
    table = Table("stage", "all layers", "TFLOP", title=f"Predicted for {told.machine}", title_justify="left")
    for stage, seconds in told.seconds.items():
        table.add_row(stage, show_seconds(seconds), f"{told.flops[stage] / 1e12:.3g}" if stage in told.flops else "")
    console.print(table)
    many = f", efficiency {show_percent(told.result.efficiency)}" if num_workers > 1 else ""
    console.print(
        f"[bold]{show_seconds(told.result.makespan_s)}[/bold] with {num_workers} {'workers' if many else 'worker'}{many};"
        " imports, the first embedding and the merge come on top",
        soft_wrap=True,
    )
