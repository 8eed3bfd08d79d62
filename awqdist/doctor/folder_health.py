"""Whether a folder's file system keeps its promises: what was renamed is whole, what was synced stays, what is locked is locked."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from awqdist.doctor.health import Check

_LITTLE_BYTES = 10 * 10**9
_HARDLY_ANY_BYTES = 10**8
_NUM_RENAMES = 200
_PATIENCE_S = 20.0
_HOLD = "import fcntl,os,sys,time; d=os.open(sys.argv[1],os.O_RDWR); fcntl.flock(d,fcntl.LOCK_EX); print(1,flush=True); time.sleep(60)"


def check_folder(folder: Path) -> list[Check]:
    """Checks a folder, or what it will be made in. Leaves nothing behind."""
    place = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()), Path("/"))
    if not place.is_dir():
        return [Check("folder", "fail", f"{place} is a file", "give a folder")]
    try:
        probe = Path(tempfile.mkdtemp(prefix=".awqdist-doctor-", dir=place))
    except OSError as error:
        return [Check("folder", "fail", f"{place}: {error.strerror}", "choose a folder that you may write to")]
    try:
        checks = [_free_space(place)]
        for name, check, remedy in (
            ("rename", _rename, "put OUTPUT on a file system with atomic renames: a killed run could leave torn files"),
            ("fsync", _fsync, "put OUTPUT elsewhere: what is finished might be lost with the power"),
            ("locks", _locks, "put OUTPUT on a file system with flock: two runs could use one folder at once"),
        ):
            checks.append(_guarded(name, check, probe, remedy))
        return [*checks, _direct_io(probe)]
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _guarded(name: str, check: Callable[[Path], str], probe: Path, remedy: str) -> Check:
    """A check returns what was found, or raises OSError or ValueError."""
    try:
        return Check(name, "ok", check(probe))
    except (OSError, ValueError) as error:
        return Check(name, "fail", str(error), remedy)


def _free_space(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.1f} GB in {folder} ({_file_system(folder)})"
    if free < _HARDLY_ANY_BYTES:
        return Check("free space", "fail", found, "free some; `awqdist plan` says how much a run writes")
    if free < _LITTLE_BYTES:
        return Check("free space", "warn", found, "compare with what `awqdist plan` says that a run writes")
    if _file_system(folder) in ("tmpfs", "ramfs"):
        return Check("free space", "warn", found, "it is memory, not a disk: offloading there saves nothing")
    return Check("free space", "ok", found)


def _rename(probe: Path) -> str:
    """A reader that opens a file again and again while it is replaced finds it there, and whole."""
    file, contents = probe / "file", [bytes([48 + number]) * 8192 for number in range(2)]
    file.write_bytes(contents[0])
    wrong: list[str] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            try:
                if file.read_bytes() not in contents:
                    wrong.append("a reader saw a torn file during a rename")
            except FileNotFoundError:
                wrong.append("a file was missing for a moment during a rename")

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(_NUM_RENAMES):
            (probe / "new").write_bytes(contents[number % 2])
            (probe / "new").rename(file)
    finally:
        over.set()
        reader.join()
    if wrong:
        raise ValueError(wrong[0])
    return "replaces a file in one step"


def _fsync(probe: Path) -> str:
    for path, flags in ((probe / "synced", os.O_WRONLY | os.O_CREAT), (probe, os.O_RDONLY)):
        descriptor = os.open(path, flags)
        try:
            if path != probe:
                os.write(descriptor, b"x")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return "works for files and folders"


def _locks(probe: Path) -> str:
    """Another process's lock is respected, and ends when that process is killed."""
    file = probe / "lock"
    file.touch()
    holder = subprocess.Popen([sys.executable, "-S", "-c", _HOLD, str(file)], stdout=subprocess.PIPE)
    timer = threading.Timer(_PATIENCE_S, holder.kill)
    timer.start()
    descriptor = os.open(file, os.O_RDWR)
    try:
        assert holder.stdout is not None
        if not holder.stdout.readline():
            raise ValueError("a lock could not be had")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise ValueError("a file that another process has locked could be locked again")
        except BlockingIOError:
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError("the lock of a killed process is still held") from None
    finally:
        timer.cancel()
        os.close(descriptor)
        holder.kill()
        holder.communicate()
    return "flock is held, and released when its process dies"


def _direct_io(probe: Path) -> Check:
    """What DeepNVMe needs of a file system."""
    with suppress(OSError):
        os.close(os.open(probe / "direct", os.O_WRONLY | os.O_CREAT | getattr(os, "O_DIRECT", 1 << 30), 0o600))
        return Check("direct I/O", "ok", "works")
    return Check("direct I/O", "warn", "does not work here", "for --offload nvme give an --offload-dir on a local disk")


def _file_system(folder: Path) -> str:
    """ext4, nfs4, tmpfs, …; "unknown" where the system does not say."""
    best, kind = "", "unknown"
    with suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, mount, found, *_ = line.split(" ")
            if folder.resolve().is_relative_to(mount) and len(mount) >= len(best):
                best, kind = mount, found
    return kind
