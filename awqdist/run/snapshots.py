"""Boundary activations on disk, so that a resumed run need not begin at the first layer. A damaged one is passed over for the one
before it, and in the end for the embeddings."""

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
    """What chunk number `index` is called in a snapshot."""
    return f"chunk-{index:06d}"


def save_snapshot(folder: Path, layer: int, chunks: Sequence[LazyTensor]) -> SnapshotSaved:
    """Stores the inputs of `layer`, chunks of (B, L, H) in order, in the state folder; one of them in memory at a time."""
    written = stream_safetensors(folder / f"boundary-{layer:05d}.safetensors", chunks)
    return SnapshotSaved(layer, written.name, written.sha256)


def load_snapshot(folder: Path, record: SnapshotSaved) -> Iterator[Tensor]:
    """The chunks of a snapshot, one after the other."""
    for entry in sorted(read_header(folder / record.file), key=lambda e: e.name):
        yield read_tensor(entry)


def newest_usable(journal: Journal, last_layer: int) -> SnapshotSaved | None:
    """The newest undamaged snapshot at or before `last_layer`."""
    for record in sorted(journal.entries.snapshots, key=lambda r: r.layer, reverse=True):
        file = journal.folder / record.file
        if record.layer <= last_layer and file.is_file() and file_hash(file) == record.sha256:
            return record
    return None


def remove_old_snapshots(journal: Journal, first_unfinished: int) -> None:
    """Keeps the newest two from which a run could be resumed, and those in front of layers that others have yet to catch up with."""
    usable = sorted((r for r in journal.entries.snapshots if r.layer <= first_unfinished), key=lambda r: r.layer)
    for old in usable[:-_NUM_KEPT]:
        (journal.folder / old.file).unlink(missing_ok=True)


def remove_snapshots(folder: Path) -> None:
    """Removes every snapshot of a finished run."""
    for file in folder.glob("boundary-*.safetensors*"):
        file.unlink()
