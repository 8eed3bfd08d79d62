"""Runs the command line within the tests' process, or in a forked child that a test may kill."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awqdist.cli.main import main


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str

    @property
    def events(self) -> list[dict[str, Any]]:
        """The lines of `--progress json`."""
        return [json.loads(line) for line in self.stdout.splitlines()]

    def count(self, event: str) -> int:
        return sum(line["event"] == event for line in self.events)

    def error_line(self) -> str:
        """The one line that a refusal consists of."""
        lines = self.stderr.splitlines()
        assert self.code == 2, (self.code, self.stdout, self.stderr)
        assert len(lines) == 1, self.stderr
        assert lines[0].startswith("awqdist: error: "), self.stderr
        return lines[0].removeprefix("awqdist: error: ")


def awqdist(*arguments: object) -> Outcome:
    """One command, in this process."""
    stdout, stderr = io.StringIO(), io.StringIO()
    before = sys.argv, [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    sys.argv = ["awqdist", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        sys.argv = before[0]
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before[1], strict=True):
            signal.signal(number, handler)
        gc.unfreeze()
        gc.enable()
    return Outcome(code, stdout.getvalue(), stderr.getvalue())


class Child:
    """A command in a forked child: everything is imported already, so that starting and killing it costs nothing."""

    def __init__(self, folder: Path, arguments: tuple[object, ...], prepare: Callable[[], None]) -> None:
        self._files = folder / "child.stdout", folder / "child.stderr"
        self.pid = os.fork()
        if self.pid:
            return
        try:
            for descriptor, file in zip((1, 2), self._files, strict=True):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            prepare()
            sys.argv = ["awqdist", *map(str, arguments)]
            main()
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code if isinstance(end.code, int) else 0 if end.code is None else 1)
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(70)

    def wait(self) -> Outcome:
        """The exit code is negative for a signal that ended the child."""
        ended: list[int] = []
        self.await_that(lambda: ended.extend(os.waitpid(self.pid, os.WNOHANG)) or ended[-2] != 0)
        code = os.waitstatus_to_exitcode(ended[-1])
        return Outcome(code, *(file.read_text() if file.exists() else "" for file in self._files))

    def await_event(self, event: str, count: int = 1) -> None:
        """Returns as soon as the child has printed that many events of a kind."""
        self.await_that(lambda: self._files[0].exists() and self._files[0].read_text().count(f'"{event}"') >= count)

    def await_that(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"the child hung: {[f.read_text() for f in self._files if f.exists()]}")
            time.sleep(0.001)

    def kill(self, number: int = signal.SIGKILL) -> Outcome:
        os.kill(self.pid, number)
        return self.wait()


def start(folder: Path, *arguments: object, prepare: Callable[[], None] = lambda: None) -> Child:
    """A command in a child. folder: for its output streams; prepare: called in the child before the command."""
    return Child(folder, arguments, prepare)


def die_at(output: Path, moment: int) -> Callable[[], None]:
    """For `start`: kills the child with SIGKILL when it opens, renames or removes something in `output` for the n-th time."""

    def install() -> None:
        count = 0

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate") and str(args[0]).startswith(
                str(output)
            ):
                count += 1
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return install


@contextlib.contextmanager
def folder_as_it_was(*folders: Path) -> Iterator[None]:
    """Fails if the files of the folders, or their contents, are not afterwards what they were before."""
    before = [contents(folder) for folder in folders]
    yield
    assert [contents(folder) for folder in folders] == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def model_files(output: Path) -> dict[str, bytes]:
    """What must be equal however a run came to its end: everything but the log and the report, which tell times."""
    return {
        name: data
        for name, data in contents(output).items()
        if not name.startswith(".awqdist") and name != "report.html"
    }
