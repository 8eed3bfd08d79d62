"""`awqdist watch`, and the file that it reads: of runs that go on, were killed, resumed or have finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.command_line import awqdist
from support.ring_messages import EPOCH, ring, write_log

from awqdist.cli import watch
from awqdist.run import events as ev
from awqdist.run.events import Message, encode, follow, last_run, log_file, read_log


def warnings(*words: str) -> list[Message]:
    return [Message(ev.Warned(word), None, EPOCH) for word in words]


def start_of_run(begins: float = EPOCH) -> Message:
    return Message(ev.RunStarted("m", "o", "cpu", 4, 0, 1), None, begins)


@pytest.fixture
def followed(tmp_path: Path) -> Iterator[Callable[[], list[Message]]]:
    """`followed()` gives the messages that one look at the log of `tmp_path` brings."""
    looks = follow(log_file(tmp_path), 0.0, lambda: False)
    yield lambda: list(iter(lambda: next(looks), None))
    looks.close()  # type: ignore[attr-defined]


# the file


def test_messages_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert list(read_log(write_log(tmp_path, ring())).messages) == ring()


def test_torn_and_foreign_lines_are_passed_over_and_told(tmp_path: Path) -> None:
    first, second, third = warnings("1", "2", "3")
    torn = encode(second)[:20]
    foreign = b'{"event": "Moved"}\n[1]\nnull\n\n\x00\xff\n{"event": "Warned", "time": 1}\n'
    write_log(tmp_path, [first], tail=torn + b"\n" + foreign)
    log = read_log(write_log(tmp_path, [third], tail=torn))
    assert log.messages == (first, third)
    assert log.damaged == (2, 3, 4, 5, 7, 8, 10)


@pytest.mark.parametrize("place", range(0, 120, 3))
def test_a_changed_byte_costs_its_line_and_no_other(tmp_path: Path, place: int) -> None:
    first, second, third = warnings("1", "2" * 80, "3")
    line = bytearray(encode(second))
    line[place] ^= 1
    write_log(tmp_path, [first], tail=bytes(line))
    assert read_log(write_log(tmp_path, [third])).messages == (first, third)


def test_there_are_no_messages_in_a_file_that_is_missing(tmp_path: Path) -> None:
    assert read_log(log_file(tmp_path)).messages == ()


def test_the_last_run_begins_with_the_last_start() -> None:
    earlier, later = ring(num_layers=2), ring(num_layers=3, begins=EPOCH + 500)
    assert last_run([*earlier[:9], *later]) == later
    assert last_run(warnings("1")) == warnings("1")
    assert last_run([]) == []


def test_following_gives_what_is_added_once_its_line_is_whole(
    tmp_path: Path, followed: Callable[[], list[Message]]
) -> None:
    assert followed() == []
    first, second = warnings("1", "2")
    line = encode(second)
    write_log(tmp_path, [first], tail=line[:15])
    assert followed() == [first]
    assert followed() == []
    write_log(tmp_path, [], tail=line[15:-1])
    assert followed() == []
    write_log(tmp_path, [], tail=b"\n")
    assert followed() == [second]


def test_following_begins_with_the_last_run_and_goes_on_with_the_next(
    tmp_path: Path, followed: Callable[[], list[Message]]
) -> None:
    write_log(tmp_path, [start_of_run(EPOCH), *warnings("old"), start_of_run(EPOCH + 9), *warnings("new")])
    assert followed() == [start_of_run(EPOCH + 9), *warnings("new")]
    write_log(tmp_path, [start_of_run(EPOCH + 20), *warnings("newest")])
    assert followed() == [start_of_run(EPOCH + 20), *warnings("newest")]


@pytest.mark.parametrize("by", ["rename", "truncation", "removal"])
def test_following_takes_up_a_file_that_replaces_the_one_before(
    tmp_path: Path, followed: Callable[[], list[Message]], by: str
) -> None:
    write_log(tmp_path, [start_of_run(), *warnings("old", "older")])
    followed()
    if by == "rename":
        os.replace(write_log(tmp_path / "new", [start_of_run(), *warnings("new", "newer")]), log_file(tmp_path))
    elif by == "truncation":
        log_file(tmp_path).write_bytes(b"".join(map(encode, warnings("new", "newer"))))
    else:
        log_file(tmp_path).unlink()
        assert followed() == []
        write_log(tmp_path, warnings("new", "newer"))
    assert followed()[-2:] == warnings("new", "newer")


def test_following_ends_when_it_is_told_to(tmp_path: Path) -> None:
    asked: list[bool] = []
    looks = follow(log_file(tmp_path), 0.0, lambda: asked.append(True) or len(asked) > 3)
    assert list(looks) == [None, None, None]


# the command


def test_watching_a_finished_run_shows_it_and_ends(tmp_path: Path) -> None:
    write_log(tmp_path, ring())
    outcome = awqdist("watch", tmp_path)
    assert outcome.code == 0
    lines = outcome.stderr.splitlines()
    assert lines[0] == "org/tiny -> /out: 16 layers, 16,384 tokens on cuda, 4 workers (ray)"
    assert lines[-1].startswith("finished in 1 min 41 s")
    assert sum(line.startswith("layer ") for line in lines) == 16


def test_watching_shows_the_last_run_only(tmp_path: Path) -> None:
    write_log(tmp_path, [*ring()[:60], *ring(num_workers=1, num_layers=2)])
    lines = awqdist("watch", tmp_path, "--progress", "json").stdout.splitlines()
    assert [json.loads(line)["event"] for line in lines].count("RunStarted") == 1
    assert len(lines) == len(ring(num_workers=1, num_layers=2))
    assert json.loads(lines[0])["num_layers"] == 2


def test_watching_follows_a_run_from_before_its_beginning_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "POLL_S", 0.01)

    def run() -> None:
        time.sleep(0.1)
        for message in ring(num_layers=4):
            write_log(tmp_path / "output", [], tail=encode(message)[:30])
            write_log(tmp_path / "output", [], tail=encode(message)[30:])

    (tmp_path / "output").mkdir()
    thread = threading.Thread(target=run)
    thread.start()
    outcome = awqdist("watch", tmp_path / "output", "--progress", "plain")
    thread.join()
    assert outcome.code == 0
    lines = outcome.stderr.splitlines()
    assert lines[0] == f"awqdist: waiting for a run to begin: there is no {tmp_path}/output/.awqdist/log.jsonl yet"
    assert sum(line.startswith("layer ") for line in lines) == 4
    assert lines[-1].startswith("finished")


def test_watching_says_that_there_was_no_news_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last message is 75 s old when the watching begins; another comes, then the end."""
    monkeypatch.setattr(watch, "POLL_S", 0.01)
    write_log(tmp_path, [start_of_run(time.time() - 80), Message(ev.Warned("old"), 0, time.time() - 75)])

    def run() -> None:
        time.sleep(0.2)
        write_log(tmp_path, [Message(ev.RunFinished("o", 80.0, 1.0, 1), None, time.time())])

    thread = threading.Thread(target=run)
    thread.start()
    outcome = awqdist("watch", tmp_path, "--progress", "plain")
    thread.join()
    assert outcome.code == 0
    assert [line for line in outcome.stderr.splitlines() if "no news" in line] == [
        "awqdist: no news for 75 s: the run is stuck, was stopped, or cannot reach this folder"
    ]


