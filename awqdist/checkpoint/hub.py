"""A model's folder, from a local path or a Hugging Face hub id."""

from __future__ import annotations

import re
from pathlib import Path

from awqdist.checkpoint.source import holds_weights
from awqdist.errors import CheckpointError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*"]
_PICKLES = "pytorch_model*.bin"


def model_folder(model: str) -> Path:
    """The folder of `model`; a hub id is downloaded, or taken from the cache. Raises CheckpointError."""
    folder = Path(model).expanduser()
    if folder.exists():
        if not folder.is_dir():
            raise CheckpointError(f"{model} is a file; give the folder of a model")
        return folder
    _check_hub_id(model)
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(model, allow_patterns=_PATTERNS))
        if not any(found.glob("*.safetensors")):  # many models hold both, and one is enough
            found = Path(snapshot_download(model, allow_patterns=[*_PATTERNS, _PICKLES]))
        return found
    except Exception as error:  # the hub client raises many kinds: offline, not found, gated, interrupted
        raise _not_given(model, error) from None


def described(model: str) -> Path:
    """What is enough to plan with `model`: a folder that holds weights, else its config.json, of a hub id downloaded or from the cache.

    model: a folder, a config.json, or a hub id. Raises CheckpointError.
    """
    place = Path(model).expanduser()
    if place.is_dir():
        file = place / "config.json"
        return file if file.is_file() and not holds_weights(place) else place
    if place.exists():
        if place.suffix != ".json":
            raise CheckpointError(f"{model} is a file; give the folder of a model, or a config.json")
        return place
    _check_hub_id(model)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json"))
    except Exception as error:
        raise _not_given(model, error) from None


def _check_hub_id(model: str) -> None:
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"model folder not found: {model}; give an existing folder or a hub id such as org/name")


def _not_given(model: str, error: Exception) -> CheckpointError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(
        f"{model} is neither a folder here nor a model that the hub gives ({reason}); check the name and the network,"
        " or download it elsewhere and give its folder"
    )
