"""Runs that keep their activations on a disk: the same bytes, nothing left behind, and clear words when the disk fails."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
from support.command_line import awqdist, model_files, start
from support.rings import Ring, ray_cluster, run
from support.tiny_llama import Tiny

from awqdist.offload.store import PlainFiles

LEVELS = ["cpu", "disk", pytest.param("nvme", marks=pytest.mark.nvme)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("snapshot_every", [1, 3])
def test_the_bytes_do_not_depend_on_where_chunks_lie(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, level: str, snapshot_every: int
) -> None:
    output = tmp_path / "output"
    options = tiny.options("--offload", level, "--snapshot-every", snapshot_every)
    outcome = awqdist("quantize", tiny.model, output, *options)
    assert outcome.code == 0, outcome.stderr
    assert model_files(output) == model_files(undisturbed)
    assert not outcome.count("Warned")
    assert sorted(path.name for path in (output / ".awqdist").iterdir()) == ["lock", "log.jsonl"]


def test_chunks_lie_in_the_given_folder_as_many_at_a_time_as_there_are(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    write = PlainFiles.write

    def watched(self: PlainFiles, file: Path, data: object) -> None:
        written.append(file)
        write(self, file, data)  # type: ignore[arg-type]

    monkeypatch.setattr(PlainFiles, "write", watched)
    folder, output = tmp_path / "fast disk", tmp_path / "output"
    options = tiny.options("--offload", "disk", "--offload-dir", folder, "--snapshot-every", 8)
    assert awqdist("quantize", tiny.model, output, *options).code == 0
    assert model_files(output) == model_files(undisturbed)
    assert 2 <= len(written) <= 2 * 4  # two chunks, four layers; what is taken before it is written never is
    assert {file.parent.parent for file in written} == {folder}
    assert list(folder.iterdir()) == []


def test_with_enough_memory_nothing_is_written_beside_the_model(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: PlainFiles, file: Path, data: object) -> None:
        raise AssertionError(file)

    monkeypatch.setattr(PlainFiles, "write", refuse)
    options = tiny.options("--offload", "disk", "--cpu-memory", "8GB")
    assert awqdist("quantize", tiny.model, tmp_path / "output", *options).code == 0


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_too_little_memory_for_a_layer_is_refused_before_the_run_with_the_figure(
    tiny: Tiny, tmp_path: Path, command: str
) -> None:
    where = [tmp_path / "output", *tiny.options()] if command == "quantize" else ["--recipe", tiny.recipe]
    for level in ("cpu", "disk"):
        outcome = awqdist(command, tiny.model, *where, "--offload", level, "--cpu-memory", "100MB")
        assert "--cpu-memory 100.0 MB is too little: " in outcome.error_line()
    assert not (tmp_path / "output").exists()


def test_a_run_without_the_compiled_operator_says_so_once_and_compiles_nothing(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    outcome = awqdist("quantize", tiny.model, tmp_path / "output", *tiny.options("--offload", "nvme"))
    warnings = [event["message"] for event in outcome.events if event["event"] == "Warned"]
    assert len(warnings) == 1
    assert "is not compiled; run `awqdist doctor --build-nvme` once; using plain files in" in warnings[0]
    assert model_files(tmp_path / "output") == model_files(undisturbed)
    assert not [path for path in (tmp_path / "extensions").rglob("*") if path.is_file()]


def test_an_amount_of_memory_that_is_none_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    outcome = awqdist("quantize", tiny.model, tmp_path / "output", *tiny.options("--cpu-memory", "much"))
    assert "'much' is no amount of memory; give one such as 1.5GB" in outcome.error_line()


def test_a_full_offload_disk_ends_the_run_with_one_line_and_the_same_command_resumes(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, write = tmp_path / "output", PlainFiles.write

    def full_at_last(self: PlainFiles, file: Path, data: object) -> None:
        if "layer-00003" in file.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, file, data)  # type: ignore[arg-type]

    options = tiny.options("--offload", "disk")
    with monkeypatch.context() as patched:
        patched.setattr(PlainFiles, "write", full_at_last)
        line = awqdist("quantize", tiny.model, output, *options).error_line()
    assert "No space left on device" in line
    assert "free space there, or give an --offload-dir with enough space" in line
    assert sorted(path.name for path in (output / ".awqdist").iterdir() if path.is_dir()) == []
    assert awqdist("quantize", tiny.model, output, *options).code == 0
    assert model_files(output) == model_files(undisturbed)


@pytest.mark.parametrize("resumed_with", ["cpu", "disk"])
def test_what_a_killed_run_left_in_its_offload_folder_is_swept_at_the_resumed_start(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, resumed_with: str
) -> None:
    output = tmp_path / "output"
    child = start(tmp_path, "quantize", tiny.model, output, *tiny.options("--offload", "disk"))
    child.await_event("LayerFinished", 2)
    assert child.kill().code == -signal.SIGKILL
    assert len(list((output / ".awqdist" / "offload").glob("awqdist-kept-*.lock"))) == 1
    outcome = awqdist("quantize", tiny.model, output, *tiny.options("--offload", resumed_with))
    assert outcome.code == 0, outcome.stderr
    assert model_files(output) == model_files(undisturbed)
    assert sorted(path.name for path in (output / ".awqdist").iterdir()) == ["lock", "log.jsonl"]


def test_overwriting_removes_the_offload_folder_of_a_killed_run(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    child = start(tmp_path, "quantize", tiny.model, output, *tiny.options("--offload", "disk"))
    child.await_event("LayerFinished", 1)
    child.kill()
    assert awqdist("quantize", tiny.model, output, *tiny.options(), "--overwrite").code == 0
    assert model_files(output) == model_files(undisturbed)


@pytest.mark.torchrun
def test_a_ring_that_offloads_writes_the_bytes_of_a_single_worker(
    tiny: Tiny, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    outcome = run(Ring("torchrun", 2), tiny, output, "--offload", "disk", "--cpu-memory", "8GB")
    assert outcome.code == 0, outcome.stderr
    assert model_files(output) == model_files(undisturbed)
    outcome = run(Ring("torchrun", 2), tiny, tmp_path / "other", "--offload", "disk")
    assert outcome.code == 0, outcome.stderr
    assert model_files(tmp_path / "other") == model_files(undisturbed)
    assert sorted(path.name for path in (tmp_path / "other" / ".awqdist").iterdir()) == ["lock", "log.jsonl"]


@pytest.mark.ray
def test_workers_of_a_cluster_that_offload_leave_nothing_behind(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fast disk"
    with ray_cluster() as cluster:
        cluster.add_node(num_cpus=2)
        ring = Ring("ray", 2, address=cluster.address)
        outcome = run(ring, tiny, tmp_path / "output", "--offload", "disk", "--offload-dir", folder)
    assert outcome.code == 0, outcome.stderr
    assert model_files(tmp_path / "output") == model_files(undisturbed)
    assert list(folder.iterdir()) == []
