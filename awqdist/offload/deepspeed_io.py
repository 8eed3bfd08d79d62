"""DeepSpeed's asynchronous I/O operator: whether it can be had, how it is compiled, how it is loaded. Nothing else imports deepspeed.

Left to itself, DeepSpeed compiles the operator on first use, which takes minutes and may hang: torch marks a compile by a lock file,
and a compile that is killed leaves it behind for the next one to wait for, for ever. So it is compiled by `awqdist doctor --build-nvme`
only. A run loads what was compiled for the same versions, without asking DeepSpeed, or does without.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from awqdist.errors import OffloadError

_OPERATORS = ("pin_memory", "async_io")  # the second needs the symbols of the first
_STAMP_FILE = "awqdist-built.json"
_LOCK_FILE = "lock"
_QUIET_S = 60.0  # a compile on another machine that shares this home writes something more often
BUILD_COMMAND = "awqdist doctor --build-nvme"


def build_folder(operator: str) -> Path:
    """Where torch compiles an operator of DeepSpeed."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(operator, False))


def reason_against() -> str | None:
    """Why the operator cannot be loaded without compiling; None if it can."""
    for operator in _OPERATORS:
        if not (build_folder(operator) / f"{operator}.so").is_file():
            return f"DeepSpeed's {operator} operator is not compiled; run `{BUILD_COMMAND}` once"
    if _stamp_of(build_folder("async_io")) != _versions():
        return f"DeepSpeed's async_io operator was compiled for other versions; run `{BUILD_COMMAND}` once"
    lock = next((lock for lock in map(_lock, _OPERATORS) if lock.exists()), None)
    if lock is not None:
        return f"DeepSpeed's operators are being compiled, or a compile was killed ({lock}); run `{BUILD_COMMAND}`"
    return None


def load_operator() -> Any:
    """The operator's module, which has `aio_handle`. Never compiles. Raises OffloadError."""
    reason = reason_against()
    if reason is not None:
        raise OffloadError(reason)
    try:
        with _surroundings():
            import deepspeed.utils  # noqa: F401  # the operator would import it, and print
        pin_memory, async_io = (_load(operator, build_folder(operator) / f"{operator}.so") for operator in _OPERATORS)
    except (ImportError, OSError) as error:
        raise OffloadError(
            f"DeepSpeed's async_io operator does not load: {str(error).splitlines()[0]}; is libaio installed?"
        ) from error
    assert hasattr(pin_memory, "__file__")
    return async_io


def build_operator(tell: Callable[[str], None]) -> None:
    """Compiles the operator, if that is needed, and loads it. Raises OffloadError."""
    for operator in _OPERATORS:
        remove_stale_lock(build_folder(operator), tell)
    if reason_against() is None:
        tell("DeepSpeed's async_io operator is compiled already")
        load_operator()
        return
    tell("compiling DeepSpeed's async_io operator, once for this machine; this takes some minutes …")
    start = time.monotonic()
    with _surroundings():
        from deepspeed.ops.op_builder import AsyncIOBuilder

        builder = AsyncIOBuilder()
        if not builder.is_compatible(verbose=False):
            raise OffloadError(
                "DeepSpeed's async_io operator needs libaio and its headers; install libaio-dev (Debian, Ubuntu) or libaio-devel (RPM)"
            )
        try:
            builder.load(verbose=False)
        except (RuntimeError, OSError, ImportError) as error:
            raise OffloadError(
                f"DeepSpeed's async_io operator does not compile: {str(error).splitlines()[0]}; a C++ compiler and ninja are needed"
            ) from error
    (build_folder("async_io") / _STAMP_FILE).write_text(json.dumps(_versions()))
    tell(f"compiled in {time.monotonic() - start:.0f} s")


def remove_stale_lock(folder: Path, tell: Callable[[str], None]) -> None:
    """Removes the lock file that a killed compile left in `folder`. Raises OffloadError if a compile goes on there."""
    lock = folder / _LOCK_FILE
    holder = _holder(lock)
    if holder is not None:
        raise OffloadError(f"process {holder} is compiling in {folder}; wait until it has ended")
    if lock.exists() and _idle_s(folder) < _QUIET_S:
        tell(f"{lock} is there; waiting up to {_QUIET_S:.0f} s to see whether another machine is compiling")
        while lock.exists() and (idle_s := _idle_s(folder)) < _QUIET_S:
            time.sleep(min(1.0, _QUIET_S - idle_s))
    if lock.exists():
        lock.unlink(missing_ok=True)
        tell(f"removed {lock}, which a killed compile had left behind")


def _idle_s(folder: Path) -> float:
    """Seconds since something changed in a folder."""
    changed = [folder.stat().st_mtime]
    for file in folder.iterdir():
        with suppress(FileNotFoundError):
            changed.append(file.stat().st_mtime)
    return time.time() - max(changed)


def _holder(lock: Path) -> int | None:
    """The process of this machine that has the lock file open, as a compile does to its end."""
    for link in Path("/proc").glob("[0-9]*/fd/*") if lock.exists() else ():
        with suppress(OSError):
            if os.path.samefile(link, lock):
                return int(link.parts[2])
    return None


def _lock(operator: str) -> Path:
    return build_folder(operator) / _LOCK_FILE


def _load(name: str, file: Path) -> Any:
    """An extension module from its file. Its symbols are there for those loaded after it."""
    if name in sys.modules:
        return sys.modules[name]
    ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "deepspeed")}


def _stamp_of(folder: Path) -> object:
    try:
        return json.loads((folder / _STAMP_FILE).read_text())
    except (OSError, ValueError):
        return None


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextmanager
def _surroundings() -> Iterator[None]:
    """What DeepSpeed needs around it to be quiet, and to find ninja beside this Python."""
    import torch

    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{before}"
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # it prints on standard output
    try:
        yield
    finally:
        os.environ["PATH"] = before
