"""The Python functions that quantize: `quantize` from settings, `oneshot` with the argument names of llm-compressor."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from awqdist.backends.local import choose_backend, run_local
from awqdist.calibration.text import is_text, load_calibration
from awqdist.checkpoint.sources import model_folder
from awqdist.errors import CalibrationError, CheckpointError
from awqdist.layer.records import RunSummary
from awqdist.model import families
from awqdist.model.skeleton import load_tokenizer
from awqdist.recipe import AWQMapping, MappingPattern, Recipe, load_recipe
from awqdist.run.events import Listen
from awqdist.run.job import Job, prepare
from awqdist.run.memory import chunk_budget
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
    """Quantizes the checkpoint `settings.model` into `settings.output`. The same call resumes a run that was interrupted.

    Args:
        recipe: What is done to the weights, from `load_recipe`.
        settings: How the run is carried out: folders, number of samples, device, memory limits.
        calibration: A text file, a hub dataset NAME[:CONFIG[:SPLIT]], a `datasets.Dataset`, a list of texts or of token-id lists.
        tokenizer: Used for texts. Default: the model's own.
        listen: Called with every message of the run, such as `LayerFinished`; the calls never overlap.
        placement: Where the workers run. Under torchrun every rank makes the same call, and all get the summary.

    Returns:
        The records of all layers: errors before and after smoothing, errors as written, times in seconds, sizes in bytes.

    Raises:
        AwqdistError: Bad input, found before any tensor is read wherever that is possible; or numbers that are not finite.

    Example:
        >>> from pathlib import Path
        >>> from awqdist import RunSettings, load_recipe, quantize
        >>> from awqdist.demo import calibration_text, demo_folder
        >>> settings = RunSettings(demo_folder(), Path("demo-w4"), num_samples=8, sequence_length=64, device="cpu")
        >>> summary = quantize(load_recipe("default"), settings, calibration_text())
        >>> len(summary.layers)
        3
        >>> Path("demo-w4", "config.json").is_file()
        True
    """
    placement, listen = placement or Placement(), listen or (lambda message: None)

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
    """Returns the calibration samples (N, L) of a job, int64. Raises CalibrationError for tokens that the model does not know."""
    settings = job.settings
    if tokenizer is None and is_text(calibration):
        tokenizer = load_tokenizer(settings.model)
    samples = load_calibration(calibration, tokenizer, settings.num_samples, settings.sequence_length, settings.seed)
    vocabulary = job.skeleton.model.config.get_text_config(decoder=True).vocab_size
    lowest, highest = int(samples.min()), int(samples.max())
    if highest >= vocabulary or lowest < 0:
        raise CalibrationError(
            f"the calibration samples hold token {highest if highest >= vocabulary else lowest}, the model knows"
            f" 0 to {vocabulary - 1}; use the model's own tokenizer"
        )
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
    """Quantizes `model` into the folder `output_dir`, with the argument names of llm-compressor.

    Args:
        model: A folder, a hub id, or a transformers `PreTrainedModel`, which is left unchanged.
        dataset: A text file, a hub dataset NAME[:CONFIG[:SPLIT]], a `datasets.Dataset`, a list of texts or of token-id lists.
        recipe: Modifiers, the name of a preset, a YAML file or YAML text. Default: the preset "default".
        output_dir: The folder to write. The same call resumes a run that was interrupted.
        num_calibration_samples: Number of samples that are taken from `dataset`.
        max_seq_length: Tokens per sample.
        tokenizer: Used for texts. Default: the one that belongs to the model, found by its name if it is in memory.
        moe_calibrate_all_experts: Accepted for callers of llm-compressor. True gives a warning and changes nothing.
        **settings: Other fields of `RunSettings`, such as `device` or `gpu_memory`.

    Returns:
        The records of all layers, as `quantize` does.

    Raises:
        AwqdistError: Bad input, or numbers that are not finite.

    Example:
        >>> from awqdist import AWQModifier, GPTQModifier, oneshot
        >>> from awqdist.demo import calibration_text, demo_folder
        >>> summary = oneshot(
        ...     model=demo_folder(),
        ...     dataset=calibration_text(),
        ...     recipe=[AWQModifier(n_grid=4), GPTQModifier(scheme="W4A16_ASYM", ignore=["lm_head"])],
        ...     output_dir="demo-w4",
        ...     num_calibration_samples=8,
        ...     max_seq_length=64,
        ... )
        >>> summary.ignored
        ('lm_head',)
    """
    if moe_calibrate_all_experts:
        warnings.warn(
            "moe_calibrate_all_experts is not needed and changes nothing: every expert is fitted to its own tokens blended with"
            " a prior of all tokens",
            stacklevel=2,
        )
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
        )
        return quantize(built, replace(run, **settings), dataset, tokenizer=tokenizer)


def register_mappings(architecture: str, mappings: Sequence[AWQMapping]) -> None:
    """Makes `mappings` the default of an architecture for the rest of this process.

    Args:
        architecture: A class name, as in `architectures` of config.json.
        mappings: What is smoothed, in order.
    """
    patterns = [MappingPattern(m.smooth_layer, tuple(m.balance_layers)) for m in mappings]
    families.register_mappings(architecture, patterns)


def _tokenizer_of(model: Any, *, required: bool) -> Any:
    """Returns the tokenizer found by the name of an in-memory model; None if there is none and none is required."""
    name = str(getattr(model.config, "_name_or_path", ""))
    try:
        if not name:
            raise CheckpointError("the model in memory does not say where it was loaded from; give tokenizer=")
        return load_tokenizer(name)
    except CheckpointError:
        if required:
            raise
        return None
