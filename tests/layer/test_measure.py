"""What a layer is measured to take is what torch counts while it is really worked on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.family_oracles import token_ids
from support.tiny_llama import RECIPE
from support.tiny_models import tiny_checkpoint
from torch.utils.flop_counter import FlopCounterMode

from awqdist.layer.meter import FLOP_FORMULAS, Meter, round_block_kernels
from awqdist.quant.factor import inverse_cholesky
from awqdist.quant.gptq import round_block
from awqdist.recipe import load_recipe
from awqdist.run.job import Job, prepare
from awqdist.run.memory import layer_cost
from awqdist.run.schedule import Schedule
from awqdist.run.worker import Assignment, run_worker
from awqdist.settings import RunSettings

SAMPLES = token_ids(8)


def with_tensors(formula: Callable[..., int]) -> Callable[..., int]:
    """Lets torch's counter give a formula the tensors themselves."""

    def count(*args: object, **kwargs: object) -> int:
        return formula(*args, **kwargs)

    count._get_raw = True  # type: ignore[attr-defined]
    return count


def block_flops(work: torch.Tensor, *args: object, **kwargs: object) -> int:
    return sum(kernel.flops * count for kernel, count in round_block_kernels(*work.shape).items())


FORMULAS = {packet: with_tensors(formula) for packet, formula in FLOP_FORMULAS.items()}
FORMULAS[torch.ops.awqdist.round_block] = with_tensors(block_flops)


class NoTransport:
    def check(self) -> None:
        pass


def prepared(folder: Path, family: str) -> Job:
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "output" / ".awqdist").mkdir(parents=True)
    length = SAMPLES.shape[1]
    settings = RunSettings(
        tiny_checkpoint(family, folder / "model", torch.float32),
        folder / "output",
        device="cpu",
        num_samples=SAMPLES.shape[0],
        sequence_length=length,
        chunk_tokens=2 * length,
        threads=1,
    )
    return prepare(load_recipe(str(folder / "recipe.yaml")), settings)


def test_products_of_a_dense_model_are_those_that_torch_counts(tmp_path: Path) -> None:
    job = prepared(tmp_path, "llama")
    num_layers = len(job.plan.tasks)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as one:
        schedule = Schedule(0, num_layers, 1, SAMPLES.shape[0] // 2)
        run_worker(job, SAMPLES, Assignment(0, schedule, {}, None), NoTransport(), lambda event: None)  # type: ignore[arg-type]
    kinds = ("float32", "tfloat32", "bfloat16", "float16", "attention")
    measured = 0
    for plan in job.plan.tasks:
        kernels = [item for stage in layer_cost(job, plan).kernels.values() for item in stage.items()]
        measured += sum(kernel.flops * count for kernel, count in kernels if kernel.kind in kinds)
    assert measured > 0
    assert one.get_total_flops() == pytest.approx(
        measured, rel=0.02
    )  # embedding, and what weighs outputs, are not measured


def test_a_function_that_is_repeated_counts_and_holds_as_much_each_time() -> None:
    def measured(times: int) -> tuple[int, int, int]:
        with Meter() as meter:
            kept = [
                inverse_cholesky(torch.empty(600, 600), torch.empty(600, dtype=torch.int64), 0.1) for _ in range(times)
            ]
            kernels = meter.total("forward")
            assert len(kept) == times
            now, peak = meter.memory.now["cpu"], meter.memory.peak["cpu"]
        return sum(kernel.flops * count for kernel, count in kernels.items()), now, peak - now

    flops, now, transient = measured(1)
    assert measured(3) == (3 * flops, 3 * now, transient)


def test_the_formula_of_a_block_of_inputs_is_what_its_code_does() -> None:
    sizes = (2, 70, 24)
    tensors = [torch.rand(sizes), torch.eye(70).repeat(2, 1, 1), torch.ones(sizes), torch.zeros(sizes)]
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counted:
        round_block._init_fn(*tensors, 15.0)  # type: ignore[attr-defined]
    with Meter() as meter:
        round_block(*(torch.empty(t.shape) for t in tensors), 15.0)
        found = meter.total("forward")
    assert sum(kernel.flops * count for kernel, count in found.items()) == counted.get_total_flops()
