"""Fixtures that most tests share."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch: a child that is forked beside OpenMP's threads waits for them for ever
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_llama import NUM_LAYERS, Tiny, write_tiny
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

torch.set_num_threads(1)
disable_progress_bar()  # transformers' own, of checkpoints that tests save and load


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under pytest-xdist one process runs all that starts Ray: a cluster asked for by `auto` is then the test's own."""
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny"), NUM_LAYERS)


Spoil = Callable[[dict[str, Tensor]], None]


@pytest.fixture
def copied(tiny: Tiny, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny model; `copied(spoil)` lets a function change its tensors first."""

    def copy(spoil: Spoil | None = None) -> Path:
        folder = tmp_path / "copied model"
        shutil.copytree(tiny.model, folder)
        if spoil is not None:
            tensors = load_file(folder / "model.safetensors")
            spoil(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return copy


@pytest.fixture(scope="session")
def undisturbed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one run that nothing disturbed. Not to be changed."""
    from support.command_line import awqdist

    output = tmp_path_factory.mktemp("undisturbed") / "output"
    outcome = awqdist("quantize", tiny.model, output, *tiny.options())
    assert outcome.code == 0, outcome.stderr
    return output
