"""Checks before the start that all workers share the leader's output folder: it writes a token, each worker reads it and answers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from socket import gethostname

from awqdist.checkpoint.writer import output_error
from awqdist.errors import OutputError
from awqdist.run.log import STATE_FOLDER

_PATIENCE_S = 10.0  # network file systems show new files late


def offer_token(output: Path) -> str:
    """Writes a random token, as the leader, and returns it. Raises OutputError."""
    token = uuid.uuid4().hex
    _write(_file(output, token))
    return token


def answer_token(output: Path, token: str, worker: int) -> None:
    """Waits for the token, as a worker, and writes an answer. Raises OutputError if the folder is not the leader's."""
    if not _appears(_file(output, token), time.monotonic() + _PATIENCE_S):
        raise OutputError(
            f"files written by the leader are not visible to worker {worker} on {gethostname()} in {output}; the"
            " output folder must lie on a file system that all workers share, at the same path"
        )
    _write(_file(output, token, worker))


def check_answers(output: Path, token: str, workers: Sequence[int]) -> None:
    """Waits for all answers, as the leader, and removes them and the token. Raises OutputError if one is missing."""
    deadline = time.monotonic() + _PATIENCE_S
    deaf = [worker for worker in workers if not _appears(_file(output, token, worker), deadline)]
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


def _file(output: Path, token: str, worker: int | None = None) -> Path:
    return output / STATE_FOLDER / f"token-{token}{'' if worker is None else f'-{worker}'}"


def _write(file: Path) -> None:
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
