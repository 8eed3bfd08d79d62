"""Reading and writing of safetensors, against the safetensors library."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from awqdist.checkpoint.index import DTYPES, read_header, read_index
from awqdist.checkpoint.reader import check_finite, read_tensor, read_tensors, sample_checksum
from awqdist.checkpoint.writer import (
    LazyTensor,
    copy_file,
    stream_safetensors,
    write_bytes,
    write_json,
    write_safetensors,
)
from awqdist.errors import CheckpointError, OutputError
from awqdist.run.journal import file_hash


def example(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(5, 7, generator=generator).to(dtype),
        "a.weight": torch.randn(3, generator=generator).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.empty((0, 4), dtype=dtype),
    }


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and bytes_of(a[n]) == bytes_of(b[n]) for n in a
    )


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_what_is_written_is_what_the_library_reads_and_the_other_way_round(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = example(dtype)
    write_safetensors(tmp_path / "ours.safetensors", tensors)
    assert equal(load_file(tmp_path / "ours.safetensors"), tensors)
    save_file(tensors, tmp_path / "theirs.safetensors")
    found = {entry.name: read_tensor(entry) for entry in read_header(tmp_path / "theirs.safetensors")}
    assert equal(found, tensors)


def test_equal_tensors_give_equal_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = example()
    first = write_safetensors(tmp_path / "first", tensors)
    second = write_safetensors(tmp_path / "second", dict(reversed(tensors.items())))
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert (first.num_bytes, first.sha256) == (second.num_bytes, second.sha256)


def test_a_written_file_is_described_as_it_is(tmp_path: Path) -> None:
    written = write_safetensors(tmp_path / "file", example())
    assert written.name == "file"
    assert written.num_bytes == (tmp_path / "file").stat().st_size
    assert written.sha256 == file_hash(tmp_path / "file")


def test_tensors_that_are_not_contiguous_are_written_in_their_order(tmp_path: Path) -> None:
    weight = torch.arange(12.0).view(3, 4)
    write_safetensors(tmp_path / "file", {"turned": weight.T, "cut": weight[:, 1:3]})
    loaded = load_file(tmp_path / "file")
    assert torch.equal(loaded["turned"], weight.T)
    assert torch.equal(loaded["cut"], weight[:, 1:3])


def test_the_mode_of_a_file_is_the_umasks(tmp_path: Path) -> None:
    before = os.umask(0o007)
    try:
        write_json(tmp_path / "file.json", {"a": 1})
        copy_file(tmp_path / "file.json", tmp_path / "copy.json")
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file.json", "copy.json")} == {0o660}
    assert json.loads((tmp_path / "copy.json").read_text()) == {"a": 1}


def test_tensors_are_streamed_one_at_a_time(tmp_path: Path) -> None:
    alive = 0
    most = 0

    class Counted:
        def __init__(self) -> None:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def load() -> torch.Tensor:
        tensor = torch.zeros(1024)
        tensor.counted = Counted()  # type: ignore[attr-defined]
        return tensor

    stream_safetensors(tmp_path / "file", [LazyTensor(f"t{i}", "F32", (1024,), 4096, load) for i in range(10)])
    assert most <= 2
    assert len(load_file(tmp_path / "file")) == 10


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"old")

    def fail() -> torch.Tensor:
        raise CheckpointError("the source is gone")

    with pytest.raises(CheckpointError):
        stream_safetensors(tmp_path / "file", [LazyTensor("t", "F32", (1,), 4, fail)])
    with pytest.raises(CheckpointError, match="cannot read"):
        copy_file(tmp_path / "nowhere", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(OutputError, match="cannot write"):
        write_bytes(tmp_path / "nowhere" / "file", b"new")


def test_the_checksum_of_tensors_tells_every_bit(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", example())
    entries = read_header(tmp_path / "model.safetensors")
    reading = read_tensors(entries)
    assert equal(reading.tensors, example())
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-9] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    assert read_tensors(entries).crc32 != reading.crc32


def test_the_sample_of_a_checkpoint_tells_two_models_apart(tmp_path: Path) -> None:
    samples = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"t{i}": torch.randn(64, 64, generator=generator) for i in range(3)}
        write_safetensors(tmp_path / "model.safetensors", {**tensors, "one": torch.ones(1)})
        samples.append(sample_checksum(list(read_index(tmp_path).entries.values())))
    assert samples[0] == samples[1] != samples[2]


def test_the_fingerprint_tells_names_shapes_and_dtypes(tmp_path: Path) -> None:
    prints = set()
    for tensors in (
        {"a": torch.zeros(4, 2)},
        {"b": torch.zeros(4, 2)},
        {"a": torch.zeros(2, 4)},
        {"a": torch.zeros(4, 2, dtype=torch.int32)},
    ):
        write_safetensors(tmp_path / "model.safetensors", tensors)
        prints.add(read_index(tmp_path).fingerprint())
    assert len(prints) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_values_that_are_not_finite_are_found_and_counted(dtype: torch.dtype, value: float) -> None:
    tensor = torch.ones(10, 10)
    tensor[3, 4] = tensor[9, 9] = value
    with pytest.raises(CheckpointError, match="layer 5: tensor w holds 2 values"):
        check_finite({"fine": torch.ones(3), "w": tensor.to(dtype)}, "layer 5")


def test_large_values_and_integers_are_finite() -> None:
    most = torch.finfo(torch.bfloat16).max
    check_finite({"w": torch.full((100,), most, dtype=torch.bfloat16), "ids": torch.arange(3)}, "layer 5")
    check_finite({"both": torch.tensor([most, -most], dtype=torch.bfloat16), "none": torch.empty(0)}, "layer 5")
