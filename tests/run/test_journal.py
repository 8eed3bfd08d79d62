"""The log as a journal: facts are durable, read again, and damage costs little. See also test_resume.py and test_watch.py."""

from __future__ import annotations

import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from support.ring_messages import layer_record

from awqdist.checkpoint.writer import write_bytes
from awqdist.errors import OutputError
from awqdist.layer.records import LayerRecord, LinearRecord, MappingRecord, SiteRecord, SkippedMapping
from awqdist.run.events import (
    ChunkForwarded,
    Event,
    LayerFinished,
    MappingSearched,
    Message,
    OutsideCopied,
    RunFinished,
    SnapshotSaved,
    StageStarted,
    Thinning,
    Warned,
    WorkerStatus,
    encode,
    log_file,
)
from awqdist.run.journal import Journal, is_whole, open_journal, read_journal

FINGERPRINT = {"recipe": "AWQModifier: {n_grid: 20}\nignore: [lm_head]", "device": "cpu"}


def record(output: Path, layer: int) -> LayerRecord:
    """A finished layer, with its file."""
    written = write_bytes(output / f"model-layer-{layer:05d}.safetensors", b"layer %d" % layer)
    return LayerRecord(
        layer=layer,
        file=written.name,
        num_bytes=written.num_bytes,
        sha256=written.sha256,
        source_crc32=17,
        smoothing_error=1e-7,
        mappings=(MappingRecord("norm", ("q", "k"), None, False, 2.0, float("nan"), 3),),
        linears=(LinearRecord("q", (64, 32), 4, 32, False, 0.02, 0.01, 0.5, 1),),
        sites=(SiteRecord(("q", "k"), 256, float("inf")),),
        skipped=(SkippedMapping("a -> b", "why not"),),
        seconds={"read": 0.5},
        peak_memory_bytes=1000,
        source_sample=9,
    )


def add(journal: Journal, *events: Event) -> None:
    for event in events:
        journal.add(Message(event, 0, 5.0))


def finished(output: Path, layer: int) -> LayerFinished:
    return LayerFinished(layer, record(output, layer))


def begun(output: Path, num_layers: int = 2) -> Path:
    journal = open_journal(output, FINGERPRINT)
    add(journal, *(finished(output, layer) for layer in range(num_layers)))
    journal.close()
    return log_file(output)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "output", FINGERPRINT)
    first = record(tmp_path / "output", 0)
    outside = write_bytes(tmp_path / "output" / "outside", b"outside")
    copied = OutsideCopied(outside.name, outside.num_bytes, outside.sha256)
    add(journal, LayerFinished(0, first), SnapshotSaved(1, "boundary", "hash"), copied)
    journal.close()
    entries = read_journal(tmp_path / "output")
    assert entries.fingerprint == FINGERPRINT
    assert repr(entries.layers) == repr({0: first})  # NaN equals nothing, but looks like itself
    assert entries.snapshots == [SnapshotSaved(1, "boundary", "hash")]
    assert entries.outside == copied


def test_a_folder_without_a_journal_has_no_entries(tmp_path: Path) -> None:
    assert read_journal(tmp_path).fingerprint == {}
    assert read_journal(tmp_path / "nowhere").layers == {}


@pytest.mark.parametrize("num_bytes", [1, 2, 50])
def test_a_torn_line_stays_and_takes_no_later_one_along(tmp_path: Path, num_bytes: int) -> None:
    file = begun(tmp_path)
    torn = file.read_bytes()[:-num_bytes]
    file.write_bytes(torn)
    journal = open_journal(tmp_path, FINGERPRINT)
    left = [0] if num_bytes > 1 else [0, 1]  # a line that lacks the newline only is whole
    assert list(journal.entries.layers) == left
    add(journal, finished(tmp_path, 5))
    journal.close()
    assert list(read_journal(tmp_path).layers) == [*left, 5]
    assert file.read_bytes().startswith(torn + b"\n")


@pytest.mark.parametrize("file", ["../model-layer-00001.safetensors", "/etc/passwd", "..", ""])
def test_a_layer_whose_file_would_lie_elsewhere_is_not_believed(tmp_path: Path, file: str) -> None:
    log = begun(tmp_path)
    strange = replace(record(tmp_path, 2), file=file)
    with log.open("ab") as stream:
        stream.write(encode(Message(LayerFinished(2, strange), 0, 5.0)))
    assert list(read_journal(tmp_path).layers) == [0, 1]


def test_a_second_journal_on_one_folder_is_refused_until_the_first_is_closed(tmp_path: Path) -> None:
    first = open_journal(tmp_path, FINGERPRINT)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="in use by another running awqdist"):
            open_journal(tmp_path, FINGERPRINT, overwrite=overwrite)
    first.close()
    open_journal(tmp_path, FINGERPRINT).close()


def test_a_refused_journal_holds_no_lock(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(OutputError, match="other settings"):
        open_journal(tmp_path, {**FINGERPRINT, "device": "cuda"})
    open_journal(tmp_path, FINGERPRINT).close()


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"device": "cuda"}, r"\(device: cpu then, cuda now\)"),
        ({"recipe": "AWQModifier: {n_grid: 20}\nignore: []"}, r"recipe: ignore: \[lm_head\] then, ignore: \[\] now"),
        ({"recipe": "AWQModifier: {n_grid: 20}"}, r"recipe: 20} ignore: \[lm_head\] then, 20} now"),
        ({"new": "x"}, r"new: nothing then, x now"),
        ({"device": "cuda", "new": "x"}, r"device: .*; new: "),
    ],
)
def test_a_difference_is_told_by_its_first_words(tmp_path: Path, now: dict[str, str], words: str) -> None:
    begun(tmp_path)
    with pytest.raises(OutputError, match=words) as caught:
        open_journal(tmp_path, {**FINGERPRINT, **now})
    assert "\n" not in str(caught.value)


