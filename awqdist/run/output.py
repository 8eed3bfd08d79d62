"""The output folder: whether a run may use it, the lock on it, what `--overwrite` removes, and whether all workers see it.

All refusals come before anything is written. A folder with an index holds a finished model. A folder with the state folder and no
index holds an unfinished run. Any other folder that is not empty is never touched. Before workers start, the leader writes a
token into the folder; each worker reads it and answers.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from socket import gethostname

from awqdist.checkpoint.index import INDEX_FILE, SINGLE_FILE
from awqdist.checkpoint.writer import output_error
from awqdist.errors import OutputError
from awqdist.run.events import STATE_FOLDER
from awqdist.settings import RunSettings

_LOCK_FILE = "lock"
_PATIENCE_S = 10.0  # network file systems show new files late
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
        lock = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
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
        raise output_error(folder / _LOCK_FILE, error) from error
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
            elif file.name != _LOCK_FILE:
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


def offer_token(output: Path) -> str:
    """Writes a random token, as the leader, and returns it. Raises OutputError."""
    token = uuid.uuid4().hex
    _write_token(_token_file(output, token))
    return token


def answer_token(output: Path, token: str, worker: int) -> None:
    """Waits for the token, as a worker, and writes an answer. Raises OutputError if the folder is not the leader's."""
    if not _appears(_token_file(output, token), time.monotonic() + _PATIENCE_S):
        raise OutputError(
            f"files written by the leader are not visible to worker {worker} on {gethostname()} in {output}; the"
            " output folder must lie on a file system that all workers share, at the same path"
        )
    _write_token(_token_file(output, token, worker))


def check_answers(output: Path, token: str, workers: Sequence[int]) -> None:
    """Waits for all answers, as the leader, and removes them and the token. Raises OutputError if one is missing."""
    deadline = time.monotonic() + _PATIENCE_S
    deaf = [worker for worker in workers if not _appears(_token_file(output, token, worker), deadline)]
    remove_token(output, token)
    if deaf:
        raise OutputError(
            f"files written by worker {deaf[0]} are not visible to the leader in {output}; the output"
            " folder must lie on a file system that all workers share, at the same path"
        )


def remove_token(output: Path, token: str = "") -> None:
    """Removes a token with its answers; without `token`, also those that a killed leader left behind."""
    for file in (output / STATE_FOLDER).glob(f"token-{token}*"):
        file.unlink(missing_ok=True)


def _token_file(output: Path, token: str, worker: int | None = None) -> Path:
    return output / STATE_FOLDER / f"token-{token}{'' if worker is None else f'-{worker}'}"


def _write_token(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    except OSError as error:
        raise output_error(file, error) from error


def _appears(file: Path, deadline: float) -> bool:
    """Waits for the file until the deadline, looking once at least; returns whether it is there."""
    while True:
        with suppress(OSError):  # no right to look, or a network file system's stale handle
            if file.exists():
                return True
            any(file.parent.iterdir())  # makes a network file system look again
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
