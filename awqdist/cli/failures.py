"""How a command ends that cannot go on: every AwqdistError becomes one line and exit status 2; an interrupt says how to resume."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from awqdist.errors import AwqdistError


class Interrupted(BaseException):
    """A signal asked for the end. Not a KeyboardInterrupt, which typer would answer itself."""


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turns expected failures, wrong usage and signals into one line and an exit status."""
    try:
        yield
    except AwqdistError as error:
        typer.echo(f"awqdist: error: {error}", err=True)
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun shows it in its table of failures
            Path(file).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))
        raise SystemExit(2) from None
    except PermissionError as error:
        typer.echo(f"awqdist: error: {error.strerror}: {error.filename}; choose a place that you may use", err=True)
        raise SystemExit(2) from None
    except typer.TyperException as error:
        if error.format_message():
            typer.echo(f"awqdist: error: {error.format_message()}", err=True)
        raise SystemExit(error.exit_code) from None
    except Interrupted as signalled:
        number = int(signalled.args[0])
        typer.echo("awqdist: interrupted; finished layers are kept, the same command resumes", err=True)
        raise SystemExit(128 + number) from None


def interrupt(number: int, frame: Any) -> None:
    """A handler of signals."""
    raise Interrupted(number)
