"""The journal: what is written is read again, and what is torn is left out. See also test_resume.py."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import pytest

from awqdist.checkpoint.writer import write_bytes
from awqdist.errors import OutputError
from awqdist.layer.records import LayerRecord, LinearRecord, MappingRecord, SiteRecord, SkippedMapping
from awqdist.run.journal import Journal, SnapshotRecord, is_whole, open_journal, read_journal

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


def begun(output: Path, num_layers: int = 2) -> Path:
    journal = open_journal(output, FINGERPRINT)
    for layer in range(num_layers):
        journal.add_layer(record(output, layer))
    journal.close()
    return output / ".awqdist" / "journal.jsonl"


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "output", FINGERPRINT)
    first = record(tmp_path / "output", 0)
    journal.add_layer(first)
    journal.add_snapshot(SnapshotRecord(1, "boundary", "hash"))
    journal.add_outside(write_bytes(tmp_path / "output" / "outside", b"outside"))
    journal.close()
    entries = read_journal(tmp_path / "output")
    assert entries.fingerprint == FINGERPRINT
    assert repr(entries.layers) == repr({0: first})  # NaN equals nothing, but looks like itself
    assert entries.snapshots == [SnapshotRecord(1, "boundary", "hash")]
    assert entries.outside is not None
    assert entries.outside.name == "outside"
    assert entries.num_good_bytes == (tmp_path / "output" / ".awqdist" / "journal.jsonl").stat().st_size


def test_a_folder_without_a_journal_has_no_entries(tmp_path: Path) -> None:
    assert read_journal(tmp_path).fingerprint == {}
    assert read_journal(tmp_path / "nowhere").layers == {}


@pytest.mark.parametrize("num_bytes", [1, 2, 50])
def test_a_torn_line_is_cut_off_before_the_next_is_written(tmp_path: Path, num_bytes: int) -> None:
    file = begun(tmp_path)
    file.write_bytes(file.read_bytes()[:-num_bytes])
    journal = open_journal(tmp_path, FINGERPRINT)
    assert list(journal.entries.layers) == [0]
    journal.add_layer(record(tmp_path, 5))
    journal.close()
    assert list(read_journal(tmp_path).layers) == [0, 5]
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 3


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
    open_journal(tmp_path, {"device": "cuda"}).close()
    assert read_journal(tmp_path).fingerprint == {"device": "cuda"}


def test_layers_whose_files_are_not_what_the_journal_says_are_left_out(tmp_path: Path) -> None:
    begun(tmp_path, num_layers=4)
    (tmp_path / "model-layer-00000.safetensors").unlink()
    (tmp_path / "model-layer-00001.safetensors").write_bytes(b"layer X")
    (tmp_path / "model-layer-00002.safetensors").write_bytes(b"layer 2 and more")
    journal = open_journal(tmp_path, FINGERPRINT)
    assert list(journal.entries.layers) == [3]
    assert journal.damaged == tuple(f"model-layer-0000{i}.safetensors" for i in range(3))
    journal.close()


def test_a_layer_journalled_again_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    begun(tmp_path)
    journal = open_journal(tmp_path, FINGERPRINT)
    again = record(tmp_path, 1)
    journal.add_layer(again)
    journal.add_snapshot(SnapshotRecord(1, "boundary", "old"))
    journal.add_snapshot(SnapshotRecord(2, "boundary-2", "x"))
    journal.add_snapshot(SnapshotRecord(1, "boundary", "new"))
    journal.close()
    entries = read_journal(tmp_path)
    assert sorted(entries.layers) == [0, 1]
    assert [snapshot.sha256 for snapshot in entries.snapshots] == ["x", "new"]


def test_a_journal_that_cannot_be_appended_to_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = open_journal(tmp_path, FINGERPRINT)
    done = record(tmp_path, 0)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="no space left on the disk"):
        journal.add_layer(done)
    assert isinstance(journal, Journal)
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
    file = tmp_path / ".awqdist" / "journal.jsonl"
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, unlimited[1]))
    try:
        with pytest.raises(OutputError):
            journal.add_snapshot(SnapshotRecord(1, "boundary-00001.safetensors", "00"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    journal.add_snapshot(SnapshotRecord(2, "boundary-00002.safetensors", "00"))
    journal.close()
    assert [record.layer for record in read_journal(tmp_path).snapshots] == [2]
