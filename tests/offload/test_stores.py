"""One contract for all stores: memory, plain files, DeepNVMe, and memory above files. And what happens when a disk fails."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from awqdist.errors import OffloadError
from awqdist.offload import nvme
from awqdist.offload.nvme import DeepNvme
from awqdist.offload.store import FileStore, Medium, OwnFolder, PlainFiles, Store, open_store, sweep

KINDS = [
    "ram",
    "disk",
    pytest.param("nvme", marks=pytest.mark.nvme),
    "ram above disk",
    pytest.param("ram above nvme", marks=pytest.mark.nvme),
]
ON_DISK = ["disk", pytest.param("nvme", marks=pytest.mark.nvme)]
BUDGET_BYTES = 5_000  # of the memory above a disk: two of `chunks` fit


def make_store(kind: str, base: Path) -> Store | FileStore:
    if kind == "ram":
        return Store()
    folder = OwnFolder(base)
    files = FileStore(folder, DeepNvme(folder.path) if "nvme" in kind else PlainFiles())
    return Store(BUDGET_BYTES, files) if "ram" in kind else files


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store | FileStore]:
    made = make_store(request.param, tmp_path)
    yield made
    made.close()


@pytest.fixture(params=ON_DISK)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def chunk(number: int) -> Tensor:
    """(2, 16, 32) bfloat16: 2048 bytes."""
    return torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(number)).bfloat16()


ODD = {
    "float32": torch.arange(15.0).reshape(3, 5),
    "int64": torch.tensor([[-(1 << 60)]]),
    "bool": torch.tensor([True, False, True]),
    "NaN": torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.float16),
    "a scalar": torch.tensor(3.5, dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
    "not contiguous": torch.arange(12.0).reshape(3, 4).T,
    "4096 bytes": torch.arange(1024.0),
    "4097 bytes": torch.arange(4097).to(torch.uint8),
}


# The contract


@pytest.mark.parametrize("name", ODD)
def test_a_tensor_comes_back_equal_in_every_bit(store: Store | FileStore, name: str) -> None:
    store.put("x", ODD[name])
    for _ in range(2):  # it stays
        found = store.get("x")
        assert (found.dtype, found.shape) == (ODD[name].dtype, ODD[name].shape)
        assert (
            found.contiguous().view(torch.uint8).equal(ODD[name].contiguous().view(torch.uint8))
            if found.ndim
            else (found.equal(ODD[name]))
        )


def test_many_tensors_keep_apart_in_whatever_order_they_are_asked_for(store: Store | FileStore) -> None:
    for number in range(12):
        store.put(f"chunk-{number}", chunk(number))
    for number in [*range(0, 12, 2), *range(11, 0, -2)]:
        store.prefetch(f"chunk-{number}")
        assert store.get(f"chunk-{number}").equal(chunk(number))


def test_bytes_are_counted_and_what_is_dropped_does_not_count(store: Store | FileStore) -> None:
    assert store.num_bytes == 0
    for number in range(5):
        store.put(f"chunk-{number}", chunk(number))
    assert store.num_bytes == 5 * 2048
    store.put("chunk-3", torch.zeros(10))
    assert store.num_bytes == 4 * 2048 + 40
    for number in range(5):
        store.drop(f"chunk-{number}")
    assert store.num_bytes == 0


def test_a_tensor_that_is_put_again_takes_the_place_of_the_first(store: Store | FileStore) -> None:
    for number in range(4):
        store.put(f"chunk-{number}", chunk(number))
    for number in range(4):
        store.prefetch(f"chunk-{number}")
        store.put(f"chunk-{number}", chunk(number + 100))
    for number in range(4):
        assert store.get(f"chunk-{number}").equal(chunk(number + 100))


def test_what_was_never_put_or_was_dropped_cannot_be_got(store: Store | FileStore) -> None:
    store.put("x", chunk(0))
    store.drop("x")
    store.drop("never there")
    store.prefetch("never there")
    for key in ("x", "never there"):
        with pytest.raises(OffloadError, match=f"{key} is not stored"):
            store.get(key)


def test_a_layer_like_use_gives_every_chunk_its_turn(store: Store | FileStore) -> None:
    """Take a chunk, put its successor, as a worker does."""
    for number in range(6):
        store.put(f"0-{number}", chunk(number))
    for layer in range(4):
        for number in range(6):
            store.prefetch(f"{layer}-{number + 1}")
            hidden = store.get(f"{layer}-{number}")
            store.drop(f"{layer}-{number}")
            assert hidden.equal(chunk(number) + layer)
            store.put(f"{layer + 1}-{number}", chunk(number) + (layer + 1))
    assert store.num_bytes == 6 * 2048


def test_threads_may_put_and_get_at_the_same_time(store: Store | FileStore) -> None:
    def use(first: int) -> None:
        for number in range(first, first + 20):
            store.put(f"x{number}", chunk(number))
            if not store.get(f"x{number}").equal(chunk(number)):
                wrong.append(number)
            store.drop(f"x{number}")

    wrong: list[int] = []
    threads = [threading.Thread(target=use, args=(first,)) for first in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert store.num_bytes == 0


def test_a_closed_store_leaves_nothing_behind_and_takes_nothing(store: Store | FileStore, tmp_path: Path) -> None:
    store.put("x", chunk(0))
    store.close()
    store.put("y", chunk(1))
    store.close()
    assert list(tmp_path.iterdir()) == []


# Memory


def test_memory_takes_what_the_budget_allows_and_says_so() -> None:
    store = Store(BUDGET_BYTES)
    store.put("a", chunk(0))
    store.put("b", chunk(1))
    with pytest.raises(
        OffloadError,
        match=r"c of 2,048 bytes does not fit into memory: 4,096 of 5,000 bytes are in use.*--offload disk",
    ):
        store.put("c", chunk(2))
    store.drop("a")
    store.put("c", chunk(2))
    assert store.get("c").equal(chunk(2))


def test_what_does_not_fit_into_memory_goes_down_and_what_lies_there_stays(tmp_path: Path) -> None:
    """Chunks come round, so that the newest is needed least soon: of six, two of which fit, four are moved in every round."""
    medium = Counting()
    store = Store(BUDGET_BYTES, FileStore(OwnFolder(tmp_path), medium))
    for number in range(6):
        store.put(f"0-{number}", chunk(number))
    for layer in range(5):
        for number in range(6):
            store.get(f"{layer}-{number}")
            store.drop(f"{layer}-{number}")
            store.put(f"{layer + 1}-{number}", chunk(number))
    store.close()
    assert medium.num_written <= 4 * 6


class Counting(PlainFiles):
    """Counts, and takes its time."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.num_written = self.num_read = 0
        self._seconds = seconds

    def write(self, file: Path, data: Tensor) -> None:
        time.sleep(self._seconds)
        self.num_written += 1
        super().write(file, data)

    def read(self, file: Path, num_bytes: int) -> Tensor:
        time.sleep(self._seconds)
        self.num_read += 1
        return super().read(file, num_bytes)


