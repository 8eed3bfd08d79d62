"""Plain files on a disk: written and read by byte, never mapped; the page cache is dropped behind as far as it is clean."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch
from torch import Tensor

_BLOCK_BYTES = 1 << 26


class PlainFiles:
    """A medium. pinned: read into page-locked memory.

    Nothing is synced: a chunk that is dropped before the system writes it out never costs the disk anything.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned

    def write(self, file: Path, data: Tensor) -> None:
        view = data.numpy().data
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            done = 0
            while done < len(view):
                count = os.write(descriptor, view[done:][:_BLOCK_BYTES])
                if count == 0:
                    raise OSError(errno.EIO, "the disk takes no more bytes")
                done += count
            drop_cache(descriptor)
        finally:
            os.close(descriptor)

    def read(self, file: Path, num_bytes: int) -> Tensor:
        data = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        view = data.numpy().data
        descriptor = os.open(file, os.O_RDONLY)
        try:
            done = 0
            while done < num_bytes:
                count = os.preadv(descriptor, [view[done:][:_BLOCK_BYTES]], done)
                if count == 0:
                    raise OSError(errno.EIO, f"it ends after {done:,} of {num_bytes:,} bytes")
                done += count
            drop_cache(descriptor)
        finally:
            os.close(descriptor)
        return data

    def close(self) -> None:
        """Holds nothing."""


def drop_cache(descriptor: int) -> None:
    """Takes an open file out of the page cache, but for pages that are yet to be written out."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
