"""Finds the folder of a model, or its config.json, from a local path or a Hugging Face hub id."""

from __future__ import annotations

import re
from pathlib import Path

from awqdist.checkpoint.index import holds_weights
from awqdist.errors import CheckpointError, first_line

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*"]
_PICKLES = "pytorch_model*.bin"


def model_folder(model: str) -> Path:
    """Returns the folder of a model; a hub id is downloaded, or taken from the cache.

    Raises:
        CheckpointError: there is no such folder, and the hub does not provide it.
    """
    place = _local(model)
    if place is not None:
        if not place.is_dir():
            raise CheckpointError(f"{model} is a file; give the folder of a model")
        return place
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(model, allow_patterns=_PATTERNS))
        if not any(found.glob("*.safetensors")):  # many models hold both, and one is enough
            found = Path(snapshot_download(model, allow_patterns=[*_PATTERNS, _PICKLES]))
        return found
    except Exception as error:  # the hub client raises many kinds: offline, not found, gated, interrupted
        raise _not_provided(model, error) from None


def resolve_config(model: str) -> Path:
    """Returns what `plan` needs of a model: a folder that holds weights, otherwise its config.json alone.

    Args:
        model: a folder, a config.json, or a hub id, whose config.json is downloaded or taken from the cache.

    Raises:
        CheckpointError: there is no such model.
    """
    place = _local(model)
    if place is not None:
        if place.is_dir():
            file = place / "config.json"
            return file if file.is_file() and not holds_weights(place) else place
        if place.suffix != ".json":
            raise CheckpointError(f"{model} is a file; give the folder of a model, or a config.json")
        return place
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json"))
    except Exception as error:
        raise _not_provided(model, error) from None


def _local(model: str) -> Path | None:
    """Returns the path of a model on this machine, or None for a hub id. Raises CheckpointError for anything else."""
    place = Path(model).expanduser()
    if place.exists():
        return place
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise CheckpointError(f"model folder not found: {model}; give an existing folder or a hub id such as org/name")
    return None


def _not_provided(model: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{model} is neither a folder here nor a model that the hub gives ({first_line(error)}); check the name and the network,"
        " or download it elsewhere and give its folder"
    )