# Disks that fail


def written(store: FileStore, folder: Path) -> Path:
    """The file of a chunk, once it is there."""
    store.put("x", chunk(0))
    store.put("y", chunk(1))
    deadline = time.monotonic() + 10
    while len(files := sorted(folder.glob("*/[xy].*"))) < 2 or any(f.stat().st_size < 2048 for f in files):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.05)
    return files[0]


Fault = tuple[Callable[[Path], object], str]
FAULTS: dict[str, Fault] = {
    "short": (
        lambda file: os.truncate(file, 1024),
        r"cannot read .*x\.0: it (has|ends after) 1,024 .*(2,048|4,096)",
    ),
    "empty": (lambda file: os.truncate(file, 0), r"cannot read .*x\.0: it (has|ends after) 0 "),
    "missing": (lambda file: file.unlink(), r"cannot read .*x\.0: it is missing; run the same command again to resume"),
    "flipped": (
        lambda file: flip_bit(file, 1000),
        r"x\.0 does not hold the bytes that were written: the disk is failing",
    ),
}


def flip_bit(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("ahead", [False, True], ids=["read", "read ahead"])
def test_a_file_that_is_not_what_was_written_is_refused(kind: str, tmp_path: Path, fault: str, ahead: bool) -> None:
    spoil, message = FAULTS[fault]
    store = make_store(kind, tmp_path)
    assert isinstance(store, FileStore)
    spoil(written(store, tmp_path))
    if ahead:
        store.prefetch("x")
    with pytest.raises(OffloadError, match=message) as caught:
        store.get("x")
    assert "\n" not in str(caught.value)
    assert store.get("y").equal(chunk(1)), "the other file is as it was"
    store.close()
    assert list(tmp_path.iterdir()) == []


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to let a file grow further: as a full disk does, in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def put_more(store: Store | FileStore) -> None:
    """What could not be written before is told at one of these."""
    for number in range(20):
        store.put(f"x{number}", chunk(number))
    store.get("large")


def test_a_full_disk_is_told_in_one_line_and_leaves_no_torn_file(kind: str, tmp_path: Path) -> None:
    store = make_store(kind, tmp_path)
    with files_limited_to(10_000):
        store.put("large", torch.zeros(100_000))
        with pytest.raises(
            OffloadError, match=r"cannot write 400,000 bytes to .*large\.0: .*free space there"
        ) as caught:
            put_more(store)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*/large.*"))
    store.close()


def test_a_slow_disk_slows_the_worker_down_instead_of_filling_its_memory(tmp_path: Path) -> None:
    medium = Counting(seconds=0.05)
    store = FileStore(OwnFolder(tmp_path), medium)
    for number in range(8):
        store.put(f"x{number}", chunk(number))
        assert number + 1 - medium.num_written <= 4, "two wait, one is being written, one was just put"
    for number in range(8):
        assert store.get(f"x{number}").equal(chunk(number))
    store.close()


def test_what_is_fetched_ahead_is_there_when_it_is_asked_for(tmp_path: Path) -> None:
    medium = Counting(seconds=0.1)
    store = FileStore(OwnFolder(tmp_path), medium)
    written(store, tmp_path)
    store.prefetch("x")
    store.prefetch("x")
    time.sleep(0.3)
    start = time.monotonic()
    assert store.get("x").equal(chunk(0))
    assert time.monotonic() - start < 0.08
    assert medium.num_read == 1
    store.close()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OffloadError, match=r"cannot make the offload folder .*give another --offload-dir"):
        OwnFolder(tmp_path / "file" / "folder")


