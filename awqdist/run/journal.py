"""What of a run is already safe. One JSON line per fact, appended and synced after the file it speaks of.

The first line is the fingerprint: everything that decides the bytes of the result. A run that is started again on the same folder must
have the same one. A torn last line, from a crash while it was written, is dropped. The journal lies in OUTPUT/.awqdist with a lock that
is held by a living process only.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from awqdist.checkpoint.writer import TEMPORARY_SUFFIX, WrittenFile, output_error, sync_folder
from awqdist.errors import OutputError
from awqdist.run.records import LayerRecord

STATE_FOLDER = ".awqdist"
JOURNAL_FILE = "journal.jsonl"
_REMEDY = "use another output folder, the same settings as before, or --overwrite"


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """Boundary activations in front of `layer`, in `file` of the state folder."""

    layer: int
    file: str
    sha256: str


@dataclass(slots=True)
class JournalEntries:
    """The contents of a journal."""

    fingerprint: dict[str, str] = field(default_factory=dict)
    layers: dict[int, LayerRecord] = field(default_factory=dict)
    snapshots: list[SnapshotRecord] = field(default_factory=list)
    outside: WrittenFile | None = None
    num_good_bytes: int = 0


class Journal:
    """An open journal. Create it with `open_journal`."""

    def __init__(self, folder: Path, entries: JournalEntries, lock: int) -> None:
        self.folder = folder
        self.entries = entries
        self._lock = lock

    def add_layer(self, record: LayerRecord) -> None:
        self._append({"kind": "layer", **record.to_json()})
        self.entries.layers[record.layer] = record

    def add_snapshot(self, record: SnapshotRecord) -> None:
        self._append({"kind": "snapshot", "layer": record.layer, "file": record.file, "sha256": record.sha256})
        self.entries.snapshots.append(record)

    def add_outside(self, written: WrittenFile) -> None:
        line = {"kind": "outside", "name": written.name, "num_bytes": written.num_bytes, "sha256": written.sha256}
        self._append(line)
        self.entries.outside = written

    def close(self) -> None:
        os.close(self._lock)

    def _append(self, line: dict[str, Any]) -> None:
        file = self.folder / JOURNAL_FILE
        try:
            with file.open("ab") as stream:
                stream.write(json.dumps(line).encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise output_error(file, error) from error


def open_journal(output: Path, fingerprint: dict[str, str]) -> Journal:
    """Opens or begins the journal of `output`. Raises OutputError if the folder cannot be written, is in use, or has another run's."""
    folder = output / STATE_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise output_error(folder, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise OutputError(f"{output} is in use by another running awqdist; wait for it or choose another folder") from None
    try:
        entries = read_journal(output)
        journal = Journal(folder, entries, lock)
        if not entries.fingerprint:
            _begin(journal, fingerprint)
        _compare(output, entries.fingerprint, fingerprint)
        if (folder / JOURNAL_FILE).stat().st_size > entries.num_good_bytes > 0:
            os.truncate(folder / JOURNAL_FILE, entries.num_good_bytes)
    except BaseException:
        os.close(lock)
        raise
    return journal


def read_journal(output: Path) -> JournalEntries:
    """The entries of a journal; empty if there is none. A torn last line is left out."""
    entries = JournalEntries()
    file = output / STATE_FOLDER / JOURNAL_FILE
    if not file.is_file():
        return entries
    for raw in file.read_bytes().splitlines(keepends=True):
        try:
            line = json.loads(raw) if raw.endswith(b"\n") else None
        except ValueError:
            line = None
        if line is None:
            break
        _take(entries, line)
        entries.num_good_bytes += len(raw)
    return entries


def file_hash(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _take(entries: JournalEntries, line: dict[str, Any]) -> None:
    kind = line.pop("kind")
    if kind == "run":
        entries.fingerprint = line["fingerprint"]
    elif kind == "layer":
        record = LayerRecord.from_json(line)
        entries.layers[record.layer] = record
    elif kind == "snapshot":
        entries.snapshots.append(SnapshotRecord(**line))
    elif kind == "outside":
        entries.outside = WrittenFile(**line)


def _begin(journal: Journal, fingerprint: dict[str, str]) -> None:
    for leftover in journal.folder.parent.glob(f"*{TEMPORARY_SUFFIX}"):
        leftover.unlink()
    (journal.folder / JOURNAL_FILE).write_bytes(b"")
    journal._append({"kind": "run", "fingerprint": fingerprint})
    journal.entries.fingerprint = fingerprint
    journal.entries.num_good_bytes = (journal.folder / JOURNAL_FILE).stat().st_size
    sync_folder(journal.folder)


def _compare(output: Path, before: dict[str, str], now: dict[str, str]) -> None:
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        details = "; ".join(f"{key}: {_short(before.get(key))} then, {_short(now[key])} now" for key in changed)
        raise OutputError(f"{output} holds an unfinished run with other settings ({details}); {_REMEDY}")


def _short(value: str | None) -> str:
    text = " ".join((value or "nothing").split())
    return text if len(text) <= 40 else f"{text[:40]}…"
