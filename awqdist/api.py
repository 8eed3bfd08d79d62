"""The Python API: `quantize` for folders and hub ids, `oneshot` under llm-compressor's names."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from awqdist.backends.local import run_local
from awqdist.backends.placement import choose_backend
from awqdist.calibration.text import is_text, load_calibration
from awqdist.checkpoint.hub import model_folder
from awqdist.errors import CalibrationError, CheckpointError
from awqdist.layer.records import RunSummary
from awqdist.model import families, skeleton
from awqdist.plan.estimate import chunk_budget
from awqdist.recipe import AWQMapping, MappingPattern, Recipe, load_recipe
from awqdist.run.events import Listen, Message
from awqdist.run.job import Job, prepare
from awqdist.run.output import check_output
from awqdist.settings import Placement, RunSettings


def quantize(
    recipe: Recipe,
    settings: RunSettings,
    calibration: Any,
    *,
    tokenizer: Any = None,
    listen: Listen | None = None,
    placement: Placement | None = None,
) -> RunSummary:
    """Quantizes the checkpoint `settings.model` into `settings.output`; the same call again resumes an interrupted run.

    calibration: whatever `load_calibration` takes; tokenizer: for texts, the model's own if None; listen: is given every message.
    placement: where the workers run; under torchrun every rank calls this, and all get the summary.
    Raises AwqdistError for bad input, before any tensor is read wherever that is possible.
    """
    placement, listen = placement or Placement(), listen or _ignore

    def begin() -> tuple[Job, Tensor]:
        check_output(settings)
        job = prepare(recipe, settings)
        samples = _samples(job, calibration, tokenizer)
        chunk_budget(job)  # refuses too little memory
        return job, samples

    match choose_backend(placement):
        case "ray":
            from awqdist.backends.ray import run_ray

            return run_ray(*begin(), placement, listen)
        case "torchrun":
            from awqdist.backends.torchrun import run_torchrun

            return run_torchrun(begin, recipe, settings, listen)
        case _:
            return run_local(*begin(), listen)


def _samples(job: Job, calibration: Any, tokenizer: Any) -> Tensor:
    """The calibration samples (N, L) of a job."""
    settings = job.settings
    if tokenizer is None and is_text(calibration):
        tokenizer = load_tokenizer(settings.model)
    samples = load_calibration(calibration, tokenizer, settings.num_samples, settings.sequence_length, settings.seed)
    _check_tokens(samples, job)
    return samples


def oneshot(
    model: Any,
    dataset: Any,
    recipe: Any = None,
    output_dir: str | Path = "quantized",
    *,
    num_calibration_samples: int = 128,
    max_seq_length: int = 512,
    tokenizer: Any = None,
    moe_calibrate_all_experts: bool = False,
    **settings: Any,
) -> RunSummary:
    """Quantizes `model` into `output_dir`.

    model: a folder, a hub id or a transformers PreTrainedModel (which is left unchanged; its tokenizer is found by its name, or
    given); dataset: a text file, a hub dataset, a datasets.Dataset, a list of texts or of token-id lists; recipe: modifiers, a preset
    name, a YAML file or YAML text; moe_calibrate_all_experts: `RunSettings.all_experts`; settings: further fields of `RunSettings`.
    Raises AwqdistError for bad input.
    """
    built = load_recipe(recipe)
    in_memory = hasattr(model, "save_pretrained")
    with tempfile.TemporaryDirectory() if in_memory else nullcontext("") as folder:
        if in_memory:
            model.save_pretrained(folder)
            tokenizer = tokenizer or _tokenizer_of(model, required=is_text(dataset))
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        source = Path(folder) if in_memory else model_folder(str(model))
        run = RunSettings(
            source,
            Path(output_dir),
            num_samples=num_calibration_samples,
            sequence_length=max_seq_length,
            all_experts=moe_calibrate_all_experts,
        )
        return quantize(built, replace(run, **settings), dataset, tokenizer=tokenizer)


def register_mappings(architecture: str, mappings: Sequence[AWQMapping]) -> None:
    """Makes `mappings` the default of an architecture (a class name, as in config.json's `architectures`)."""
    patterns = [MappingPattern(m.smooth_layer, tuple(m.balance_layers)) for m in mappings]
    families.register_mappings(architecture, patterns)


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a folder or hub id. Raises CheckpointError."""
    try:
        return skeleton.load_tokenizer(model)
    except Exception as error:  # transformers raises many kinds for a missing or broken tokenizer
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"no tokenizer can be loaded from {model} ({reason}); put its files next to the model"
        ) from None


def _tokenizer_of(model: Any, *, required: bool) -> Any:
    """The tokenizer that the name of an in-memory model leads to; None if there is none and none is required."""
    name = str(getattr(model.config, "_name_or_path", ""))
    try:
        if not name:
            raise CheckpointError("the model in memory does not say where it was loaded from; give tokenizer=")
        return load_tokenizer(name)
    except CheckpointError:
        if required:
            raise
        return None


def _check_tokens(samples: Tensor, job: Job) -> None:
    vocabulary = job.skeleton.model.config.get_text_config(decoder=True).vocab_size
    highest = int(samples.max())
    if highest >= vocabulary or int(samples.min()) < 0:
        raise CalibrationError(
            f"the calibration samples hold token {highest if highest >= vocabulary else int(samples.min())}, the model knows"
            f" 0 to {vocabulary - 1}; use the model's own tokenizer"
        )


def _ignore(message: Message) -> None:
    """For callers who do not listen."""
