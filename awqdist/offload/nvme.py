"""Reads and writes files through DeepSpeed's DeepNVMe: direct I/O, many blocks in flight, no page cache.

DeepNVMe reports no failed transfer, writes nothing at all if a size does not fit its alignment, and aborts the process when a file is too
short. So sizes are padded, space is reserved before writing, sizes are compared before reading, and `FileStore` checksums every file.

Its operator is compiled by `awqdist doctor --build-nvme` only, never during a run. DeepSpeed itself would compile it on first use, which
takes minutes, and wait forever for the lock file of a compilation that was killed. A run loads what was compiled for the same versions.
"""

from __future__ import annotations

import ctypes
import errno
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

import torch
from torch import Tensor

from awqdist.errors import OffloadError

BUILD_COMMAND = "awqdist doctor --build-nvme"
_NUM_THREADS = 1  # per transfer
_ALIGNMENT_BYTES = 4096 * _NUM_THREADS
_BLOCK_BYTES = 1 << 20
_QUEUE_DEPTH = 32
_TRIAL_BYTES = 12345
_OPERATORS = ("pin_memory", "async_io")  # the second needs the symbols of the first
_QUIET_S = 60.0  # a compilation on another machine that shares this home writes something more often


class DeepNvme:
    """A medium for `FileStore`.

    Raises:
        OffloadError: the operator is not compiled, or `folder` does not support direct I/O.
    """

    def __init__(self, folder: Path) -> None:
        operator = load_operator()
        self._writing, self._reading = _Channel(operator), _Channel(operator)
        trial, data = folder / "trial", torch.arange(_TRIAL_BYTES).to(torch.uint8)
        try:
            self.write(trial, data)
            if not torch.equal(self.read(trial, _TRIAL_BYTES), data):
                raise OSError(errno.EIO, "other bytes were read than written")
        except OSError as error:
            raise OffloadError(f"{folder} does not support DeepNVMe's direct I/O: {error.strerror or error}") from error
        finally:
            trial.unlink(missing_ok=True)
            self.close()

    def write(self, file: Path, data: Tensor) -> None:
        """Writes data (num_bytes,) uint8 into a new file, padded to the alignment. Raises OSError."""
        size = _padded(data.numel())
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if size:
                os.posix_fallocate(descriptor, 0, size)  # the only step that reports a full disk
        finally:
            os.close(descriptor)
        if size:
            buffer = self._writing.buffer(size)
            buffer[: data.numel()] = data
            if self._writing.handle.sync_pwrite(buffer, str(file), 0) != 1:
                raise OSError(errno.EIO, "DeepNVMe did not write it")
        _check_size(file, size)

    def read(self, file: Path, num_bytes: int) -> Tensor:
        """Returns the first `num_bytes` of a file, (num_bytes,) uint8. Raises OSError."""
        size = _padded(num_bytes)
        _check_size(file, size)
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        buffer = self._reading.buffer(size)
        if self._reading.handle.sync_pread(buffer, str(file), 0) != 1:
            raise OSError(errno.EIO, "DeepNVMe did not read it")
        return buffer[:num_bytes].clone()

    def close(self) -> None:
        """Frees the page-locked buffers."""
        self._writing.free()
        self._reading.free()


class _Channel:
    """One direction, used by one thread: a handle, and a page-locked buffer that grows to the largest transfer."""

    def __init__(self, operator: Any) -> None:
        self.handle = operator.aio_handle(_BLOCK_BYTES, _QUEUE_DEPTH, False, True, _NUM_THREADS)
        self._buffer: Tensor | None = None

    def buffer(self, size: int) -> Tensor:
        """Returns (size,) uint8, holding what an earlier transfer left."""
        if self._buffer is None or self._buffer.numel() < size:
            self.free()
            self._buffer = self.handle.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.uint8))
            if not self._buffer.data_ptr():
                self._buffer = None
                raise OSError(errno.ENOMEM, f"{size:,} bytes cannot be locked in memory; raise `ulimit -l`")
        return self._buffer[:size]

    def free(self) -> None:
        if self._buffer is not None:
            self.handle.free_cpu_locked_tensor(self._buffer)
        self._buffer = None


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _check_size(file: Path, size: int) -> None:
    found = file.stat().st_size
    if found != size:
        raise OSError(errno.EIO, f"it has {found:,} bytes, expected {size:,}")


