"""Times that `plan --profile` foretells: the operations counted against a pencil's figures, and what must hold on any machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.plan_table import CONFIGS, lines, row
from support.command_line import awqdist
from support.tiny_llama import NUM_LAYERS, Tiny
from support.tiny_models import tiny_checkpoint

from awqdist.plan.machine import MachineProfile
from awqdist.plan.memory import estimate
from awqdist.plan.simulate import simulate
from awqdist.plan.time import RunForecast, predict
from awqdist.recipe import load_recipe
from awqdist.run.job import prepare
from awqdist.run.schedule import Schedule
from awqdist.settings import RunSettings

MACHINE = MachineProfile(
    host="made up",
    device="cpu",
    threads=1,
    read_bytes_per_s=1e9,
    write_bytes_per_s=5e8,
    checksum_bytes_per_s=4e9,
    hash_bytes_per_s=2e9,
    dequantized_per_s=4e8,
    host_memory_bytes_per_s=2e10,
    memory_bytes_per_s=2e10,
    operation_s=4e-6,
    host_to_device_bytes_per_s=None,
    device_memory_bytes=None,
    network_bytes_per_s=1e8,
    matmul_flops_per_s={"float32": 1e11, "bfloat16": 2e11},
)
TOKENS = 16 * 64  # more than any linear of the tiny models has inputs


def told(
    model: Path, recipe: Path, machine: MachineProfile = MACHINE, workers: int = 1, sharing: int = 1
) -> RunForecast:
    settings = RunSettings(model, Path("output"), device="cpu", num_samples=16, sequence_length=64, chunk_tokens=256)
    job = prepare(load_recipe(str(recipe)), settings)
    layers = estimate(job).layers
    return predict(job, layers, machine, Schedule(0, len(layers), workers, 4), sharing)


def test_a_forward_pass_takes_two_operations_for_each_weight_and_token(tiny: Tiny) -> None:
    weights = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 128 * 64
    pairs = 16 * 64 * 64  # of queries and keys: those behind a token are counted, though they are not computed
    expected = 2 * TOKENS * weights + pairs * 64 * (2 + 2)
    assert told(tiny.model, tiny.recipe).flops["forward"] == NUM_LAYERS * expected


def test_of_experts_only_those_that_a_token_is_sent_to_are_counted(tmp_path: Path, tiny: Tiny) -> None:
    few, many = (told(tiny_checkpoint("mixtral", tmp_path / str(n), num_local_experts=n), tiny.recipe) for n in (4, 8))
    router = 2 * TOKENS * 64 * 4 * len(few.layers)
    assert many.flops["forward"] == pytest.approx(few.flops["forward"] + router)
    assert many.flops["round"] > 1.3 * few.flops["round"]


def test_gram_matrices_are_counted_up_to_the_end_of_the_diagonals_block(tiny: Tiny) -> None:
    widths = (64, 64, 64, 128)  # of the inputs of q, o, gate and down
    expected = sum(2 * TOKENS * width * width for width in widths)  # all are narrower than a block
    assert told(tiny.model, tiny.recipe).flops["statistics"] == NUM_LAYERS * expected


def test_the_time_of_a_run_is_that_of_its_simulation(tiny: Tiny) -> None:
    found = told(tiny.model, tiny.recipe, workers=2)
    assert found.result == simulate(Schedule(0, NUM_LAYERS, 2, 4), found.times)
    alone = told(tiny.model, tiny.recipe)
    computing = sum(alone.seconds[stage] for stage in ("forward", "statistics", "search", "check", "round"))
    assert alone.result.makespan_s >= computing
    assert alone.times.chunk_s * 4 + alone.times.search_s == pytest.approx(computing / NUM_LAYERS)
    assert found.times.transfer_s == 256 * 64 * 2 / 1e8


Change = Callable[[MachineProfile], MachineProfile]
FASTER: dict[str, tuple[str, Change]] = {
    "products": ("search", lambda m: replace(m, matmul_flops_per_s={"float32": 4e11, "bfloat16": 4e11})),
    "memory": ("search", lambda m: replace(m, memory_bytes_per_s=1e12)),
    "operations": ("round", lambda m: replace(m, operation_s=1e-7)),
    "reading": ("read", lambda m: replace(m, read_bytes_per_s=1e11)),
    "writing": ("write", lambda m: replace(m, write_bytes_per_s=1e11)),
}


@pytest.mark.parametrize("what", FASTER)
def test_a_machine_that_is_faster_at_something_needs_less_time_and_never_more(tiny: Tiny, what: str) -> None:
    stage, change = FASTER[what]
    before, after = told(tiny.model, tiny.recipe), told(tiny.model, tiny.recipe, change(MACHINE))
    assert after.seconds[stage] < before.seconds[stage]
    assert all(after.seconds[other] <= before.seconds[other] for other in before.seconds)
    assert after.flops == before.flops


def test_workers_of_one_machine_share_its_disk_and_need_no_network(tiny: Tiny) -> None:
    apart, together = (told(tiny.model, tiny.recipe, workers=2, sharing=sharing) for sharing in (1, 2))
    assert together.times.read_s > 1.5 * apart.times.read_s
    assert together.times.transfer_s < apart.times.transfer_s
    assert together.times.search_s == apart.times.search_s


def profile(folder: Path, **changes: Any) -> Path:
    file = folder / "machine.json"
    replace(MACHINE, **changes).save(file)
    return file


def test_plan_tells_times_with_a_profile_and_simulates_with_them(tiny: Tiny, tmp_path: Path) -> None:
    options = ("--recipe", tiny.recipe, "--num-samples", 8, "--seq-len", 32, "--workers", 2)
    command = ("plan", tiny.model, *options, "--profile", profile(tmp_path))
    plan = json.loads(awqdist(*command, "--simulate", "--json").stdout)
    assert plan["forecast"]["makespan_s"] == plan["simulation"]["makespan_s"] > 0
    assert plan["forecast"]["times"] == plan["simulation"]["times"]
    given = json.loads(awqdist(*command, "--simulate", "--search-seconds", 7, "--json").stdout)
    assert given["simulation"]["times"] == {**plan["simulation"]["times"], "search_s": 7}
    shown = awqdist(*command).stdout
    assert "Predicted for cpu" in shown
    assert "with 2 workers" in shown
    assert "is not a machine profile" in awqdist(*command[:-1], tiny.text).error_line()


def test_a_profile_of_a_gpu_plans_for_one_that_is_not_here(tiny: Tiny, tmp_path: Path) -> None:
    file = profile(tmp_path, device="some GPU", host_to_device_bytes_per_s=1e10, device_memory_bytes=1000)
    command = ("plan", tiny.model, "--recipe", tiny.recipe, "--profile", file)
    plan = json.loads(awqdist(*command, "--json").stdout)
    assert plan["estimate"]["peak_device_bytes"] > 1000
    assert asdict(MachineProfile.load(file))["device"] == plan["forecast"]["machine"] == "some GPU"
    assert "does not fit: the largest layer takes" in awqdist(*command).stdout
    assert "does not fit" not in awqdist(*command, "--device", "cpu").stdout


@pytest.mark.slow
def test_the_readmes_table_says_what_plan_says() -> None:
    """One row of it; `tests/benchmarks/plan_table.py` writes all."""
    assert f"\n{row('Llama-3.1-405B')}\n" in (CONFIGS.parent / "awqdist" / "plan" / "README.md").read_text()


@pytest.mark.slow
def test_all_rows_of_the_readmes_table_say_what_plan_says() -> None:
    assert "\n".join(lines()) in (CONFIGS.parent / "awqdist" / "plan" / "README.md").read_text()
