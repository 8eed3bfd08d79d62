"""The inputs of layers, in chunks: those that a worker holds, and snapshots on disk from which a run resumes.

Chunks stay in memory up to the budget and spill to disk; chunks received from or sent to another worker are not stored. A resumed
run begins at the newest undamaged snapshot, or at the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from awqdist.checkpoint.index import read_header
from awqdist.checkpoint.reader import read_tensor
from awqdist.checkpoint.writer import LazyTensor, lazy_tensor, stream_safetensors
from awqdist.offload.store import Store, open_store, sweep
from awqdist.run.events import STATE_FOLDER, SnapshotSaved
from awqdist.run.job import Job
from awqdist.run.journal import Journal, file_hash
from awqdist.run.memory import chunk_budget

_OFFLOAD_FOLDER = "offload"
_NUM_SNAPSHOTS = 2  # that are kept


def offload_folder(job: Job) -> Path:
    """Returns the folder in which workers make folders for what they offload."""
    return job.settings.offload_dir or job.settings.output / STATE_FOLDER / _OFFLOAD_FOLDER


def sweep_offload(job: Job) -> None:
    """Removes what dead workers of this machine left in the offload folder, and the folder itself if it lies in OUTPUT."""
    sweep(offload_folder(job))
    if job.settings.offload_dir is None:
        with suppress(OSError):  # a worker lives
            offload_folder(job).rmdir()


def store_budget(job: Job, num_workers: int) -> int | None:
    """Returns the bytes of host memory for one store of a worker; None for no limit.

    If there are several workers, each has two stores, which share its budget: its own chunks, and chunks from its neighbour.
    """
    budget_bytes = chunk_budget(job)
    return budget_bytes if budget_bytes is None or num_workers == 1 else budget_bytes // 2


def open_chunk_store(job: Job, budget_bytes: int | None, warn: Callable[[str], None] = lambda message: None) -> Store:
    """Returns an empty store for chunks of one worker, to be closed by the caller.

    Args:
        budget_bytes: what `store_budget` returned.
        warn: called once if plain files have to replace DeepNVMe.
    """
    pinned = job.device.type == "cuda"
    return open_store(job.settings.offload, offload_folder(job), budget_bytes, warn, pinned=pinned)


class Chunks:
    """Keeps chunks by layer and number. Taking a chunk drops it, unless a snapshot is to be made of it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._passing: dict[str, Tensor] = {}  # at most one: received and not forwarded, or forwarded and not sent

    def put(self, layer: int, index: int, hidden: Tensor) -> None:
        """Stores an input of `layer`, (B, L, H) on the CPU."""
        self._store.put(_key(layer, index), hidden)

    def put_passing(self, layer: int, index: int, hidden: Tensor) -> None:
        """Holds an input of `layer`, (B, L, H) on the CPU, that is taken next."""
        self._passing[_key(layer, index)] = hidden

    def take(self, layer: int, index: int) -> Tensor:
        """Returns a chunk and drops it."""
        hidden = self._passing.pop(_key(layer, index), None)
        return self._take_stored(_key(layer, index)) if hidden is None else hidden

    def take_and_keep(self, layer: int, index: int) -> tuple[Tensor, LazyTensor]:
        """Returns a chunk, and a lazy tensor for a snapshot; loading that drops the chunk."""
        key = _key(layer, index)
        hidden = self._passing.pop(key, None)
        if hidden is None:
            hidden = self._store.get(key)
        else:
            self._store.put(key, hidden)
        return hidden, lazy_tensor(chunk_name(index), hidden, lambda: self._take_stored(key))

    def expect(self, layer: int, index: int) -> None:
        """Begins to fetch the chunk that is taken next, if it is stored here."""
        self._store.prefetch(_key(layer, index))

    def close(self) -> None:
        """Drops all chunks."""
        self._store.close()

    def _take_stored(self, key: str) -> Tensor:
        hidden = self._store.get(key)
        self._store.drop(key)
        return hidden


def _key(layer: int, index: int) -> str:
    return f"layer-{layer:05d}-chunk-{index:06d}"


def chunk_name(index: int) -> str:
    """Returns the name of a chunk within a snapshot."""
    return f"chunk-{index:06d}"


def save_snapshot(folder: Path, layer: int, chunks: Sequence[LazyTensor]) -> SnapshotSaved:
    """Writes the inputs of `layer`, chunks of (B, L, H) in order, to the state folder, one in memory at a time."""
    written = stream_safetensors(folder / f"boundary-{layer:05d}.safetensors", chunks)
    return SnapshotSaved(layer, written.name, written.sha256)


def load_snapshot(folder: Path, record: SnapshotSaved) -> Iterator[Tensor]:
    """Yields the chunks of a snapshot, (B, L, H) each, in order."""
    for entry in sorted(read_header(folder / record.file), key=lambda e: e.name):
        yield read_tensor(entry)


def newest_usable(journal: Journal, last_layer: int) -> SnapshotSaved | None:
    """Returns the newest undamaged snapshot at or before `last_layer`, or None."""
    for record in sorted(journal.entries.snapshots, key=lambda r: r.layer, reverse=True):
        file = journal.folder / record.file
        if record.layer <= last_layer and file.is_file() and file_hash(file) == record.sha256:
            return record
    return None


def remove_old_snapshots(journal: Journal, first_unfinished: int) -> None:
    """Keeps the newest two snapshots from which a run could resume now, and all that lie behind the first unfinished layer."""
    usable = sorted((r for r in journal.entries.snapshots if r.layer <= first_unfinished), key=lambda r: r.layer)
    for old in usable[:-_NUM_SNAPSHOTS]:
        (journal.folder / old.file).unlink(missing_ok=True)


def remove_snapshots(folder: Path) -> None:
    """Removes every snapshot of a finished run."""
    for file in folder.glob("boundary-*.safetensors*"):
        file.unlink()
