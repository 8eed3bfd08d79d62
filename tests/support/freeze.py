"""Records hashes of what awqdist writes, and compares: byte-identity proves that a rebuilding changed nothing.

    python tests/support/freeze.py write hashes.json                    # on the code before
    python tests/support/freeze.py check hashes.json                    # on the code after; ends with 1 if anything differs
    python tests/support/freeze.py check hashes.json --legs local,torchrun,ray,plan,trained,gpu --only llama,gpt-oss

Hashes hold for one kind of machine and one set of library versions, so none are kept in the repository. The leg `gpu` runs `--device cuda`
with and without `--gpu-memory`, on a CUDA device or, with `--fake-cuda FOLDER`, on the module fake_cuda of that folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers.utils.logging import disable_progress_bar

from support.command_line import awqdist, model_files
from support.rings import Ring, ray_cluster, run
from support.tiny_llama import RECIPE, Tiny
from support.tiny_models import tiny_checkpoint, tiny_text

FAMILIES = (
    "llama",  # dense
    "phi3",  # fused qkv and gate_up
    "gemma2",  # (1 + w) norms, norms behind the blocks
    "opt",  # biases, LayerNorm
    "gpt-neox",  # interleaved qkv
    "mixtral",  # experts
    "qwen2-moe",  # shared experts with gates
    "deepseek-v3",  # MLA, a dense layer first
    "gpt-oss",  # experts in one tensor, interleaved, with biases
    "llama4",  # experts in one tensor, transposed
    "granitemoe",  # experts in one tensor, no transposition
    "qwen3-next",  # delta nets, layers for multi-token prediction
    "jamba",  # Mamba
    "qwen3-vl",  # multimodal
)
disable_progress_bar()
SHARED = Path(__file__).resolve().parents[3] / "shared"
TRAINED = {"wikillama-8m-outliers": 128, "wikideepseek-7m": 64}  # and the group size
LEGS = ("local", "plan", "torchrun", "ray", "trained", "gpu")
PRESETS = ("default", "awq")


def recipe_text(preset: str, group_size: int) -> str:
    """The recipe of a preset at a group size that tiny models have."""
    text = RECIPE if preset == "default" else RECIPE.replace("GPTQModifier", "QuantizationModifier")
    return text.replace("group_size: 32", f"group_size: {group_size}")


def hashes(output: Path) -> dict[str, str]:
    """SHA-256 of every file of an output folder that must be equal."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in model_files(output).items()}


