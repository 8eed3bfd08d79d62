"""Compares the memory that a run is measured to take on tensors without data with what it really takes, on a CPU.

    python tests/benchmarks/bench_measure.py [MODEL ...]

Without a model: one layer each of a Llama of hidden 2048 and of a narrow DeepSeek-V3 with 64 experts, with random weights.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.tiny_llama import RECIPE, TEXT, write_llama, write_tokenizer
from support.tiny_models import tiny_checkpoint

from awqdist.plan.memory import estimate
from awqdist.recipe import load_recipe
from awqdist.run.job import prepare
from awqdist.settings import RunSettings
from awqdist.units import show_bytes

NUM_SAMPLES, LENGTH = 64, 128


def peak_of(command: list[str]) -> int:
    """Returns the most bytes that were resident in a process."""
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        while child.poll() is None:
            status = Path(f"/proc/{child.pid}/status").read_text()
            peak = max([peak, *(1024 * int(kb) for kb in re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE))])
            time.sleep(0.02)
    return peak


def compare(model: Path, recipe: Path, text: Path, output: Path) -> str:
    """Returns a line with both figures."""
    settings = RunSettings(model, output, device="cpu", num_samples=NUM_SAMPLES, sequence_length=LENGTH)
    measured = estimate(prepare(load_recipe(str(recipe)), settings)).peak_host_bytes
    command = [sys.executable, "-m", "awqdist", "quantize", str(model), str(output), "--recipe", str(recipe)]
    command += [
        "--calibration",
        str(text),
        "--num-samples",
        str(NUM_SAMPLES),
        "--seq-len",
        str(LENGTH),
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    real = peak_of([*command, "--no-report"])
    difference = f"{measured / real - 1:+.1%}"
    return f"{model.name}: measured {show_bytes(measured)}, real {show_bytes(real)}, {difference}"


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder, models = Path(place), [Path(name) for name in sys.argv[1:]]
        if not models:
            sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 1}
            write_llama(folder / "llama", num_attention_heads=16, num_key_value_heads=8, **sizes)
            tiny_checkpoint("deepseek-v3", folder / "deepseek", torch.bfloat16, hidden_size=256, n_routed_experts=64)
            models = [folder / "llama", folder / "deepseek"]
            for model in models:
                write_tokenizer(model)
        text, recipe = folder / "text.txt", folder / "recipe.yaml"
        text.write_text(TEXT * 60)
        recipe.write_text(RECIPE)
        for number, model in enumerate(models):
            print(compare(model, recipe, text, folder / f"output-{number}"), flush=True)


if __name__ == "__main__":
    main()