def test_ending_the_watching_says_that_the_run_continues(tmp_path: Path) -> None:
    write_log(tmp_path, [start_of_run(time.time())])
    program = "from awqdist.cli.main import main; main()"
    command = [sys.executable, "-c", program, "watch", str(tmp_path), "--progress", "plain"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("m -> o: 4 layers")
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "awqdist: no longer watching; the run itself continues\n"
    assert process.returncode == 130


# --once


def test_once_shows_the_present_state_as_a_table(tmp_path: Path) -> None:
    write_log(tmp_path, ring()[:150])
    outcome = awqdist("watch", tmp_path, "--once", "--progress", "plain")
    assert outcome.code == 0
    assert "4/16 layers" in outcome.stdout
    assert "node-1" in outcome.stdout
    assert "no news for" in outcome.stdout
    assert "\x1b" not in outcome.stdout


def test_once_tells_the_present_state_as_an_object(tmp_path: Path) -> None:
    """After 30.5 s worker 2 is one chunk into layer 6, and writes layer 2."""
    write_log(tmp_path, [message for message in ring() if message.time <= EPOCH + 30.5])
    outcome = awqdist("watch", tmp_path, "--once", "--progress", "json")
    state = json.loads(outcome.stdout)
    assert (state["num_layers"], state["num_done"], state["finished"], state["restarts"]) == (16, 2, False, 0)
    assert [worker["worker"] for worker in state["workers"]] == [0, 1, 2, 3]
    third = state["workers"][2]
    assert (third["stage"], third["layer"], third["chunk"], third["num_chunks"]) == ("forward", 6, 1, 8)
    assert third["background"] == {"write": 2}
    assert third["device_utilization"] == 92


def test_once_refuses_a_folder_without_a_run_in_one_line(tmp_path: Path) -> None:
    assert "log.jsonl tells of no run" in awqdist("watch", tmp_path / "nowhere", "--once").error_line()


def test_watching_imports_no_heavy_library(tmp_path: Path) -> None:
    write_log(tmp_path, ring(num_layers=2))
    program = (
        "import sys; from awqdist.cli.main import main; sys.argv = ['awqdist', 'watch', sys.argv[1]]\n"
        "try: main()\n"
        "finally: print([name for name in ('torch', 'transformers', 'numpy', 'rich.live') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