# Folders of processes that are gone


def test_the_folder_of_a_killed_process_is_swept_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    ours = make_store("disk", tmp_path)
    ours.put("x", chunk(0))
    child = os.fork()
    if child == 0:
        folder = OwnFolder(tmp_path)
        (folder.path / "chunk").write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 4
    (tmp_path / "somebody's").mkdir()
    sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert ours.get("x").equal(chunk(0))
    ours.close()
    assert [path.name for path in tmp_path.iterdir()] == ["somebody's"]


# DeepNVMe's operator


def test_where_the_operator_is_not_compiled_plain_files_serve_and_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    said: list[str] = []
    store = open_store("nvme", tmp_path / "base", 0, said.append)
    store.put("x", chunk(0))
    assert store.get("x").equal(chunk(0))
    store.close()
    assert len(said) == 1
    assert "operator is not compiled; run `awqdist doctor --build-nvme` once; using plain files in" in said[0]


@pytest.fixture
def compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock file of a compile."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = nvme.build_folder("async_io") / "lock"
    lock.write_text("")
    return lock


def test_the_lock_of_a_killed_compile_is_removed(compiling: Path) -> None:
    for path in (compiling, compiling.parent):
        os.utime(path, (time.time() - 300,) * 2)
    said: list[str] = []
    nvme.remove_stale_lock(compiling.parent, said.append)
    assert not compiling.exists()
    assert said == [f"removed {compiling}, left behind by a killed compilation"]


def test_a_fresh_lock_is_watched_before_it_is_removed(compiling: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compile on another machine that shares the home."""
    monkeypatch.setattr(nvme, "_QUIET_S", 0.3)
    said: list[str] = []
    nvme.remove_stale_lock(compiling.parent, said.append)
    assert not compiling.exists()
    assert "waiting up to 0 s" in said[0]


def test_the_lock_of_a_compile_that_goes_on_is_left_alone(compiling: Path) -> None:
    with compiling.open(), pytest.raises(OffloadError, match=f"process {os.getpid()} is compiling in "):
        nvme.remove_stale_lock(compiling.parent, lambda message: None)
    assert compiling.exists()


def test_media_are_interchangeable(tmp_path: Path) -> None:
    medium: Medium = PlainFiles()
    medium.write(tmp_path / "x", torch.arange(10).to(torch.uint8))
    with pytest.raises(OSError, match="ends after 10 of 11 bytes"):
        medium.read(tmp_path / "x", 11)
    assert medium.read(tmp_path / "x", 4).tolist() == [0, 1, 2, 3]
