"""The output folder: whether a run may use it, the lock on it, and what `--overwrite` removes.

All refusals come before anything is written. A folder with an index holds a finished model. A folder with the state folder and no
index holds an unfinished run. Any other folder that is not empty is never touched.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

from awqdist.checkpoint.index import INDEX_FILE, SINGLE_FILE
from awqdist.checkpoint.writer import output_error
from awqdist.errors import OutputError
from awqdist.run.log import STATE_FOLDER
from awqdist.settings import RunSettings

LOCK_FILE = "lock"
_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set for what `ray job submit` runs
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "added_tokens.json",
    "chat_template.*",
    "events.jsonl",  # of awqdist 0.1
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "report.html*",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)  # what a model's folder holds beside its tensors


def is_finished(output: Path) -> bool:
    """Returns whether the folder holds a model that loaders accept."""
    return (output / INDEX_FILE).is_file() or (output / SINGLE_FILE).is_file()


def check_output(settings: RunSettings) -> None:
    """Raises OutputError unless a run may begin or resume in the output folder. Writes nothing."""
    output = settings.output
    if not output.is_absolute() and _RAY_JOB in os.environ:
        raise OutputError(f"give {output} as an absolute path: Ray removes the working directory of a job")
    try:
        if output.exists() and not output.is_dir():
            raise OutputError(f"{output} is a file; give a folder")
        if output.resolve() == settings.model.resolve():
            raise OutputError(f"the output folder is the model's own folder, {output}; give another")
        if not output.is_dir() or not any(output.iterdir()):
            return
        if is_finished(output):
            if not settings.overwrite:
                raise OutputError(
                    f"{output} holds a finished model already; use --overwrite to replace it, or another folder"
                )
        elif not (output / STATE_FOLDER).is_dir():
            raise OutputError(f"{output} is not empty and was not begun by awqdist; give an empty or new folder")
    except OSError as error:
        raise output_error(output, error) from error


def lock_output(output: Path) -> int:
    """Locks the folder, which is made if need be, and returns the lock's descriptor.

    The lock ends with `os.close`, or with the process, however that dies. Raises OutputError if another process holds it.
    """
    folder = output / STATE_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise output_error(folder, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise OutputError(
                f"{output} is in use by another running awqdist; wait for it or choose another folder"
            ) from None
        raise output_error(folder / LOCK_FILE, error) from error
    return lock


def check_free(output: Path) -> None:
    """Raises OutputError if another process holds the folder now; called before a long preparation."""
    os.close(lock_output(output))


def remove_model(output: Path) -> None:
    """Removes the model or the unfinished run in a locked folder, and leaves every other file alone.

    The index goes first, so that no loader accepts the rest.
    """
    weights = [
        INDEX_FILE,
        SINGLE_FILE,
        *_indexed_files(output),
        "model-layer-*.safetensors*",
        "model-outside.safetensors*",
    ]
    try:
        for pattern in (*weights, *_COMPANIONS):
            for file in output.glob(pattern):
                file.unlink(missing_ok=True)
        for file in sorted((output / STATE_FOLDER).iterdir()):
            if file.is_dir():  # an offload folder that a killed run left behind
                shutil.rmtree(file)
            elif file.name != LOCK_FILE:
                file.unlink()
    except OSError as error:
        raise output_error(output, error) from error


def _indexed_files(output: Path) -> list[str]:
    """Returns the tensor files that the index names, as far as they lie in the folder itself."""
    try:
        names = set(json.loads((output / INDEX_FILE).read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []
    return sorted(name for name in names if isinstance(name, str) and name == Path(name).name and "*" not in name)
