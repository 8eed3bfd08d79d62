"""The Python API: `quantize` for folders and hub ids, `oneshot` under llm-compressor's names."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from awqdist.backends.local import run_local
from awqdist.calibration.text import load_calibration
from awqdist.checkpoint.hub import model_folder
from awqdist.errors import CheckpointError
from awqdist.model import registry
from awqdist.recipe import AWQMapping, MappingPattern, Recipe, load_recipe
from awqdist.recipe.settings import RunSettings
from awqdist.run.events import Emit, Event
from awqdist.run.job import prepare
from awqdist.run.records import RunSummary


def quantize(
    recipe: Recipe, settings: RunSettings, calibration: Any, *, tokenizer: Any = None, emit: Emit | None = None
) -> RunSummary:
    """Quantizes the checkpoint `settings.model` into `settings.output`; the same call again resumes an interrupted run.

    calibration: whatever `load_calibration` takes; tokenizer: the model's own if None; emit: is given every event.
    Raises AwqdistError for bad input, before any tensor is read wherever that is possible.
    """
    job = prepare(recipe, settings)
    tokenizer = tokenizer or load_tokenizer(settings.model)
    samples = load_calibration(
        calibration, tokenizer, settings.num_samples, settings.sequence_length, settings.seed
    )
    return run_local(job, samples, emit or _ignore)


def oneshot(
    model: Any,
    dataset: Any,
    recipe: Any = None,
    output_dir: str | Path = "quantized",
    *,
    num_calibration_samples: int = 128,
    max_seq_length: int = 512,
    tokenizer: Any = None,
    **settings: Any,
) -> RunSummary:
    """Quantizes `model` into `output_dir`.

    model: a folder, a hub id or a transformers PreTrainedModel (which is left unchanged; its tokenizer is found by its name, or
    given); dataset: a text file, a hub dataset, a datasets.Dataset, a list of texts or of token-id lists; recipe: modifiers, a preset
    name, a YAML file or YAML text; settings: further fields of `RunSettings`. Raises AwqdistError for bad input.
    """
    built = load_recipe(recipe)
    in_memory = hasattr(model, "save_pretrained")
    with tempfile.TemporaryDirectory() if in_memory else nullcontext("") as folder:
        if in_memory:
            tokenizer = tokenizer or load_tokenizer(model.config._name_or_path)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        source = Path(folder) if in_memory else model_folder(str(model))
        run = RunSettings(
            source, Path(output_dir), num_samples=num_calibration_samples, sequence_length=max_seq_length
        )
        return quantize(built, replace(run, **settings), dataset, tokenizer=tokenizer)


def register_mappings(architecture: str, mappings: Sequence[AWQMapping]) -> None:
    """Makes `mappings` the default of an architecture (a class name, as in config.json's `architectures`)."""
    patterns = [MappingPattern(m.smooth_layer, tuple(m.balance_layers)) for m in mappings]
    registry.register_mappings(architecture, patterns)


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a folder or hub id. Raises CheckpointError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # transformers raises many kinds for a missing or broken tokenizer
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"no tokenizer can be loaded from {model} ({reason}); put its files next to the model") from None


def _ignore(event: Event) -> None:
    """For callers who do not listen."""
