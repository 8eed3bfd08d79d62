"""Experts in MXFP4, as openai publishes gpt-oss: the same as their twin in bfloat16, value by value and byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.command_line import model_files
from support.family_oracles import open_job, recipe
from support.fused_checkpoints import quantized, read_split, spoiled
from support.fused_oracles import Tensors, apart
from support.source_kinds import from_mxfp4, mxfp4_pair
from support.tiny_models import tiny_checkpoint

from awqdist.checkpoint.sources import dequantize_mxfp4, read_source
from awqdist.errors import AwqdistError, CheckpointError
from awqdist.run.verify import verify

DOWN = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A source in MXFP4, and its twin."""
    return mxfp4_pair(tiny_checkpoint("gpt-oss", tmp_path / "model", torch.bfloat16), tmp_path)


def test_an_mxfp4_source_gives_the_bytes_of_its_twin(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, twin = pair
    stored = sum(tensor.nbytes for tensor in load_file(source / "model.safetensors").values())

    index = read_source(source)
    assert read_split(index).num_bytes == index.stored_bytes == stored
    assert open_job(source, recipe()).skeleton.dtype == torch.bfloat16
    summary = quantized(source, tmp_path / "output")
    quantized(twin, tmp_path / "expected")

    found, expected = model_files(tmp_path / "output"), model_files(tmp_path / "expected")
    assert found == expected
    for original in (source, twin):
        assert verify(tmp_path / "output", original).ok
    assert "48 MXFP4 weights of the source were dequantized to BF16 as they were read" in summary.warnings
    assert "mxfp4" not in (tmp_path / "output" / "config.json").read_text()


def test_every_value_of_4_bits_is_dequantized_exactly_under_every_scale() -> None:
    scales = torch.arange(256, dtype=torch.uint8)
    blocks = torch.arange(256, dtype=torch.uint8).repeat(16).view(256, 16)  # each byte under 16 scales

    for dtype in (torch.float32, torch.bfloat16):
        found = dequantize_mxfp4(blocks.flatten(), scales, dtype)
        assert torch.equal(found.nan_to_num(1234), from_mxfp4(blocks, scales).flatten().to(dtype).nan_to_num(1234))
        assert found[-32:].isnan().all()


def test_the_weights_are_those_that_transformers_dequantizes(pair: tuple[Path, Path]) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source, _ = pair
    stored, found = load_file(source / "model.safetensors"), read_split(read_source(source)).tensors
    for name in [n.removesuffix("_blocks") for n in stored if n.endswith("_blocks")]:
        whole = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        for linear, weight in apart({name: whole}).items():
            assert torch.equal(found[linear], weight), linear


def test_a_scale_that_means_nan_is_found_under_the_linears_name(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = pair
    spoiled(source, lambda t: t["model.layers.0.mlp.experts.down_proj_scales"].__setitem__((2, 9, 0), 255))

    with pytest.raises(AwqdistError, match=r"model\.layers\.0\.mlp\.experts\.2\.down_proj\.weight holds 32 values"):
        quantized(source, tmp_path / "output")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.pop(f"{DOWN}_scales"), f"{DOWN}_blocks is there, but not {DOWN}_scales"),
        (lambda t: t.pop(f"{DOWN}_blocks"), f"{DOWN}_scales is there, but not {DOWN}_blocks"),
        (lambda t: t.update({f"{DOWN}_scales": t[f"{DOWN}_scales"][:, 1:].clone()}), "expected uint8 of"),
        (lambda t: t.update({f"{DOWN}_blocks": t[f"{DOWN}_blocks"].float()}), f"{DOWN}_blocks is F32 of shape"),
    ],
)
def test_blocks_and_scales_that_do_not_fit_are_refused(
    pair: tuple[Path, Path], spoil: Callable[[Tensors], object], words: str
) -> None:
    source, _ = pair
    with pytest.raises(CheckpointError) as refused:
        read_source(spoiled(source, spoil))
    assert words in str(refused.value)
