"""What of a run is already safe: the log, replayed, and checked against the files that it speaks of.

A fact is durable, which means written to the log and synced, before anyone is told of it, and after the file that it is about. The
first line holds the fingerprint: everything that decides the bytes of the result. A run that is resumed must have the same one. A
damaged line costs that line only. Nothing in the log is ever changed: a log that nothing can be resumed from is set aside under
another name. The lock beside the log is held by a living process only.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from awqdist.checkpoint.writer import output_error, write_bytes
from awqdist.errors import OutputError
from awqdist.layer.records import LayerRecord
from awqdist.run.events import (
    STATE_FOLDER,
    Event,
    LayerFinished,
    Log,
    LogBegun,
    LogWriter,
    Message,
    OutsideCopied,
    RunFinished,
    SnapshotSaved,
    Thinning,
    encode,
    log_file,
    read_log,
)
from awqdist.run.output import is_finished, lock_output, remove_model

OLD_JOURNAL = "journal.jsonl"  # of awqdist 0.1
_REMEDY = "use another output folder, the same settings as before, or --overwrite"


@dataclass(slots=True)
class JournalEntries:
    """The durable facts of a log."""

    fingerprint: dict[str, str] = field(default_factory=dict)
    layers: dict[int, LayerRecord] = field(default_factory=dict)
    snapshots: list[SnapshotSaved] = field(default_factory=list)
    outside: OutsideCopied | None = None

    def take(self, event: Event) -> None:
        """Adds a fact; one that is told again takes the place of the one before. Other events change nothing."""
        match event:
            case LogBegun(fingerprint):
                self.fingerprint = fingerprint
            case LayerFinished(layer, record) if layer == record.layer and _is_plain(record.file):
                self.layers[layer] = record
            case SnapshotSaved(layer, file) if _is_plain(file):
                self.snapshots = [*(old for old in self.snapshots if old.layer != layer), event]
            case OutsideCopied(name) if _is_plain(name):
                self.outside = event


class Journal:
    """The log of a run that goes on, open for appending. Create it with `open_journal`.

    Attributes:
        folder: the state folder, in which the log and the snapshots lie.
        entries: all durable facts so far.
        earlier: the messages of earlier runs.
        warnings: what was found damaged when the log was opened, for the user.
    """

    def __init__(
        self, file: Path, entries: JournalEntries, earlier: tuple[Message, ...], warnings: list[str], lock: int
    ) -> None:
        self.folder, self.entries, self.earlier, self.warnings = file.parent, entries, earlier, warnings
        self._file, self._lock, self._thinning = file, lock, Thinning()
        self._writer = LogWriter(file)

    def add(self, message: Message) -> None:
        """Appends a message to the log, if it is not thinned out. Returns once a durable fact is on the disk.

        Raises:
            OutputError: a fact that a resumed run needs cannot be written. A full disk costs all other lines, but not the run.
        """
        line = self._thinning.line_of(message)
        if line is None:
            return
        is_needed = isinstance(line.event, LayerFinished | SnapshotSaved | OutsideCopied)
        try:
            self._writer.append(line, durable=is_needed or isinstance(line.event, RunFinished))
        except OSError as error:
            if is_needed:
                raise output_error(self._file, error) from error
        self.entries.take(line.event)

    def close(self) -> None:
        """Closes the log and gives the lock back."""
        self._writer.close()
        os.close(self._lock)


def open_journal(output: Path, fingerprint: dict[str, str], *, overwrite: bool = False) -> Journal:
    """Locks `output` and opens its log, or begins one.

    Args:
        output: the output folder, which is made if need be.
        fingerprint: everything that decides the bytes of the result (`job.fingerprint`).
        overwrite: remove a finished model, and an unfinished run with another fingerprint.

    Raises:
        OutputError: the folder cannot be written, is in use, or holds something else.
    """
    lock = lock_output(output)
    try:
        file, finished = log_file(output), is_finished(output)
        log, entries, warnings = read_log(file), read_journal(output), []
        is_old = not file.exists() and bool(entries.fingerprint)
        if finished and not overwrite:
            raise OutputError(
                f"{output} holds a finished model already; use --overwrite to replace it, or another folder"
            )
        if overwrite and (finished or is_old or entries.fingerprint != fingerprint):
            remove_model(output)
            log, entries = Log(), JournalEntries()
        elif is_old and entries.layers:
            raise OutputError(
                f"{output} holds an unfinished run of awqdist 0.1, which this version cannot resume; finish it with that"
                " version, use another output folder, or --overwrite"
            )
        if log.damaged:
            cost = (
                "layers that only they told of are"
                if entries.fingerprint
                else "the first among them, so all layers are"
            )
            lines = ", ".join(map(str, log.damaged[:5])) + (", …" if len(log.damaged) > 5 else "")
            warnings.append(f"{file}: damaged lines {lines}; {cost} made again")
        if entries.layers:
            _compare(output, entries.fingerprint, fingerprint)
        elif is_old or entries.fingerprint != fingerprint:
            log, entries = Log(), JournalEntries(fingerprint)
            _set_aside(file)
            write_bytes(file, encode(Message(LogBegun(fingerprint), None, time.time())))
        warnings += _drop_damaged(output, entries)
        return Journal(file, entries, log.messages, warnings, lock)
    except BaseException as error:
        os.close(lock)
        if isinstance(error, OSError):
            raise output_error(log_file(output), error) from error
        raise


def read_journal(output: Path) -> JournalEntries:
    """Returns the durable facts about an output folder; of a folder of awqdist 0.1 as well. Empty if there are none.

    Without its first line a log is not trusted, for nobody knows under which settings the layers were made.
    """
    file = log_file(output)
    if not file.exists():
        return _read_old(output / STATE_FOLDER / OLD_JOURNAL)
    entries = JournalEntries()
    for message in read_log(file).messages:
        entries.take(message.event)
    return entries if entries.fingerprint else JournalEntries()


def is_whole(file: Path, num_bytes: int, sha256: str) -> bool:
    """Returns whether a file is there and has this size and hash."""
    try:
        return file.stat().st_size == num_bytes and file_hash(file) == sha256
    except OSError:
        return False


def file_hash(file: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_old(file: Path) -> JournalEntries:
    """Reads the journal of awqdist 0.1, as far as it is undamaged."""
    entries = JournalEntries()
    kinds: dict[str, type] = {"run": LogBegun, "snapshot": SnapshotSaved, "outside": OutsideCopied}
    with suppress(FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        for line in file.read_bytes().splitlines():
            data = json.loads(line)
            if data["kind"] == "layer":
                record = TypeAdapter(LayerRecord).validate_python(data)
                entries.take(LayerFinished(record.layer, record))
            else:
                entries.take(TypeAdapter(kinds[data["kind"]]).validate_python(data))
    return entries


def _is_plain(name: str) -> bool:
    """Returns whether a file name leads nowhere but into its folder."""
    return name == Path(name).name and name not in ("", "..")


def _set_aside(file: Path) -> None:
    """Renames a log that nothing can be resumed from; an empty file is left to be replaced."""
    if file.is_file() and file.stat().st_size:
        numbers = (number for number in range(1, 1 << 20) if not file.with_name(f"log-{number}.jsonl").exists())
        file.rename(file.with_name(f"log-{next(numbers)}.jsonl"))


def _drop_damaged(output: Path, entries: JournalEntries) -> list[str]:
    """Takes out of `entries` whatever speaks of a file that is missing or changed. Returns a warning for each."""
    damaged = []
    for record in list(entries.layers.values()):
        if not is_whole(output / record.file, record.num_bytes, record.sha256):
            damaged.append(entries.layers.pop(record.layer).file)
    outside = entries.outside
    if outside and not is_whole(output / outside.name, outside.num_bytes, outside.sha256):
        damaged.append(outside.name)
        entries.outside = None
    return [f"{file} is missing or damaged since the earlier run; it is made again" for file in damaged]


def _compare(output: Path, before: dict[str, str], now: dict[str, str]) -> None:
    changed = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    if changed:
        pairs = {key: (before.get(key) or "nothing", now.get(key) or "nothing") for key in changed}
        details = "; ".join(f"{key}: {_difference(*pair)}" for key, pair in pairs.items())
        raise OutputError(f"{output} holds an unfinished run with other settings ({details}); {_REMEDY}")


def _difference(before: str, now: str) -> str:
    """Returns the first words in which two texts differ: `n_grid: 20} then, n_grid: 10} now`."""
    then_words, now_words = before.split(), now.split()
    pairs = zip(then_words, now_words, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(then_words), len(now_words)))
    start = max(first - 1, 0)  # with the word before, which is often the name of the value
    return f"{_short(then_words[start:])} then, {_short(now_words[start:])} now"


def _short(words: list[str]) -> str:
    text = " ".join(words) or "nothing"
    return text if len(text) <= 40 else f"{text[:40]}…"
