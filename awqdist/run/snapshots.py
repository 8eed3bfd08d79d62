"""Snapshots: the inputs of a layer on disk, so that a resumed run need not begin at the embeddings.

A damaged snapshot is passed over for the one before it, and in the end for the embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from awqdist.checkpoint.index import read_header
from awqdist.checkpoint.reader import read_tensor
from awqdist.checkpoint.writer import LazyTensor, stream_safetensors
from awqdist.run.events import SnapshotSaved
from awqdist.run.journal import Journal, file_hash

_NUM_KEPT = 2


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
    for old in usable[:-_NUM_KEPT]:
        (journal.folder / old.file).unlink(missing_ok=True)


def remove_snapshots(folder: Path) -> None:
    """Removes every snapshot of a finished run."""
    for file in folder.glob("boundary-*.safetensors*"):
        file.unlink()
