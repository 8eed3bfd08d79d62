"""What the tests of checkpoints share that hold all experts of a block in one tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from awqdist import AWQModifier, GPTQModifier, load_recipe, oneshot
from awqdist.checkpoint.index import CheckpointIndex
from awqdist.checkpoint.reader import Reading, read_tensors
from awqdist.layer.records import RunSummary
from support.family_oracles import token_ids
from support.fused_oracles import Tensors

SAMPLES = token_ids(8)
_SCHEME = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}


def spoiled(source: Path, spoil: Callable[[Tensors], object]) -> Path:
    """The checkpoint after a function has changed its tensors."""
    tensors = load_file(source / "model.safetensors")
    spoil(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


def quantized(source: Path, output: Path) -> RunSummary:
    """By AWQ and GPTQ, in groups of 32, on SAMPLES."""
    groups = {"group_0": {"targets": ["Linear"], "weights": _SCHEME}}
    return oneshot(
        model=str(source),
        dataset=SAMPLES.tolist(),
        recipe=load_recipe([AWQModifier(), GPTQModifier(ignore=["lm_head"], config_groups=groups)]),
        output_dir=output,
        num_calibration_samples=SAMPLES.shape[0],
        max_seq_length=SAMPLES.shape[1],
        device="cpu",
    )


def read_split(index: CheckpointIndex) -> Reading:
    """Every tensor of a source, in the order in which they lie there."""
    return read_tensors(sorted(index.entries.values(), key=lambda entry: entry.start))