class Freezer:
    """Runs the legs. folder: for models and outputs; families: those to run."""

    def __init__(self, folder: Path, families: tuple[str, ...], fake_cuda: Path | None) -> None:
        self._folder, self._families, self._fake_cuda = folder, families, fake_cuda
        (folder / "text.txt").write_text(tiny_text())
        for preset in PRESETS:
            (folder / f"{preset}.yaml").write_text(recipe_text(preset, 32))

    def leg(self, name: str) -> Iterator[tuple[str, dict[str, str] | str]]:
        """What a leg gives, by the name of each run."""
        if name == "trained":
            yield from self._trained()
        elif name == "ray":
            with ray_cluster() as cluster:
                cluster.add_node()
                cluster.add_node()
                yield from self._families_on(Ring("ray", 2, address=cluster.address))
        elif name == "torchrun":
            yield from self._families_on(Ring("torchrun", 2))
        else:
            for family, preset, tiny in self._cases():
                yield from getattr(self, f"_{name}")(family, preset, tiny)

    def _cases(self) -> Iterator[tuple[str, str, Tiny]]:
        for family in self._families:
            model = self._folder / "models" / family
            if not model.exists():
                tiny_checkpoint(family, model, torch.bfloat16)
            for preset in PRESETS:
                yield family, preset, Tiny(model, self._folder / "text.txt", self._folder / f"{preset}.yaml")

    def _output(self, *parts: str) -> Path:
        return Path(tempfile.mkdtemp(dir=self._folder)) / "-".join(parts)

    def _local(self, family: str, preset: str, tiny: Tiny) -> Iterator[tuple[str, dict[str, str]]]:
        output = self._output(family, preset)
        outcome = awqdist("quantize", tiny.model, output, *tiny.options(), "--threads", 1)
        assert outcome.code == 0, outcome.stderr
        yield f"{family} {preset}", hashes(output)

    def _plan(self, family: str, preset: str, tiny: Tiny) -> Iterator[tuple[str, str]]:
        options = ("--recipe", tiny.recipe, "--num-samples", 8, "--seq-len", 32, "--device", "cpu", "--json")
        outcome = awqdist("plan", tiny.model, *options)
        assert outcome.code == 0, outcome.stderr
        plan = outcome.stdout.replace(str(self._folder), "")
        yield f"plan {family} {preset}", hashlib.sha256(plan.encode()).hexdigest()

    def _families_on(self, ring: Ring) -> Iterator[tuple[str, dict[str, str]]]:
        for family, preset, tiny in self._cases():
            output = self._output(ring.backend, family, preset)
            outcome = run(ring, tiny, output)
            assert outcome.code == 0, outcome.stderr
            yield f"{family} {preset}", hashes(output)  # the names of the leg `local`: the bytes are the same

    def _trained(self) -> Iterator[tuple[str, dict[str, str]]]:
        for name, group_size in TRAINED.items():
            for preset in PRESETS:
                recipe = self._folder / f"{preset}-{group_size}.yaml"
                recipe.write_text(recipe_text(preset, group_size).replace("{n_grid: 4}", "{}"))
                output = self._output(name, preset)
                options = ("--calibration", SHARED / "text" / "calibration.txt", "--num-samples", 64, "--seq-len", 256)
                more = ("--recipe", recipe, "--threads", 1, "--progress", "json", "--no-report")
                outcome = awqdist("quantize", SHARED / "models" / name, output, *options, *more)
                assert outcome.code == 0, outcome.stderr
                yield f"{name} {preset}", hashes(output)

    def _gpu(self, family: str, preset: str, tiny: Tiny) -> Iterator[tuple[str, dict[str, str]]]:
        if self._fake_cuda is not None and str(self._fake_cuda) not in sys.path:
            sys.path.insert(0, str(self._fake_cuda))
            from fake_cuda import Fake  # type: ignore[import-not-found]

            Fake()
        for budget in ((), ("--gpu-memory", "2MB")):
            output = self._output("gpu", family, preset)
            outcome = awqdist("quantize", tiny.model, output, *tiny.options("--device", "cuda"), *budget)
            if budget and outcome.code == 2 and "gpu-memory" in outcome.stderr:
                continue  # its experts do not fit so little
            assert outcome.code == 0, outcome.stderr
            yield f"gpu {family} {preset}", hashes(output)


def differences(name: str, before: object, after: object) -> Iterator[str]:
    """Lines that say what differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for file in sorted({*before, *after}):
            if before.get(file) != after.get(file):
                yield f"{name}: {file} is {'missing' if file not in after else 'new' if file not in before else 'different'}"
    elif before != after:
        yield f"{name}: different"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["write", "check"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--legs", default="local,plan,trained", help=f"some of {','.join(LEGS)}")
    parser.add_argument("--only", default=",".join(FAMILIES), help="families, separated by commas")
    parser.add_argument("--fake-cuda", type=Path, help="folder of the module fake_cuda")
    given = parser.parse_args()
    known: dict[str, object] = json.loads(given.file.read_text()) if given.file.exists() else {}
    found = 0
    with tempfile.TemporaryDirectory(prefix="freeze") as folder:
        freezer = Freezer(Path(folder), tuple(given.only.split(",")), given.fake_cuda)
        for leg in given.legs.split(","):
            for name, result in freezer.leg(leg):
                if given.action == "write" and name not in known:
                    known[name] = result
                    continue
                lines = list(differences(f"{leg}: {name}", known.get(name), result))
                print("\n".join(lines) or f"{leg}: {name}: the same", flush=True)
                found += len(lines)
    if given.action == "write":
        given.file.write_text(json.dumps(known, indent=1, sort_keys=True))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