def build_folder(operator: str) -> Path:
    """Returns the folder in which torch compiles an operator of DeepSpeed."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(operator, False))


def why_unavailable() -> str | None:
    """Returns why the operator cannot be loaded without compiling it, or None if it can."""
    for operator in _OPERATORS:
        if not (build_folder(operator) / f"{operator}.so").is_file():
            return f"DeepSpeed's {operator} operator is not compiled; run `{BUILD_COMMAND}` once"
    stamp = None
    with suppress(OSError, ValueError):
        stamp = json.loads(_stamp_file().read_text())
    if stamp != _versions():
        return f"DeepSpeed's async_io operator was compiled for other versions; run `{BUILD_COMMAND}` once"
    for operator in _OPERATORS:
        if (lock := build_folder(operator) / "lock").exists():
            return (
                f"DeepSpeed's operators are being compiled, or a compilation was killed ({lock}); run `{BUILD_COMMAND}`"
            )
    return None


def load_operator() -> Any:
    """Returns the operator's module, which has `aio_handle`. Never compiles. Raises OffloadError."""
    reason = why_unavailable()
    if reason is not None:
        raise OffloadError(reason)
    try:
        with _quiet_deepspeed():
            import deepspeed.utils  # noqa: F401  # the operator would import it, and print
        for name in _OPERATORS:
            _load_extension(name, build_folder(name) / f"{name}.so")
    except (ImportError, OSError) as error:
        raise OffloadError(
            f"DeepSpeed's async_io operator does not load: {str(error).splitlines()[0]}; is libaio installed?"
        ) from error
    return sys.modules["async_io"]


def _load_extension(name: str, file: Path) -> None:
    """Imports an extension module from its file and makes its symbols visible to those loaded after it."""
    if name in sys.modules:
        return
    ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module


def build_operator(tell: Callable[[str], None]) -> None:
    """Compiles the operator if necessary, and loads it.

    Args:
        tell: called with lines about the progress.

    Raises:
        OffloadError: libaio or a compiler is missing, or another process is compiling.
    """
    for operator in _OPERATORS:
        remove_stale_lock(build_folder(operator), tell)
    if why_unavailable() is None:
        tell("DeepSpeed's async_io operator is compiled already")
        load_operator()
        return
    tell("compiling DeepSpeed's async_io operator, once for this machine; this takes some minutes …")
    start = time.monotonic()
    with _quiet_deepspeed():
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
                f"DeepSpeed's async_io operator does not compile: {str(error).splitlines()[0]}; install a C++ compiler and ninja"
            ) from error
    _stamp_file().write_text(json.dumps(_versions()))
    tell(f"compiled in {time.monotonic() - start:.0f} s")


def remove_stale_lock(folder: Path, tell: Callable[[str], None]) -> None:
    """Removes the lock file that a killed compilation left in `folder`. Raises OffloadError if a process is compiling there."""
    lock = folder / "lock"
    for link in Path("/proc").glob("[0-9]*/fd/*") if lock.exists() else ():
        with suppress(OSError):
            if os.path.samefile(link, lock):  # a compilation keeps it open until it ends
                raise OffloadError(f"process {link.parts[2]} is compiling in {folder}; wait until it has ended")
    if lock.exists() and _idle_s(folder) < _QUIET_S:
        tell(f"{lock} exists; waiting up to {_QUIET_S:.0f} s to see whether another machine is compiling")
        while lock.exists() and (idle_s := _idle_s(folder)) < _QUIET_S:
            time.sleep(min(1.0, _QUIET_S - idle_s))
    if lock.exists():
        lock.unlink(missing_ok=True)
        tell(f"removed {lock}, left behind by a killed compilation")


def _idle_s(folder: Path) -> float:
    """Returns the seconds since something changed in a folder."""
    changed = [folder.stat().st_mtime]
    for file in folder.iterdir():
        with suppress(FileNotFoundError):
            changed.append(file.stat().st_mtime)
    return time.time() - max(changed)


def _stamp_file() -> Path:
    """Returns the file that says which versions the operator was compiled for."""
    return build_folder("async_io") / "awqdist-built.json"


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "deepspeed")}


@contextmanager
def _quiet_deepspeed() -> Iterator[None]:
    """Keeps DeepSpeed from printing on standard output, and lets it find ninja beside this Python."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{before}"
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        yield
    finally:
        os.environ["PATH"] = before
