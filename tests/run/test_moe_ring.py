"""A ring of workers writes a mixture of experts to the same bytes as a single worker."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.command_line import model_files
from support.rings import Ring, run
from support.tiny_llama import RECIPE, TEXT, Tiny
from support.tiny_models import tiny_checkpoint


@pytest.mark.torchrun
def test_two_ranks_write_the_bytes_of_a_single_worker(tmp_path: Path) -> None:
    tiny = Tiny(tmp_path / "model", tmp_path / "text.txt", tmp_path / "recipe.yaml")
    tiny_checkpoint("deepseek-v3", tiny.model, torch.bfloat16)
    tiny.text.write_text(TEXT)
    tiny.recipe.write_text(RECIPE)

    for ring in (Ring("local", 1), Ring("torchrun", 2)):
        outcome = run(ring, tiny, tmp_path / ring.backend)
        assert outcome.code == 0, outcome.stderr

    assert model_files(tmp_path / "local") == model_files(tmp_path / "torchrun")