def test_a_run_without_a_finished_layer_may_begin_anew_with_other_settings(tmp_path: Path) -> None:
    begun(tmp_path, num_layers=0)
    before = log_file(tmp_path).read_bytes()
    open_journal(tmp_path, {"device": "cuda"}).close()
    assert read_journal(tmp_path).fingerprint == {"device": "cuda"}
    assert (tmp_path / ".awqdist" / "log-1.jsonl").read_bytes() == before


def test_layers_whose_files_are_not_what_the_log_says_are_left_out(tmp_path: Path) -> None:
    begun(tmp_path, num_layers=4)
    (tmp_path / "model-layer-00000.safetensors").unlink()
    (tmp_path / "model-layer-00001.safetensors").write_bytes(b"layer X")
    (tmp_path / "model-layer-00002.safetensors").write_bytes(b"layer 2 and more")
    journal = open_journal(tmp_path, FINGERPRINT)
    assert list(journal.entries.layers) == [3]
    assert [warning.split()[0] for warning in journal.warnings] == [
        f"model-layer-0000{i}.safetensors" for i in range(3)
    ]
    journal.close()


def test_a_layer_that_is_told_again_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    begun(tmp_path)
    journal = open_journal(tmp_path, FINGERPRINT)
    add(journal, finished(tmp_path, 1), SnapshotSaved(1, "boundary", "old"))
    add(journal, SnapshotSaved(2, "boundary-2", "x"), SnapshotSaved(1, "boundary", "new"))
    journal.close()
    entries = read_journal(tmp_path)
    assert sorted(entries.layers) == [0, 1]
    assert [snapshot.sha256 for snapshot in entries.snapshots] == ["x", "new"]


def test_a_journal_that_cannot_be_appended_to_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = open_journal(tmp_path, FINGERPRINT)
    done = finished(tmp_path, 0)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="no space left on the disk"):
        add(journal, done)
    assert journal.entries.layers == {}
    journal.close()


def test_a_file_is_whole_if_size_and_hash_agree(tmp_path: Path) -> None:
    written = write_bytes(tmp_path / "file", b"words")
    assert is_whole(tmp_path / "file", written.num_bytes, written.sha256)
    assert not is_whole(tmp_path / "file", 4, written.sha256)
    assert not is_whole(tmp_path / "file", written.num_bytes, "0" * 64)
    assert not is_whole(tmp_path / "nowhere", written.num_bytes, written.sha256)
    assert not is_whole(tmp_path, 0, written.sha256)


def test_a_line_that_did_not_fit_on_the_disk_takes_no_later_one_along(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, FINGERPRINT)
    file = log_file(tmp_path)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, unlimited[1]))
    try:
        with pytest.raises(OutputError):
            add(journal, SnapshotSaved(1, "boundary-00001.safetensors", "00"))
        add(journal, Warned("of which nobody needs to know"))  # costs a line, not the run
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    add(journal, SnapshotSaved(2, "boundary-00002.safetensors", "00"))
    journal.close()
    assert [record.layer for record in read_journal(tmp_path).snapshots] == [2]


def test_facts_that_a_resumed_run_needs_are_synced_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(tmp_path, FINGERPRINT)
    sizes: list[int] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    needed = [LayerFinished(1, layer_record(1)), SnapshotSaved(1, "b", "0"), OutsideCopied("o", 1, "0")]
    for event in [*needed, RunFinished("o", 1.0, 1.0, 1)]:
        add(journal, StageStarted(0, "read"), event)
        assert sizes.pop() == log_file(tmp_path).stat().st_size
        assert sizes == []
    journal.close()


def test_twelve_hours_of_64_workers_fill_less_than_20_mb() -> None:
    """A chunk takes half a minute and a status is told every 2 s, but the log hears of both once a minute and worker."""
    thinning, num_bytes, host_bytes = Thinning(), 0, 3 << 40
    for worker in range(64):
        for second in range(0, 12 * 3600, 2):
            told: list[Event] = [WorkerStatus(host_bytes, host_bytes, 100)]
            if second % 30 == 0:
                told.append(ChunkForwarded(100 + worker, 1 + second // 30, 10_000, 16_384, 29.987654321012345))
            for event in told:
                line = thinning.line_of(Message(event, worker, 1_700_000_000.123456 + second))
                num_bytes += len(encode(line)) if line else 0
    assert num_bytes < 20_000_000


def test_chunks_are_added_up_and_the_first_and_the_last_of_a_layer_are_written() -> None:
    thinning, lines = Thinning(), []
    for layer in (3, 5):
        for chunk in range(8):
            message = Message(ChunkForwarded(layer, chunk, 8, 2048, 20.0), 1, 1000.0 + 200 * layer + 20 * chunk)
            lines.append(thinning.line_of(message))
            assert (
                thinning.line_of(replace(message, worker=2, event=WorkerStatus(1, 1, None))) is None or chunk % 3 == 0
            )
    written = [line.event for line in lines if line]
    assert [(e.layer, e.chunk, e.num_tokens, e.seconds) for e in written if isinstance(e, ChunkForwarded)] == [
        (layer, chunk, 2048 * num, 20.0 * num) for layer in (3, 5) for chunk, num in ((0, 1), (3, 3), (6, 3), (7, 1))
    ]


def test_mappings_are_not_in_the_log_twice() -> None:
    assert Thinning().line_of(Message(MappingSearched(0, layer_record(0).mappings[0]), 0, 1.0)) is None
