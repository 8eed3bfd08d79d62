"""What of a run is already safe. One JSON line per fact, appended and synced after the file it speaks of.

The first line is the fingerprint: everything that decides the bytes of the result. A run that is started again on the same folder must
have the same one. A torn last line, from a crash while it was written, is dropped, and so is a layer whose file is not what its line
says. The journal lies in OUTPUT/.awqdist with a lock that is held by a living process only.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from awqdist.checkpoint.writer import WrittenFile, output_error, write_bytes
from awqdist.errors import OutputError
from awqdist.layer.records import LayerRecord
from awqdist.run.output import STATE_FOLDER, is_finished, lock_output, remove_model

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
    """An open journal. Create it with `open_journal`. damaged: files found missing or changed, of which `entries` does not speak."""

    def __init__(self, folder: Path, entries: JournalEntries, lock: int, damaged: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.entries = entries
        self.damaged = damaged
        self._lock = lock

    def add_layer(self, record: LayerRecord) -> None:
        self._append({"kind": "layer", **record.to_json()})
        self.entries.layers[record.layer] = record

    def add_snapshot(self, record: SnapshotRecord) -> None:
        self._append({"kind": "snapshot", "layer": record.layer, "file": record.file, "sha256": record.sha256})
        _take_snapshot(self.entries, record)

    def add_outside(self, written: WrittenFile) -> None:
        line = {"kind": "outside", "name": written.name, "num_bytes": written.num_bytes, "sha256": written.sha256}
        self._append(line)
        self.entries.outside = written

    def close(self) -> None:
        os.close(self._lock)

    def _append(self, line: dict[str, Any]) -> None:
        file = self.folder / JOURNAL_FILE
        num_bytes = 0
        try:
            with file.open("ab") as stream:
                num_bytes = stream.tell()
                stream.write(_line(line))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            with suppress(OSError):  # a torn line would take those behind it along
                os.truncate(file, num_bytes)
            raise output_error(file, error) from error


def open_journal(output: Path, fingerprint: dict[str, str], *, overwrite: bool = False) -> Journal:
    """Locks `output` and opens or begins its journal.

    With `overwrite`, a finished model and an unfinished run with another fingerprint are removed. Raises OutputError if the folder
    cannot be written, is in use, or has another run's.
    """
    lock = lock_output(output)
    try:
        entries = read_journal(output)
        if is_finished(output) and not overwrite:
            raise OutputError(
                f"{output} holds a finished model already; use --overwrite to replace it, or another folder"
            )
        if overwrite and (is_finished(output) or entries.fingerprint != fingerprint):
            remove_model(output)
            entries = JournalEntries()
        if not entries.layers:  # nothing to go on with, so nothing to compare with
            entries = JournalEntries()
        file = output / STATE_FOLDER / JOURNAL_FILE
        if not entries.fingerprint:
            entries = JournalEntries(fingerprint=fingerprint)
            write_bytes(file, _line({"kind": "run", "fingerprint": fingerprint}))
        elif file.stat().st_size > entries.num_good_bytes:
            os.truncate(file, entries.num_good_bytes)
        _compare(output, entries.fingerprint, fingerprint)
        return Journal(file.parent, entries, lock, _drop_damaged(output, entries))
    except BaseException as error:
        os.close(lock)
        if isinstance(error, OSError):
            raise output_error(output / STATE_FOLDER, error) from error
        raise


def read_journal(output: Path) -> JournalEntries:
    """The entries of a journal; empty if there is none. A torn last line is left out."""
    entries = JournalEntries()
    file = output / STATE_FOLDER / JOURNAL_FILE
    if not file.is_file():
        return entries
    for raw in file.read_bytes().splitlines(keepends=True):
        if not raw.endswith(b"\n"):
            break
        try:
            _take(entries, json.loads(raw))
        except (ValueError, KeyError, TypeError, AttributeError):  # nothing behind a damaged line can be trusted
            break
        entries.num_good_bytes += len(raw)
    return entries


def is_whole(file: Path, num_bytes: int, sha256: str) -> bool:
    """Whether a file is there and is what the journal says."""
    try:
        return file.stat().st_size == num_bytes and file_hash(file) == sha256
    except OSError:
        return False


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
        _take_snapshot(entries, SnapshotRecord(**line))
    elif kind == "outside":
        entries.outside = WrittenFile(**line)


def _take_snapshot(entries: JournalEntries, record: SnapshotRecord) -> None:
    """A snapshot written again takes the place of the one before."""
    entries.snapshots = [*(old for old in entries.snapshots if old.layer != record.layer), record]


def _line(fact: dict[str, Any]) -> bytes:
    return json.dumps(fact).encode() + b"\n"


def _drop_damaged(output: Path, entries: JournalEntries) -> tuple[str, ...]:
    """Takes out of `entries` whatever speaks of a file that is missing or changed. Returns the names of such files."""
    damaged = []
    for record in list(entries.layers.values()):
        if not is_whole(output / record.file, record.num_bytes, record.sha256):
            damaged.append(entries.layers.pop(record.layer).file)
    outside = entries.outside
    if outside and not is_whole(output / outside.name, outside.num_bytes, outside.sha256):
        damaged.append(outside.name)
        entries.outside = None
    return tuple(damaged)


def _compare(output: Path, before: dict[str, str], now: dict[str, str]) -> None:
    changed = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    if changed:
        pairs = {key: (before.get(key) or "nothing", now.get(key) or "nothing") for key in changed}
        details = "; ".join(f"{key}: {_difference(*pair)}" for key, pair in pairs.items())
        raise OutputError(f"{output} holds an unfinished run with other settings ({details}); {_REMEDY}")


def _difference(before: str, now: str) -> str:
    """The first words in which two texts differ: `n_grid: 20} then, n_grid: 10} now`."""
    then_words, now_words = before.split(), now.split()
    pairs = zip(then_words, now_words, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(then_words), len(now_words)))
    start = max(first - 1, 0)  # with the word before, which is often the name of the value
    return f"{_short(then_words[start:])} then, {_short(now_words[start:])} now"


def _short(words: list[str]) -> str:
    text = " ".join(words) or "nothing"
    return text if len(text) <= 40 else f"{text[:40]}…"
