"""Folders of file stores: each belongs to one process, which holds a lock beside it, and is swept away once that process is gone."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from awqdist.errors import OffloadError

_PREFIX = "awqdist-kept-"
_NUM_TRIES = 5  # another process may sweep between two steps


class OwnFolder:
    """A new folder in `base`, which is made if need be. Raises OffloadError."""

    def __init__(self, base: Path) -> None:
        self.path = base / f"{_PREFIX}{uuid.uuid4().hex[:12]}"
        self._lock_file = self.path.with_suffix(".lock")
        try:
            self._lock = self._locked()
            self.path.mkdir()
        except OSError as error:
            raise OffloadError(
                f"cannot make the offload folder {self.path}: {error.strerror}; give another --offload-dir"
            ) from error

    def remove(self) -> None:
        """Removes the folder, but not `base`."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock_file.unlink(missing_ok=True)
        os.close(self._lock)

    def _locked(self) -> int:
        """The descriptor of the lock file, which ends with the process, however that dies."""
        for _ in range(_NUM_TRIES):
            with suppress(FileNotFoundError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                lock = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o600)
                with suppress(OSError):  # a file system without locks: what is left there is never swept
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if self._lock_file.exists():
                    return lock
                os.close(lock)
        raise FileNotFoundError(2, "it is swept by another process again and again")


def sweep(base: Path) -> None:
    """Removes the folders in `base` whose processes are gone. A lock that cannot be had means that its process lives, here or, where the
    file system knows locks, on another machine."""
    for file in base.glob(f"{_PREFIX}*.lock"):
        with suppress(OSError):
            lock = os.open(file, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(file.with_suffix(""), ignore_errors=True)
                file.unlink()
            finally:
                os.close(lock)
