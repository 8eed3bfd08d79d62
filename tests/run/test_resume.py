"""A run that is killed at any moment and started again ends with the same bytes, and does nothing twice."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import Child, Outcome, awqdist, contents, die_at, folder_as_it_was, model_files, start
from support.tiny_llama import NUM_LAYERS, RECIPE, Tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from awqdist.run.events import LayerFinished, LogBegun, OutsideCopied, SnapshotSaved, log_file, read_log

SEED = random.SystemRandom().randrange(1 << 32)  # printed by every failing test
NUM_FILE_OPERATIONS = 57  # of a run that nothing disturbs


def run(tiny: Tiny, output: Path, *options: object) -> Outcome:
    return awqdist("quantize", tiny.model, output, *tiny.options(*options))


def interrupted(tiny: Tiny, output: Path, num_layers: int, *options: object) -> Outcome:
    """A run killed by SIGKILL just after its n-th layer was finished; the layer is in the log, no later one is."""
    prepare = after_each_layer(lambda count: count == num_layers and os.kill(os.getpid(), signal.SIGKILL))
    outcome = start(output.parent, "quantize", tiny.model, output, *tiny.options(*options), prepare=prepare).wait()
    assert outcome.code == -signal.SIGKILL
    assert log_file(output).is_file()
    return outcome


def after_each_layer(act: Callable[[int], object]) -> Callable[[], None]:
    """For `start`: calls `act` with the number of finished layers once another is in the log, before anyone hears of it."""

    def prepare() -> None:
        from awqdist.run.events import LayerFinished, Message
        from awqdist.run.journal import Journal

        add = Journal.add

        def add_and_act(self: Journal, message: Message) -> None:
            add(self, message)
            if isinstance(message.event, LayerFinished):
                act(len(self.entries.layers))

        Journal.add = add_and_act  # type: ignore[method-assign]

    return prepare


def finish(tiny: Tiny, output: Path, undisturbed: Path, *options: object) -> Outcome:
    outcome = run(tiny, output, *options)
    assert outcome.code == 0, outcome.stderr
    assert model_files(output) == model_files(undisturbed)
    assert sorted(path.name for path in (output / ".awqdist").iterdir()) == ["lock", "log.jsonl"]
    return outcome


def test_two_undisturbed_runs_write_the_same_bytes(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    finish(tiny, tmp_path / "again", undisturbed)


@pytest.mark.parametrize("draw", range(12))
def test_a_run_killed_while_it_touches_a_file_resumes_to_the_same_bytes(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, draw: int
) -> None:
    moment = random.Random(SEED + draw).randint(1, NUM_FILE_OPERATIONS)
    print(f"killed at file operation {moment}")
    output = tmp_path / "output"
    first = start(tmp_path, "quantize", tiny.model, output, *tiny.options(), prepare=die_at(output, moment)).wait()
    check_second_run(tiny, output, undisturbed, first)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(1, NUM_FILE_OPERATIONS + 1))
def test_a_run_killed_at_every_file_operation_resumes_to_the_same_bytes(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, moment: int
) -> None:
    output = tmp_path / "output"
    first = start(tmp_path, "quantize", tiny.model, output, *tiny.options(), prepare=die_at(output, moment)).wait()
    check_second_run(tiny, output, undisturbed, first)


@pytest.mark.parametrize("draw", range(8))
def test_a_run_killed_at_a_random_time_resumes_to_the_same_bytes(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, draw: int
) -> None:
    chance = random.Random(SEED - draw)
    delay_s, event = chance.uniform(0, 0.03), chance.choice(["RunStarted", "LayerFinished", "ChunkForwarded"])
    count = chance.randint(1, NUM_LAYERS if event == "LayerFinished" else 1)
    print(f"killed {delay_s:.4f} s after event {count} of {event}")
    child = start(tmp_path, "quantize", tiny.model, tmp_path / "output", *tiny.options("--snapshot-every", 2))
    child.await_event(event, count)
    time.sleep(delay_s)
    check_second_run(tiny, tmp_path / "output", undisturbed, child.kill(), "--snapshot-every", 2)


def test_a_run_killed_again_and_again_comes_to_the_same_bytes(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    output, chance = tmp_path / "output", random.Random(SEED)
    while not (output / "model.safetensors.index.json").exists():
        moment = chance.randint(8, 40)  # each time far enough for one more layer
        print(f"killed at file operation {moment}")
        start(tmp_path, "quantize", tiny.model, output, *tiny.options(), prepare=die_at(output, moment)).wait()
    assert model_files(output) == model_files(undisturbed)


def check_second_run(tiny: Tiny, output: Path, undisturbed: Path, first: Outcome, *options: object) -> None:
    if (output / "model.safetensors.index.json").exists():  # it came to its end, all but the last words
        assert model_files(output) == model_files(undisturbed)
        assert "holds a finished model" in run(tiny, output, *options).error_line()
        return
    assert first.code == -signal.SIGKILL, first.stderr
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(output if output.is_dir() else output.parent)
    second = finish(tiny, output, undisturbed, *options)
    finished_before = second.events[0]["num_finished_layers"]
    assert first.count("LayerFinished") in (finished_before, finished_before - 1)  # killed between log and listener
    assert second.count("LayerFinished") == NUM_LAYERS - finished_before


def test_a_real_process_killed_twice_resumes_to_the_same_bytes(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "awqdist", "quantize", tiny.model, tmp_path / "output", *tiny.options()]
    for wanted in (1, 3):
        with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = (line for line in process.stdout if '"LayerFinished"' in line and f'"layer":{wanted},' in line)
            assert next(lines, None) is not None
            process.kill()
    finish(tiny, tmp_path / "output", undisturbed)


def test_no_loader_takes_an_output_without_its_index_for_a_model(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "output")
    (tmp_path / "output" / "model.safetensors.index.json").unlink()  # the last file that a run writes
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "output")


def test_a_resumed_run_searches_only_what_is_not_finished(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    interrupted(tiny, tmp_path / "output", 2)
    second = finish(tiny, tmp_path / "output", undisturbed)
    assert [event["layer"] for event in second.events if event["event"] == "LayerFinished"] == [2, 3]


def test_a_snapshot_saves_the_forward_pass_of_finished_layers(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    interrupted(tiny, tmp_path / "output", 3)
    second = finish(tiny, tmp_path / "output", undisturbed)
    assert second.count("LayerForwarded") == 1  # the snapshot in front of layer 2 is the newest that was written


def test_without_snapshots_finished_layers_are_forwarded(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    interrupted(tiny, tmp_path / "output", 3, "--snapshot-every", 100)
    assert finish(tiny, tmp_path / "output", undisturbed).count("LayerForwarded") == 3


def test_the_distance_of_snapshots_may_change_between_runs(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    interrupted(tiny, tmp_path / "output", 2, "--snapshot-every", 1)
    finish(tiny, tmp_path / "output", undisturbed, "--snapshot-every", 3)


@pytest.mark.parametrize("num_damaged", [1, 2])
def test_a_damaged_snapshot_is_passed_over_for_the_one_before_it(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, num_damaged: int
) -> None:
    output = tmp_path / "output"
    interrupted(tiny, output, 4)
    snapshots = sorted((output / ".awqdist").glob("boundary-*.safetensors"), reverse=True)
    assert len(snapshots) == 2  # no more are kept
    (output / "model-layer-00003.safetensors").unlink()
    for snapshot in snapshots[:num_damaged]:
        flip_last_byte(snapshot)
    second = finish(tiny, output, undisturbed)
    assert second.count("LayerForwarded") == {1: 1, 2: 3}[num_damaged]
    assert second.count("LayerFinished") == 1


def test_two_snapshots_are_kept_after_one_was_written_again(tiny: Tiny, tmp_path: Path) -> None:
    output = tmp_path / "output"
    interrupted(tiny, output, 3)
    flip_last_byte(output / ".awqdist" / "boundary-00002.safetensors")
    start(
        tmp_path, "quantize", tiny.model, output, *tiny.options(), prepare=die_at(output, 1)
    ).wait()  # nothing done, the damage still there
    interrupted(tiny, output, 4)
    assert sorted(path.name for path in (output / ".awqdist").glob("boundary-*")) == [
        "boundary-00002.safetensors",
        "boundary-00003.safetensors",
    ]


@pytest.mark.parametrize("damage", ["unlink", "flip", "truncate"])
def test_a_finished_layer_whose_file_is_damaged_is_made_again(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, damage: str
) -> None:
    output = tmp_path / "output"
    interrupted(tiny, output, 3)
    damage_file(output / "model-layer-00001.safetensors", damage)
    second = finish(tiny, output, undisturbed)
    assert [event["layer"] for event in second.events if event["event"] == "LayerFinished"] == [1, 3]
    warnings = [event["message"] for event in second.events if event["event"] == "Warned"]
    assert len(warnings) == 1
    assert "model-layer-00001.safetensors" in warnings[0]


@pytest.mark.parametrize("damage", ["unlink", "flip", "truncate"])
def test_tensors_outside_the_layers_are_copied_again_when_damaged(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, damage: str
) -> None:
    output = tmp_path / "output"
    shutil.copytree(undisturbed, output)
    (output / "model.safetensors.index.json").unlink()
    damage_file(output / "model-outside.safetensors", damage)
    assert finish(tiny, output, undisturbed).count("LayerFinished") == 0


def flip_last_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x10
    file.write_bytes(data)


def damage_file(file: Path, damage: str) -> None:
    if damage == "unlink":
        file.unlink()
    elif damage == "flip":
        flip_last_byte(file)
    else:
        file.write_bytes(file.read_bytes()[:-100])


def damaged_log(output: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    """Changes the lines of the log."""
    log_file(output).write_bytes(b"".join(change(log_file(output).read_bytes().splitlines(keepends=True))))


def lines_with(lines: list[bytes], event: str) -> list[int]:
    return [number for number, line in enumerate(lines) if line.startswith(b'{"event":"%s"' % event.encode())]


@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_a_torn_last_line_of_the_log_costs_one_layer(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, kept: float
) -> None:
    output = tmp_path / "output"
    interrupted(tiny, output, 3)
    damaged_log(output, lambda lines: [*lines[:-1], lines[-1][: int(len(lines[-1]) * kept)]])
    before = log_file(output).read_bytes()
    assert finish(tiny, output, undisturbed).count("LayerFinished") == 2
    assert log_file(output).read_bytes().startswith(before)  # appended to, never changed


@pytest.mark.parametrize("damage", [b"", b'{"event":"LogBegun","ti', b"\0" * 4096])
def test_a_log_that_never_began_is_begun(tiny: Tiny, undisturbed: Path, tmp_path: Path, damage: bytes) -> None:
    output = tmp_path / "output"
    (output / ".awqdist").mkdir(parents=True)
    log_file(output).write_bytes(damage)
    assert run(tiny, output).code == 0
    assert model_files(output) == model_files(undisturbed)


@pytest.mark.parametrize("damage", [b"\0" * 50, b"[]", b"{}", b'{"event": "LayerFinished", "layer": 1}', b"\xff"])
def test_a_damaged_line_costs_the_layer_that_it_told_of_and_no_other(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, damage: bytes
) -> None:
    output = tmp_path / "output"
    interrupted(tiny, output, 3)

    def damage_layer_1(lines: list[bytes]) -> list[bytes]:
        lines[lines_with(lines, "LayerFinished")[1]] = damage + b"\n"
        return lines

    damaged_log(output, damage_layer_1)
    outcome = finish(tiny, output, undisturbed)
    assert [event["layer"] for event in outcome.events if event["event"] == "LayerFinished"] == [1, 3]
    (warning,) = (event["message"] for event in outcome.events if event["event"] == "Warned")
    assert "damaged lines" in warning


def test_lines_added_by_nobody_cost_nothing(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    interrupted(tiny, output, 3)
    damaged_log(output, lambda lines: [*lines[:3], b"no line of ours\n", *lines[3:]])
    assert finish(tiny, output, undisturbed).count("LayerFinished") == 1


def test_without_its_first_line_a_log_is_set_aside_and_all_layers_are_made_again(
    tiny: Tiny, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    interrupted(tiny, output, 3)
    damaged_log(output, lambda lines: [lines[0].replace(b"recipe", b"recope"), *lines[1:]])
    before = log_file(output).read_bytes()
    outcome = run(tiny, output)
    assert outcome.count("LayerFinished") == NUM_LAYERS
    assert "all layers are made again" in next(e["message"] for e in outcome.events if e["event"] == "Warned")
    assert model_files(output) == model_files(undisturbed)
    assert (output / ".awqdist" / "log-1.jsonl").read_bytes() == before


def as_version_0_1(output: Path) -> None:
    """Turns the log into the two files that awqdist 0.1 wrote."""
    lines = []
    for message in read_log(log_file(output)).messages:
        match message.event:
            case LogBegun(fingerprint):
                lines.append({"kind": "run", "fingerprint": fingerprint})
            case LayerFinished(_, record):
                lines.append({"kind": "layer", **asdict(record)})
            case SnapshotSaved() | OutsideCopied() as event:
                kind = "snapshot" if isinstance(event, SnapshotSaved) else "outside"
                lines.append({"kind": kind, **asdict(event)})
    (output / ".awqdist" / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log_file(output).rename(output / "events.jsonl")


def test_a_finished_model_of_version_0_1_is_verified(undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    shutil.copytree(undisturbed, output)
    as_version_0_1(output)
    assert awqdist("verify", output).code == 0


def test_an_unfinished_run_of_version_0_1_is_refused_or_overwritten(
    tiny: Tiny, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    interrupted(tiny, output, 2)
    as_version_0_1(output)
    with folder_as_it_was(output):
        assert "an unfinished run of awqdist 0.1, which this version cannot resume" in run(tiny, output).error_line()
    assert awqdist("quantize", tiny.model, output, *tiny.options(), "--overwrite").code == 0
    assert model_files(output) == model_files(undisturbed)
    assert not (output / "events.jsonl").exists()


def test_leftovers_of_unfinished_writes_do_no_harm(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    interrupted(tiny, output, 2)
    (output / "model-layer-00002.safetensors.0123.awqdist-partial").write_bytes(b"half a layer")
    (output / ".awqdist" / "boundary-00002.safetensors.0123.awqdist-partial").write_bytes(b"half a snapshot")
    finish(tiny, output, undisturbed)


def test_files_are_readable_as_the_umask_says(tiny: Tiny, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert run(tiny, tmp_path / "output").code == 0
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "output").rglob("*") if path.is_file()}
    assert modes == {0o640}


# What another run may change, and what not


def other_text(tiny: Tiny, folder: Path) -> tuple[object, ...]:
    (folder / "other.txt").write_text("Quite another text. " * 500)
    return ("--calibration", folder / "other.txt")


def other_recipe(tiny: Tiny, folder: Path) -> tuple[object, ...]:
    (folder / "other.yaml").write_text(RECIPE.replace("n_grid: 4", "n_grid: 5"))
    return ("--recipe", folder / "other.yaml")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (other_recipe, "recipe: n_grid: 4} "),
        (other_text, "calibration samples"),
        (lambda tiny, folder: ("--num-samples", 7), "calibration samples: (8, 32) "),
        (lambda tiny, folder: ("--seed", 1), "calibration samples"),
        (lambda tiny, folder: ("--chunk-tokens", 64), "chunk tokens: 128 then, 64 now"),
        (lambda tiny, folder: ("--format", "autoawq"), "format: compressed-tensors then, autoawq now"),
    ],
)
def test_a_run_with_other_settings_is_refused_with_their_name(
    tiny: Tiny, tmp_path: Path, options: Callable[[Tiny, Path], tuple[object, ...]], named: str
) -> None:
    output = tmp_path / "output"
    interrupted(tiny, output, 1)
    changed = options(tiny, tmp_path)
    with folder_as_it_was(output):
        line = run(tiny, output, *changed).error_line()
    assert named in line
    assert "--overwrite" in line


def test_a_source_with_other_weights_of_the_same_shape_is_refused(
    tiny: Tiny, tmp_path: Path, copied: Callable[..., Path]
) -> None:
    def retrain(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1.5

    interrupted(tiny, tmp_path / "output", 3)  # the snapshot lies behind layer 1, which will not be read again
    line = awqdist("quantize", copied(retrain), tmp_path / "output", *tiny.options()).error_line()
    assert "layer 1" in line
    assert "other weights" in line


def test_a_source_with_other_embeddings_is_refused(tiny: Tiny, tmp_path: Path, copied: Callable[..., Path]) -> None:
    interrupted(tiny, tmp_path / "output", 1)
    model = copied(lambda tensors: tensors["model.embed_tokens.weight"].mul_(2))
    line = awqdist("quantize", model, tmp_path / "output", *tiny.options()).error_line()
    assert "source embeddings" in line


def test_a_source_that_lies_elsewhere_now_is_the_same_source(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, copied: Callable[..., Path]
) -> None:
    interrupted(tiny, tmp_path / "output", 2)
    outcome = awqdist("quantize", copied(), tmp_path / "output", *tiny.options())
    assert outcome.code == 0
    assert model_files(tmp_path / "output") == model_files(undisturbed)


def test_one_changed_weight_is_found_when_its_layer_is_forwarded_again(
    tiny: Tiny, tmp_path: Path, copied: Callable[..., Path]
) -> None:
    model = copied()
    output = tmp_path / "output"
    interrupted(Tiny(model, tiny.text, tiny.recipe), output, 2, "--snapshot-every", 100)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    line = awqdist("quantize", model, output, *tiny.options()).error_line()
    assert "layer 0" in line
    assert "other weights" in line


def test_a_changed_config_of_the_source_is_refused(tiny: Tiny, tmp_path: Path, copied: Callable[..., Path]) -> None:
    model = copied()
    (model / "config.json").write_text((model / "config.json").read_text().replace("1e-06", "1e-05"))
    interrupted(tiny, tmp_path / "output", 1)
    assert "source config" in awqdist("quantize", model, tmp_path / "output", *tiny.options()).error_line()


def test_a_finished_output_is_refused_and_left_alone(tiny: Tiny, undisturbed: Path) -> None:
    with folder_as_it_was(undisturbed):
        line = run(tiny, undisturbed).error_line()
    assert "finished model" in line
    assert "--overwrite" in line


def test_overwrite_replaces_a_finished_model_and_leaves_other_files(
    tiny: Tiny, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    shutil.copytree(undisturbed, output)
    strangers = {"notes.json": b"{}", "package.json": b"[]", "thesis.txt": b"words", "data/x.safetensors": b"1"}
    for name, data in {**strangers, "adapter_model.safetensors": b"2", "half.partial": b"3"}.items():
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_bytes(data)
    (output / "model-layer-00017.safetensors").write_bytes(b"of a deeper model")
    (output / "chat_template.jinja").write_text("of another model")
    outcome = awqdist("quantize", tiny.model, output, *tiny.options("--num-samples", 4), "--overwrite")
    assert outcome.code == 0, outcome.stderr
    assert outcome.count("LayerFinished") == NUM_LAYERS
    left = {name: data for name, data in contents(output).items() if not name.startswith(".awqdist")}
    assert {name: left.pop(name) for name in strangers} == strangers
    assert left.pop("adapter_model.safetensors") == b"2"
    assert left.pop("half.partial") == b"3"
    assert set(left) == set(model_files(undisturbed))
    assert left != model_files(undisturbed)


def test_overwrite_refuses_a_folder_that_holds_no_model(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "config.json").write_text("{}")
    with folder_as_it_was(tmp_path / "output"):
        outcome = awqdist("quantize", tiny.model, tmp_path / "output", *tiny.options(), "--overwrite")
    assert "not begun by awqdist" in outcome.error_line()


def test_overwrite_replaces_an_unfinished_run_with_other_settings(
    tiny: Tiny, undisturbed: Path, tmp_path: Path
) -> None:
    interrupted(tiny, tmp_path / "output", 2, "--num-samples", 4)
    outcome = awqdist("quantize", tiny.model, tmp_path / "output", *tiny.options(), "--overwrite")
    assert outcome.count("LayerFinished") == NUM_LAYERS
    assert model_files(tmp_path / "output") == model_files(undisturbed)


def test_overwrite_resumes_an_unfinished_run_with_the_same_settings(
    tiny: Tiny, undisturbed: Path, tmp_path: Path
) -> None:
    interrupted(tiny, tmp_path / "output", 2)
    outcome = awqdist("quantize", tiny.model, tmp_path / "output", *tiny.options(), "--overwrite")
    assert outcome.count("LayerFinished") == NUM_LAYERS - 2
    assert model_files(tmp_path / "output") == model_files(undisturbed)


@pytest.mark.parametrize("moment", [3, 6, 9, 12, 15, 20])
def test_a_run_killed_while_it_overwrites_leaves_no_half_model(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, moment: int
) -> None:
    output = tmp_path / "output"
    shutil.copytree(undisturbed, output)
    arguments = ("quantize", tiny.model, output, *tiny.options("--num-samples", 4), "--overwrite")
    assert start(tmp_path, *arguments, prepare=die_at(output, moment)).wait().code == -signal.SIGKILL
    assert awqdist(*arguments).code == 0
    assert run(tiny, tmp_path / "fresh", "--num-samples", 4).code == 0
    assert model_files(output) == model_files(tmp_path / "fresh")


# Two at once, and signals


def stopped(tiny: Tiny, output: Path) -> Child:
    """A run that has finished its first layer and stands still."""

    prepare = after_each_layer(lambda count: os.kill(os.getpid(), signal.SIGSTOP))
    child = start(output.parent, "quantize", tiny.model, output, *tiny.options(), prepare=prepare)
    child.await_that(lambda: Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    return child


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_a_second_run_on_the_same_output_is_refused(tiny: Tiny, tmp_path: Path, more: tuple[str, ...]) -> None:
    child = stopped(tiny, tmp_path / "output")
    try:
        with folder_as_it_was(tmp_path / "output"):
            outcome = awqdist("quantize", tiny.model, tmp_path / "output", *tiny.options("--num-samples", 4), *more)
        assert "in use" in outcome.error_line()
    finally:
        child.kill()


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_of_three_runs_that_start_together_one_does_the_work(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    folders = [tmp_path / str(number) for number in range(3)]
    for folder in folders:
        folder.mkdir()
    arguments = ("quantize", tiny.model, tmp_path / "output", *tiny.options(), *more)
    outcomes = [child.wait() for child in [start(folder, *arguments) for folder in folders]]
    assert {outcome.code for outcome in outcomes} <= {0, 2}
    assert any(outcome.code == 0 for outcome in outcomes)
    assert model_files(tmp_path / "output") == model_files(undisturbed)


def test_the_lock_of_a_dead_process_does_not_hold(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    stopped(tiny, tmp_path / "output").kill()
    assert (tmp_path / "output" / ".awqdist" / "lock").exists()
    finish(tiny, tmp_path / "output", undisturbed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_a_word_on_how_to_resume(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, number: int, code: int
) -> None:
    child = start(tmp_path, "quantize", tiny.model, tmp_path / "output", *tiny.options("--num-samples", 128))
    child.await_event("ChunkForwarded", 2)
    outcome = child.kill(number)
    assert outcome.code == code
    assert outcome.stderr.splitlines() == ["awqdist: interrupted; finished layers are kept, the same command resumes"]
    assert not list((tmp_path / "output").glob("*partial"))
    assert run(tiny, tmp_path / "output", "--num-samples", 128).code == 0


def test_a_quantized_lm_head_survives_a_kill(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("ignore: [lm_head]", "ignore: []"))
    assert run(tiny, tmp_path / "whole", "--recipe", recipe).code == 0
    for num_layers in (2, NUM_LAYERS):
        interrupted(tiny, tmp_path / f"killed{num_layers}", num_layers, "--recipe", recipe)
        assert run(tiny, tmp_path / f"killed{num_layers}", "--recipe", recipe).code == 0
        assert model_files(tmp_path / f"killed{num_layers}") == model_files(tmp_path / "whole")
    assert any(name.startswith("lm_head.weight_packed") for name in load_all(tmp_path / "whole"))


def load_all(output: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in output.glob("*.safetensors") for name, tensor in load_file(file).items()}
