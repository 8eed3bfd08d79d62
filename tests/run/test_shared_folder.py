"""The token that proves that all workers see one output folder. Folders that are not shared are two folders here."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.command_line import contents

from awqdist.errors import OutputError
from awqdist.run import output as output_folder
from awqdist.run.output import answer_token, check_answers, offer_token, remove_token

PATIENCE_S = 0.3


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_folder, "_PATIENCE_S", PATIENCE_S)


def state_files(output: Path) -> list[str]:
    return sorted(contents(output))


def test_workers_that_see_the_folder_answer_and_nothing_is_left(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "output"  # not there yet
    token = offer_token(output)
    for worker in range(3):
        answer_token(output, token, worker)
    check_answers(output, token, range(3))
    assert state_files(output) == []


def test_every_token_is_another(tmp_path: Path) -> None:
    assert len({offer_token(tmp_path) for _ in range(10)}) == 10


def test_a_worker_that_sees_another_folder_is_refused_and_writes_nothing_there(tmp_path: Path) -> None:
    token = offer_token(tmp_path / "leader's")
    with pytest.raises(OutputError, match=r"not visible to worker 2 on .*other.*must lie on a file system that all"):
        answer_token(tmp_path / "other", token, 2)
    assert not (tmp_path / "other").exists()


def test_the_token_of_another_run_is_no_proof(tmp_path: Path) -> None:
    offer_token(tmp_path)
    with pytest.raises(OutputError, match="worker 0"):
        answer_token(tmp_path, "0" * 32, 0)


def test_an_answer_that_does_not_arrive_is_missed_by_the_number_of_its_worker(tmp_path: Path) -> None:
    token = offer_token(tmp_path)
    answer_token(tmp_path, token, 0)
    answer_token(tmp_path, token, 2)
    with pytest.raises(OutputError, match=r"files written by worker 1 are not visible to the leader in "):
        check_answers(tmp_path, token, range(3))
    assert state_files(tmp_path) == []


def test_the_answer_of_one_worker_is_not_taken_for_that_of_another(tmp_path: Path) -> None:
    token = offer_token(tmp_path)
    answer_token(tmp_path, token, 11)
    with pytest.raises(OutputError, match="worker 1 "):
        check_answers(tmp_path, token, [11, 1])


def test_token_and_answers_may_show_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_folder, "_PATIENCE_S", 10.0)
    token = offer_token(tmp_path / "leader's")
    (tmp_path / "seen").mkdir()

    def network() -> None:
        time.sleep(0.2)
        (tmp_path / "leader's" / ".awqdist").rename(tmp_path / "seen" / ".awqdist")

    thread = threading.Thread(target=network)
    thread.start()
    answer_token(tmp_path / "seen", token, 0)
    check_answers(tmp_path / "seen", token, [0])
    thread.join()


def test_tokens_of_another_run_and_its_files_stay(tmp_path: Path) -> None:
    other, mine = offer_token(tmp_path), offer_token(tmp_path)
    (tmp_path / ".awqdist" / "log.jsonl").write_text("facts")
    answer_token(tmp_path, mine, 0)
    remove_token(tmp_path, mine)
    remove_token(tmp_path, mine)
    assert state_files(tmp_path) == [".awqdist/log.jsonl", f".awqdist/token-{other}"]


def test_a_folder_that_cannot_be_written_is_refused_where_the_token_is_offered(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*file"):
        offer_token(tmp_path / "file")


def test_a_folder_that_a_worker_may_only_read_is_refused_there(foreign: Path) -> None:
    token = offer_token(foreign)
    with (
        another_user(),
        pytest.raises(OutputError, match=r"cannot write .*Permission denied; choose a folder that you may write to"),
    ):
        answer_token(foreign, token, 1)


@pytest.fixture
def foreign() -> Iterator[Path]:
    """A folder that others may read and not write. pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder) / "output"


@contextmanager
def another_user() -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
