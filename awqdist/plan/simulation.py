"""What `awqdist plan` shows of several workers: how the layers are dealt, and how long a run would take on given or measured times."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from math import ceil, isfinite
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from awqdist.errors import AwqdistError, OutputError
from awqdist.plan.simulate import (
    Point,
    Simulation,
    StepTimes,
    best_num_chunks,
    best_num_workers,
    measured_times,
    simulate,
    sweep,
    worker_counts,
)
from awqdist.run.events import log_file
from awqdist.run.journal import read_journal
from awqdist.run.schedule import Schedule
from awqdist.settings import RunSettings
from awqdist.units import show_percent, show_seconds

_SHOWN_COUNTS = (1, 2, 4, 8, 16, 32, 64)


class SimulationError(AwqdistError):
    """Step times that are missing, or given for nothing."""


@dataclass(frozen=True, slots=True)
class SimulationOptions:
    """Options of `plan` about several workers, with the times that were given."""

    num_workers: int
    simulate: bool
    times_from: Path | None
    chunk_s: float | None = None
    search_s: float | None = None
    read_s: float | None = None
    write_s: float | None = None
    transfer_s: float | None = None

    @property
    def given(self) -> dict[str, float]:
        """The times that were given, by their names in StepTimes."""
        names = (field.name for field in fields(StepTimes))
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def check(self, *, has_times: bool = False) -> None:
        """Raises SimulationError if times are given that nothing is done with, or lacking. has_times: a profile gives those lacking."""
        given = self.given
        for name, seconds in given.items():
            if not isfinite(seconds):
                raise SimulationError(f"{_option(name)} is {seconds}: expected a finite number of seconds")
        if not self.simulate and (given or self.times_from):
            named = _option(next(iter(given))) if given else "--times-from"
            raise SimulationError(f"{named} says how long a simulated run takes; add --simulate")
        lacking = [_option(name) for name in ("chunk_s", "search_s") if name not in given]
        if self.simulate and lacking and not self.times_from and not has_times:
            raise SimulationError(
                f"--simulate needs times: give {' and '.join(lacking)} (--read-seconds, --write-seconds and --transfer-seconds"
                " are 0 otherwise), or --times-from OUTPUT with the folder of a run that has finished a layer, or --profile FILE"
            )


@dataclass(frozen=True, slots=True)
class Forecast:
    """Everything that is shown of a simulation. The points of each sweep keep the other number as it is in `schedule`."""

    schedule: Schedule
    times: StepTimes
    result: Simulation
    over_workers: tuple[Point, ...]
    over_chunks: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "num_layers": self.schedule.stop - self.schedule.first,
            "num_workers": self.schedule.num_workers,
            "num_chunks": self.schedule.num_chunks,
            "times": asdict(self.times),
            "makespan_s": self.result.makespan_s,
            "efficiency": self.result.efficiency,
            "workers": [
                {"worker": number, "utilisation": share, **asdict(worker)}
                for number, (worker, share) in enumerate(zip(self.result.workers, self.result.utilisation, strict=True))
            ],
            "over_workers": [asdict(point) for point in self.over_workers],
            "over_chunks": [asdict(point) for point in self.over_chunks],
            "best_num_workers": best_num_workers(self.over_workers),
            "best_num_chunks": best_num_chunks(self.over_chunks),
        }


def schedule_of(settings: RunSettings, num_layers: int, num_workers: int) -> Schedule:
    """The schedule of a run that begins at the first layer."""
    samples_per_chunk = max(1, settings.chunk_tokens // settings.sequence_length)
    num_chunks = ceil(settings.num_samples / samples_per_chunk)
    return Schedule(0, num_layers, num_workers, num_chunks)


def forecast(
    schedule: Schedule, options: SimulationOptions, settings: RunSettings, predicted: StepTimes | None = None
) -> Forecast:
    """Simulates a run, and others of more or fewer workers and chunks. Raises OutputError if no times can be read."""
    times = _step_times(schedule, options, settings.num_samples * settings.sequence_length, predicted)
    num_layers = schedule.stop - schedule.first
    counts = {*_SHOWN_COUNTS, schedule.num_workers, *worker_counts(num_layers, max(_SHOWN_COUNTS))}
    chunks = {ceil(settings.num_samples / 2**power) for power in range(settings.num_samples.bit_length())}
    return Forecast(
        schedule=schedule,
        times=times,
        result=simulate(schedule, times),
        over_workers=sweep(schedule, times, sorted(counts), [schedule.num_chunks]),
        over_chunks=sweep(schedule, times, [schedule.num_workers], sorted({*chunks, schedule.num_chunks})),
    )


def print_forecast(console: Console, seen: Forecast, settings: RunSettings) -> None:
    """The tables of a simulation, and what follows from them."""
    schedule, result = seen.schedule, seen.result
    console.print(
        f"[bold]{show_seconds(result.makespan_s)}[/bold], efficiency {show_percent(result.efficiency)}"
        f" (workers: {schedule.num_workers}, layers: {schedule.stop - schedule.first}, chunks: {schedule.num_chunks})"
    )
    steps = {field.name.removesuffix("_s"): _fine(getattr(seen.times, field.name)) for field in fields(StepTimes)}
    console.print("each " + ", ".join(f"{step} {seconds}" for step, seconds in steps.items()))
    console.print(_bubble_table(schedule, result))
    console.print(_workers_table(seen))
    console.print(_chunks_table(seen.over_chunks))
    chunks = best_num_chunks(seen.over_chunks)
    chunk_tokens = ceil(settings.num_samples / chunks) * settings.sequence_length
    console.print(
        f"Best: up to {best_num_workers(seen.over_workers)} workers (efficiency at least 90 % of the best); {chunks} chunks, which is"
        f" --chunk-tokens {chunk_tokens} (the fewest within 1 % of the shortest time; overhead of small chunks is not simulated)",
        soft_wrap=True,
    )


def _bubble_table(schedule: Schedule, result: Simulation) -> Table:
    table = Table(
        "worker", "layers", "computes", "idle at the start", "in between", "at the end", title="Where workers wait"
    )
    for number, (worker, share) in enumerate(zip(result.workers, result.utilisation, strict=True)):
        idle = (worker.idle_start_s, worker.idle_middle_s, worker.idle_end_s)
        table.add_row(str(number), str(len(schedule.layers_of(number))), show_percent(share), *map(_fine, idle))
    total = [sum(getattr(worker, f"idle_{part}_s") for worker in result.workers) for part in ("start", "middle", "end")]
    table.add_section()
    table.add_row("all", "", show_percent(result.efficiency), *map(_fine, total))
    return table


def _workers_table(seen: Forecast) -> Table:
    table = Table("workers", "time", "times as fast as one", "efficiency", title="Workers", title_justify="left")
    alone = next(point.makespan_s for point in seen.over_workers if point.num_workers == 1)
    for point in seen.over_workers:
        if point.num_workers in (*_SHOWN_COUNTS, seen.schedule.num_workers):
            faster = f"{alone / point.makespan_s:.2f}" if point.makespan_s else "–"
            table.add_row(str(point.num_workers), _fine(point.makespan_s), faster, show_percent(point.efficiency))
    return table


def _chunks_table(points: Iterable[Point]) -> Table:
    table = Table("chunks", "time", "efficiency", title="Chunks", title_justify="left")
    for point in points:
        table.add_row(str(point.num_chunks), _fine(point.makespan_s), show_percent(point.efficiency))
    return table


def _step_times(
    schedule: Schedule, options: SimulationOptions, num_tokens: int, predicted: StepTimes | None
) -> StepTimes:
    """Times that were given go before those that were measured, and these before those that were predicted."""
    if options.times_from is None:
        return StepTimes(**{**(asdict(predicted) if predicted else {}), **options.given})
    records = read_journal(options.times_from).layers.values()
    if not any(site.num_tokens for record in records for site in record.sites):
        raise OutputError(
            f"{log_file(options.times_from)} speaks of no finished layer; give --times-from the output folder of a run that has one"
        )
    return StepTimes(**{**asdict(measured_times(records, num_tokens, schedule.num_chunks)), **options.given})


def _fine(seconds: float) -> str:
    """Seconds, to three digits where they are few."""
    return f"{1000 * seconds:.3g} ms" if 0 < seconds < 0.9995 else show_seconds(seconds)


def _option(name: str) -> str:
    return f"--{name.removesuffix('_s')}-seconds"
