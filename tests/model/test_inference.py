"""Mappings that nobody wrote down: inferred from structure, kept where they preserve the function. And wrong ones, which never pass."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.family_oracles import distance, load, logits, open_job, read_all, recipe, smoothed_checkpoint, token_ids
from support.odd_models import (
    ClampedForCausalLM,
    HopelessForCausalLM,
    OddForCausalLM,
    PostNormForCausalLM,
    RenamedLlamaForCausalLM,
    odd_checkpoint,
)
from support.tiny_models import alike_families, families, moe_families, tiny_checkpoint
from torch import Tensor

from awqdist import AWQMapping, oneshot
from awqdist.checkpoint.index import INDEX_FILE
from awqdist.checkpoint.sources import read_source
from awqdist.errors import ModelError, NumericalError, RecipeError
from awqdist.layer.records import RunSummary
from awqdist.model.families import FAMILIES, registered_mappings
from awqdist.model.mapping import HeadShape, infer_mappings, resolve
from awqdist.model.skeleton import Skeleton, build_skeleton, read_config
from awqdist.model.structure import trace_layers

SAMPLES = token_ids(6)
PROBE = token_ids(2, seed=1)


def open_skeleton(source: Path) -> Skeleton:
    return build_skeleton(read_config(source), read_source(source).entries)


def quantized(source: Path, output: Path, *mappings: AWQMapping, bits: int = 8) -> RunSummary:
    return oneshot(
        model=str(source),
        dataset=SAMPLES.tolist(),
        recipe=recipe(bits, mappings=list(mappings) or None),
        output_dir=output,
        num_calibration_samples=SAMPLES.shape[0],
        max_seq_length=SAMPLES.shape[1],
        device="cpu",
    )


def random_scales(task: Any, mapping: Any, weights: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    channels = mapping.source_channels(task.by_path[mapping.balance[0]].shape[1])
    return torch.exp2(2 * torch.rand(int(channels.max()) + 1, generator=generator) - 1)[channels]


@pytest.mark.parametrize("family", [*families(), *moe_families()])
def test_inference_finds_the_registered_mappings_and_no_more(family: str, tmp_path: Path) -> None:
    skeleton = open_skeleton(tiny_checkpoint(family, tmp_path))
    config = skeleton.model.config.get_text_config(decoder=True)
    patterns = registered_mappings(skeleton.architecture, config)
    assert patterns is not None

    for layer, structure in enumerate(trace_layers(skeleton)):
        on_disk = partial(_on_disk, skeleton.layer_names(layer))
        registered = resolve(patterns, structure, on_disk, HeadShape.of(config)).mappings
        assert set(infer_mappings(skeleton, structure, layer)) == set(registered)


def _on_disk(names: dict[str, str], path: str) -> str:
    return names[f"{path}.weight"].removesuffix(".weight")


def test_every_registered_architecture_is_among_the_tested_families(tmp_path: Path) -> None:
    names = [*families(), *moe_families(), *alike_families()]
    tested = {open_skeleton(tiny_checkpoint(family, tmp_path / family)).architecture for family in names}

    assert {name for family in FAMILIES for name in family.architectures} <= tested


def test_a_known_family_under_another_name_gets_its_familys_mappings(tmp_path: Path) -> None:
    renamed = open_job(odd_checkpoint(RenamedLlamaForCausalLM, tmp_path / "renamed"), recipe())
    known = open_job(tiny_checkpoint("llama", tmp_path / "llama"), recipe())

    assert renamed.plan.inferred
    assert not known.plan.inferred
    for ours, theirs in zip(renamed.plan.layers, known.plan.layers, strict=True):
        assert set(ours.mappings) == set(theirs.mappings)


EXPECTED = {
    OddForCausalLM: {"norm_1": ("mix.wv", "mix.wq"), "mix.wv": ("mix.wo",), "norm_2": ("ffn.w3", "ffn.w1"), "ffn.w3": ("ffn.w2",)},
    ClampedForCausalLM: {"norm_1": ("mix.wv", "mix.wq"), "mix.wv": ("mix.wo",), "norm_2": ("ffn.w3", "ffn.w1")},
    PostNormForCausalLM: {"mix.wv": ("mix.wo",), "ffn.w3": ("ffn.w2",)},
}  # fmt: skip


@pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.__name__)
def test_an_unknown_architecture_is_mapped_and_keeps_its_function(kind: type[Any], tmp_path: Path) -> None:
    source = odd_checkpoint(kind, tmp_path / "source")
    job = open_job(source, recipe())

    assert [{m.smooth: m.balance for m in task.mappings} for task in job.plan.layers] == [EXPECTED[kind]] * 2
    choose = partial(random_scales, generator=torch.Generator().manual_seed(5))
    smoothed = smoothed_checkpoint(job, tmp_path / "smoothed", choose)
    expected = logits(load(source), PROBE)
    assert distance(logits(load(smoothed), PROBE), expected) < 1e-4

    summary = quantized(source, tmp_path / "output")
    assert any("inferred from its structure" in warning for warning in summary.warnings)
    model, info = load(tmp_path / "output", output_loading_info=True)
    assert {key: found for key, found in info.items() if found} == {}
    assert distance(logits(model, PROBE), expected) < 0.03


def test_an_architecture_in_which_nothing_preserves_the_function_is_refused(tmp_path: Path) -> None:
    source = odd_checkpoint(HopelessForCausalLM, tmp_path / "source")

    with pytest.raises(
        ModelError, match=r"HopelessForCausalLM: no mapping known, and none found.*give AWQModifier mappings"
    ):
        quantized(source, tmp_path / "output")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("family", "smooth", "balance", "reason"),
    [
        ("llama", "input_layernorm", "gate_proj", "does not read the output of input_layernorm"),
        ("llama", "up_proj", "o_proj", "128 outputs"),
        ("llama", "post_attention_layernorm", "down_proj", "does not read the output"),
        ("olmo2", "post_attention_layernorm", "up_proj", "does not read the output"),
        ("gemma3", "post_attention_layernorm", "up_proj", "does not read the output"),
        ("starcoder2", "v_proj", "c_fc", "reads the output of post_attention_layernorm"),
        ("gpt-neox", "input_layernorm", "dense_4h_to_h", "does not read the output"),
    ],
)
def test_a_users_mapping_between_unconnected_modules_is_skipped_with_its_reason(
    family: str, smooth: str, balance: str, reason: str, tmp_path: Path
) -> None:
    source = tiny_checkpoint(family, tmp_path / "source")

    summary = quantized(source, tmp_path / "output", AWQMapping(f"re:.*{smooth}$", [f"re:.*{balance}$"]))

    for record in summary.layers:
        assert not record.mappings
        assert [skipped.mapping for skipped in record.skipped] == [f"re:.*{smooth}$ -> re:.*{balance}$"]
        assert reason in record.skipped[0].reason
    norms = {name: tensor for name, tensor in read_all(source).items() if "norm" in name}
    output = read_all(tmp_path / "output")
    assert all(torch.equal(output[name], tensor) for name, tensor in norms.items())


@pytest.mark.parametrize(
    ("family", "changes", "smooth", "balance"),
    [
        ("llama", {}, "gate_proj", "down_proj"),  # SiLU lies between
        ("llama", {}, "q_proj", "o_proj"),
        ("llama", {}, "k_proj", "o_proj"),  # as many rows as v_proj
        ("llama-mha", {}, "k_proj", "o_proj"),
        ("starcoder2", {}, "c_fc", "c_proj"),  # GELU
        ("opt", {"activation_function": "gelu"}, "fc1", "fc2"),
        (
            "opt",
            {"do_layer_norm_before": False},
            "self_attn_layer_norm",
            "fc1",
        ),  # the norm's output is the residual too
        ("gpt-neox", {}, "query_key_value", "dense"),  # q, k and v take turns by head
        ("gpt-neox", {}, "dense_h_to_4h", "dense_4h_to_h"),
    ],
)
def test_a_users_mapping_that_changes_the_function_stops_the_run(
    family: str, changes: dict[str, Any], smooth: str, balance: str, tmp_path: Path
) -> None:
    source = tiny_checkpoint(family, tmp_path / "source", **changes)

    with pytest.raises(NumericalError, match=rf"layer 0: smoothing changed its output.*{smooth} -> .*{balance}"):
        quantized(source, tmp_path / "output", AWQMapping(f"re:.*{smooth}$", [f"re:.*{balance}$"]))

    assert not (tmp_path / "output" / INDEX_FILE).exists()
    assert not list((tmp_path / "output").glob("*.safetensors"))


def test_the_error_of_a_mapping_that_changes_the_function_names_that_mapping_alone(tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", tmp_path / "source")
    right = AWQMapping("re:.*input_layernorm$", ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"])
    wrong = AWQMapping("re:.*gate_proj$", ["re:.*down_proj$"])

    with pytest.raises(NumericalError, match=r"architecture: mlp\.gate_proj -> mlp\.down_proj; nothing"):
        quantized(source, tmp_path / "output", right, wrong)


def test_a_users_pattern_that_names_nothing_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", tmp_path / "source")

    with pytest.raises(RecipeError, match=r"mappings: 're:\.\*upproj\$' matches no module; .*up_proj"):
        quantized(source, tmp_path / "output", AWQMapping("re:.*upproj$", ["re:.*down_proj$"]))


def test_a_mapping_that_lists_two_of_three_readers_compensates_the_third(tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", tmp_path / "source")
    mapping = AWQMapping("re:.*input_layernorm", ["re:.*q_proj", "re:.*k_proj"])

    summary = quantized(source, tmp_path / "output", mapping)

    assert [len(m.balance_layers) for record in summary.layers for m in record.mappings] == [3, 3]
    before, after = read_all(source), read_all(tmp_path / "output")
    name = "model.layers.0.input_layernorm.weight"
    assert (before[name] / after[name]).max() > 1.1, "nothing was smoothed, so nothing is tested"
    assert distance(logits(load(tmp_path / "output"), PROBE), logits(load(source), PROBE)) < 0.03


def test_one_right_mapping_in_two_halves_is_applied_once(tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", tmp_path / "source")
    halves = [AWQMapping("re:.*input_layernorm", [f"re:.*{name}_proj"]) for name in "qkv"]

    summary = quantized(source, tmp_path / "output", *halves)

    assert [len(record.mappings) for record in summary.layers] == [1, 1]
    assert all("earlier mapping" in skipped.reason for record in summary.layers for skipped in record.skipped)
    assert distance(logits(load(tmp_path / "output"), PROBE), logits(load(source), PROBE)) < 0.03
