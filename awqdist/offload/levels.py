"""Which store a level of offloading is, and what takes its place where it cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from awqdist.errors import OffloadError
from awqdist.offload.disk import PlainFiles
from awqdist.offload.files import FileStore, Medium
from awqdist.offload.folder import OwnFolder
from awqdist.offload.nvme import DeepNvme
from awqdist.offload.ram import RamStore
from awqdist.offload.store import Store
from awqdist.offload.tiers import TieredStore

LEVELS = ("cpu", "disk", "nvme")


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """level: one of LEVELS; base: in which a folder for files is made; budget_bytes: of memory, None for no limit; pinned: page-locked
    memory, for a worker with a GPU."""

    level: str
    base: Path
    budget_bytes: int | None = None
    pinned: bool = False


def open_store(settings: StoreSettings, warn: Callable[[str], None]) -> Store:
    """An empty store, to be closed. warn: is told once if the disk has to serve for NVMe. Raises OffloadError."""
    ram = RamStore(settings.budget_bytes, pinned=settings.pinned)
    if settings.level == "cpu":
        return ram
    folder = OwnFolder(settings.base)
    medium: Medium = PlainFiles(pinned=settings.pinned)
    if settings.level == "nvme":
        try:
            medium = DeepNvme(folder.path)
        except OffloadError as error:
            warn(f"no DeepNVMe: {error}; plain files in {settings.base} serve instead")
        except BaseException:
            folder.remove()
            raise
    return TieredStore(ram, FileStore(folder, medium))
