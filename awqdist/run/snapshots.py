"""Boundary activations on disk, so that a resumed run need not begin at the first layer. The two newest are kept; a damaged one is passed
over for the one before it, and in the end for the embeddings."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from awqdist.checkpoint.index import read_header
from awqdist.checkpoint.reader import read_tensor
from awqdist.checkpoint.writer import write_safetensors
from awqdist.run.journal import Journal, SnapshotRecord, file_hash

_NUM_KEPT = 2


def save_snapshot(journal: Journal, layer: int, chunks: list[Tensor]) -> None:
    """Stores the inputs of `layer`: chunks of (B, L, H)."""
    file = journal.folder / f"boundary-{layer:05d}.safetensors"
    written = write_safetensors(file, {f"chunk-{i:06d}": chunk for i, chunk in enumerate(chunks)})
    journal.add_snapshot(SnapshotRecord(layer, written.name, written.sha256))
    for old in journal.entries.snapshots[:-_NUM_KEPT]:
        (journal.folder / old.file).unlink(missing_ok=True)


def load_newest_snapshot(journal: Journal, last_layer: int) -> tuple[int, list[Tensor]] | None:
    """The newest usable snapshot at or before `last_layer`: its layer and its chunks, or None."""
    for record in sorted(journal.entries.snapshots, key=lambda r: r.layer, reverse=True):
        file = journal.folder / record.file
        if record.layer <= last_layer and file.is_file() and file_hash(file) == record.sha256:
            return record.layer, [read_tensor(entry) for entry in sorted(read_header(file), key=lambda e: e.name)]
    return None


def remove_snapshots(folder: Path) -> None:
    """Removes every snapshot of a finished run."""
    for file in folder.glob("boundary-*.safetensors*"):
        file.unlink()
