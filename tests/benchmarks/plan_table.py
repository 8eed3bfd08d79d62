"""The table of large models in awqdist/plan/README.md: what a run of the published configurations would take on nodes of 8 H200.

    python tests/benchmarks/plan_table.py

Nothing is measured: configs/machines/h200.json holds assumed rates of such a node. Where a cell has three figures they are for 1, 8 and
32 workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from awqdist.plan.config import prepare_to_plan
from awqdist.plan.machine import MachineProfile
from awqdist.plan.memory import assign, estimate
from awqdist.plan.time import predict
from awqdist.recipe import load_recipe
from awqdist.run.schedule import Schedule
from awqdist.settings import RunSettings

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = {
    "Llama-3.1-405B": "llama-3.1-405b",
    "DeepSeek-V3": "deepseek-v3",
    "Qwen3-235B-A22B": "qwen3-235b-a22b",
    "Kimi-K2": "kimi-k2",
}
WORKERS = (1, 8, 32)
WORKERS_PER_NODE = 8
HEADER = (
    "| model | GPU memory | host memory | disk | network | time |",
    "|---|---|---|---|---|---|",
)


def row(name: str) -> str:
    """The line of one model: the most of any worker, and the time of the run."""
    machine = MachineProfile.load(CONFIGS / "machines" / "h200.json")
    settings = RunSettings(CONFIGS / "models" / f"{MODELS[name]}.json", Path("output"))
    job = prepare_to_plan(load_recipe("default"), settings, torch.device("cuda"))
    expected = estimate(job)
    host, disk, network, times = [], [], [], []
    for num_workers in WORKERS:
        num_chunks = -(-settings.num_samples // (settings.chunk_tokens // settings.sequence_length))
        schedule = Schedule(0, len(expected.layers), num_workers, num_chunks)
        workers = assign(job, expected, schedule)
        host.append(max(worker.host_bytes for worker in workers))
        disk.append(max(worker.disk_bytes for worker in workers) / 1e9)
        network.append(max(worker.sent_bytes for worker in workers) / 1e9)
        times.append(predict(job, expected.layers, machine, schedule, WORKERS_PER_NODE).result.makespan_s / 60)
    device = expected.peak_device_bytes
    assert machine.device_memory_bytes is not None
    fits = "" if device <= machine.device_memory_bytes else " (does not fit)"
    gigabytes = (
        f"{device / 1e9:.0f} GB{fits}",
        f"{max(host) / 1e9:.0f} GB",
        f"{_joined(disk)} GB",
        f"{_joined(network)} GB",
    )
    return f"| {name} | {' | '.join(gigabytes)} | {_joined(times)} min |"


def _joined(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.0f}" if value >= 9.5 or not value else f"{value:.1f}" for value in values)


def lines() -> Iterator[str]:
    yield from HEADER
    yield from map(row, MODELS)


if __name__ == "__main__":
    print("\n".join(lines()))
