"""Proves before the start that every worker sees the output folder of the leader: it writes a token, everyone reads it and answers."""

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
    """Leader: writes a token that nobody can guess. Raises OutputError."""
    token = uuid.uuid4().hex
    _write(_file(output, token))
    return token


def answer_token(output: Path, token: str, worker: int) -> None:
    """Worker: reads the token and writes an answer. Raises OutputError if the folder is not the leader's."""
    if not _appears(_file(output, token), time.monotonic() + _PATIENCE_S):
        raise OutputError(
            f"worker {worker} on {gethostname()} does not see what the leader wrote into {output}; the output folder must lie on a file"
            " system that all workers share, at the same path"
        )
    _write(_file(output, token, worker))


def check_answers(output: Path, token: str, workers: Sequence[int]) -> None:
    """Leader: removes the token and its answers. Raises OutputError if an answer is missing."""
    deadline = time.monotonic() + _PATIENCE_S
    deaf = [worker for worker in workers if not _appears(_file(output, token, worker), deadline)]
    remove_token(output, token)
    if deaf:
        raise OutputError(
            f"what worker {deaf[0]} writes into {output} does not arrive here; the output folder must lie on a file system that all"
            " workers share, at the same path"
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
    """Whether the file is there at last, looking once at least."""
    while True:
        with suppress(OSError):  # no right to look, or a network file system's stale handle
            if file.exists():
                return True
            any(file.parent.iterdir())  # makes a network file system look again
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
