"""A run before its first layer: source opened and checked, plan made, output folder looked at. All refusals that need no tensor happen here."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from awqdist.checkpoint.index import INDEX_FILE, SINGLE_FILE, CheckpointIndex, read_index
from awqdist.errors import OutputError
from awqdist.export.formats import Format, output_format
from awqdist.model.skeleton import Skeleton, build_skeleton, read_config
from awqdist.recipe import Recipe
from awqdist.recipe.settings import RunSettings
from awqdist.run.device import choose_device
from awqdist.run.journal import STATE_FOLDER
from awqdist.run.plan import Plan, make_plan

_LIBRARIES = ("awqdist", "torch", "transformers", "compressed-tensors")


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a worker needs to know of a run."""

    plan: Plan
    skeleton: Skeleton
    index: CheckpointIndex
    recipe: Recipe
    settings: RunSettings
    format: Format
    device: torch.device


def prepare(recipe: Recipe, settings: RunSettings) -> Job:
    """Opens the source and plans the run. Raises AwqdistError for whatever is wrong with either; reads headers only."""
    layout = output_format(settings.format)
    layout.check(recipe)
    device = choose_device(settings.device)
    index = read_index(settings.model)
    skeleton = build_skeleton(read_config(settings.model), index.entries)
    return Job(make_plan(skeleton, index, recipe), skeleton, index, recipe, settings, layout, device)


def claim_output(settings: RunSettings) -> None:
    """Looks at the output folder before anything is written: a finished model or somebody else's files are refused, or, with
    `overwrite`, removed as far as they are a model's."""
    output = settings.output
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; give a folder")
    if output.resolve() == settings.model.resolve():
        raise OutputError(f"the output folder is the model's own folder, {output}; give another")
    if not output.is_dir() or not any(output.iterdir()):
        return
    finished = (output / INDEX_FILE).is_file() or (output / SINGLE_FILE).is_file()
    unfinished = (output / STATE_FOLDER).is_dir() and not finished
    if settings.overwrite:
        _remove_model(output)
    elif finished:
        raise OutputError(f"{output} holds a finished model already; use --overwrite to replace it, or another folder")
    elif not unfinished:
        raise OutputError(f"{output} is not empty and was not begun by awqdist; give an empty or new folder")


def fingerprint(job: Job, samples: Tensor) -> dict[str, str]:
    """Everything that decides the bytes of the result, each under a name that a user understands."""
    return {
        "recipe": job.recipe.to_yaml(),
        "format": job.format.name,
        "source": job.index.fingerprint()[:16],
        "source config": _hash((job.settings.model / "config.json").read_bytes()),
        "calibration samples": f"{tuple(samples.shape)} {_hash(samples.numpy().tobytes())}",
        "chunk tokens": str(job.settings.chunk_tokens),
        "device": job.device.type,
        "versions": json.dumps({name: version(name) for name in _LIBRARIES}),
    }


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _remove_model(output: Path) -> None:
    """The index goes first: from then on the folder is no model."""
    for file in [output / INDEX_FILE, *output.glob("*.safetensors*"), *output.glob("*.json"), output / "report.html"]:
        file.unlink(missing_ok=True)
    shutil.rmtree(output / STATE_FOLDER, ignore_errors=True)
