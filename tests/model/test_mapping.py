"""Mappings: patterns tied to one layer, and which channel of the smooth layer feeds which input of the balance layers."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_checkpoint, tiny_model
from torch import Tensor
from transformers import LlamaConfig, OlmoConfig, OPTConfig

from awqdist.checkpoint.index import read_index
from awqdist.errors import RecipeError
from awqdist.model.mapping import HeadShape, Resolution, ResolvedMapping, connect, resolve
from awqdist.model.skeleton import Skeleton, build_skeleton, read_config
from awqdist.model.structure import LayerStructure, trace_layers
from awqdist.recipe import MappingPattern

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")


@cache
def traced(family: str) -> tuple[Skeleton, LayerStructure, HeadShape]:
    with TemporaryDirectory() as folder:
        source = tiny_checkpoint(family, Path(folder))
        skeleton = build_skeleton(read_config(source), read_index(source).entries)
    return skeleton, trace_layers(skeleton)[0], HeadShape.of(skeleton.model.config.get_text_config(decoder=True))


def resolved(family: str, *mappings: tuple[str, list[str]], layer: int = 0) -> Resolution:
    skeleton, structure, heads = traced(family)
    patterns = [MappingPattern(smooth, tuple(balance)) for smooth, balance in mappings]
    name = partial(_on_disk, skeleton.layer_names(layer))
    return resolve(patterns, structure, name, heads)


def _on_disk(names: dict[str, str], path: str) -> str:
    return names[f"{path}.weight"].removesuffix(".weight")


def connected(family: str, smooth: str, *balance: str) -> ResolvedMapping | str:
    _, structure, heads = traced(family)
    return connect(structure, smooth, balance, heads)


@pytest.mark.parametrize(
    ("family", "smooth", "balance"),
    [
        ("llama", "self_attn.v_proj", "self_attn.o_proj"),
        ("llama-mha", "self_attn.v_proj", "self_attn.o_proj"),
        ("qwen3", "self_attn.v_proj", "self_attn.o_proj"),
        ("olmo2", "self_attn.v_proj", "self_attn.o_proj"),
        ("phi3", "self_attn.qkv_proj", "self_attn.o_proj"),
        ("opt", "self_attn.v_proj", "self_attn.out_proj"),
        ("llama", "mlp.up_proj", "mlp.down_proj"),
        ("phi3", "mlp.gate_up_proj", "mlp.down_proj"),
        ("glm4", "mlp.gate_up_proj", "mlp.down_proj"),
        ("lfm2", "conv.in_proj", "conv.out_proj"),
        ("qwen3.5", "linear_attn.norm", "linear_attn.out_proj"),
        ("nemotron-h", "mixer.norm", "mixer.out_proj"),
    ],
)
def test_each_input_channel_comes_from_the_row_that_changes_it(family: str, smooth: str, balance: str) -> None:
    """Oracle: double one row of the smooth layer in transformers' model and see which inputs of the balance layer change."""
    mapping = connected(family, smooth, balance)
    assert isinstance(mapping, ResolvedMapping)
    model = tiny_model(family)
    layer = model.get_submodule(f"{traced(family)[0].prefix}.0")
    weight: Any = layer.get_submodule(smooth).weight
    num_inputs = layer.get_submodule(balance).in_features
    source = mapping.source_channels(num_inputs)
    first_row = weight.shape[0] - mapping.rows_after - (int(source.max()) + 1)  # the last rows of most fused layers
    expected = _inputs(model, layer, balance)

    for channel in range(0, int(source.max()) + 1, 5):
        with torch.no_grad():
            weight[first_row + channel] *= 2
        changed = (_inputs(model, layer, balance) - expected).abs().flatten(0, -2).amax(0) > 1e-7
        with torch.no_grad():
            weight[first_row + channel] /= 2
        assert changed.nonzero().flatten().tolist() == (source == channel).nonzero().flatten().tolist()


def _inputs(model: Any, layer: Any, path: str) -> Tensor:
    seen: list[Tensor] = []
    handle = layer.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.arange(4, 24).unsqueeze(0))
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("ending", ["", "$"])
def test_a_pattern_means_the_same_with_and_without_a_dollar_sign(ending: str) -> None:
    found = resolved(
        "llama",
        (f"re:.*input_layernorm{ending}", [f"re:.*q_proj{ending}", f"re:.*k_proj{ending}", f"re:.*v_proj{ending}"]),
        (f"re:.*v_proj{ending}", [f"re:.*o_proj{ending}"]),
        (f"re:.*post_attention_layernorm{ending}", [f"re:.*gate_proj{ending}", f"re:.*up_proj{ending}"]),
        (f"re:.*up_proj{ending}", [f"re:.*down_proj{ending}"]),
    )

    assert found.mappings == (
        ResolvedMapping("input_layernorm", QKV, True, False, None),
        ResolvedMapping("self_attn.v_proj", ("self_attn.o_proj",), False, False, (2, 2, 16)),
        ResolvedMapping("post_attention_layernorm", MLP, True, False, None),
        ResolvedMapping("mlp.up_proj", ("mlp.down_proj",), False, False, None),
    )
    assert not found.skipped


def test_a_pattern_meets_the_end_of_a_name_wherever_the_name_begins() -> None:
    """`re:.*up_proj` finds Phi 3's gate_up_proj, as it does in llm-compressor."""
    assert resolved("phi3", ("re:.*up_proj$", ["re:.*down_proj$"])).mappings[0].smooth == "mlp.gate_up_proj"
    assert resolved("phi3", ("re:.*mlp.up_proj$", ["re:.*down_proj$"])).skipped[0][1].startswith("no smooth layer")


def test_a_dollar_sign_tells_names_apart_that_begin_alike() -> None:
    """GPT-NeoX has attention.dense, mlp.dense_h_to_4h and mlp.dense_4h_to_h."""
    with_dollar = resolved("gpt-neox", ("re:.*query_key_value$", ["re:.*dense$"]))
    without = resolved("gpt-neox", ("re:.*query_key_value", ["re:.*dense"]))

    assert [mapping.balance for mapping in with_dollar.mappings] == [("attention.dense",)]
    assert not without.mappings
    assert without.skipped[0][1].endswith("do not read one tensor")


def test_a_pattern_that_lists_a_part_of_a_site_means_the_whole_site() -> None:
    found = resolved("llama", ("re:.*input_layernorm", ["re:.*q_proj", "re:.*k_proj"]))

    assert [mapping.balance for mapping in found.mappings] == [QKV]


def test_the_site_of_a_parallel_block_holds_attention_and_mlp() -> None:
    found = resolved("cohere", ("re:.*input_layernorm$", ["re:.*q_proj$"]))

    assert [mapping.balance for mapping in found.mappings] == [(*QKV, *MLP)]


@pytest.mark.parametrize("smooth", ["re:.*self_attn.*", "re:.*norm", "re:.*layers.0"])
def test_a_smooth_layer_that_matches_several_modules_of_a_layer_is_refused(smooth: str) -> None:
    with pytest.raises(RecipeError, match=r"smooth_layer matches \d+ modules of one layer \(.*, .*\)"):
        resolved("llama", (smooth, ["re:.*q_proj"]))


def test_an_exact_name_applies_in_its_own_layer_only() -> None:
    exact = ("model.layers.1.input_layernorm", ["model.layers.1.self_attn.q_proj"])

    assert len(resolved("llama", exact, layer=1).mappings) == 1
    other = resolved("llama", exact, layer=0)
    assert not other.mappings
    assert other.skipped[0][1] == "no smooth layer of that name in this layer"


def test_a_site_is_smoothed_once_and_the_second_mapping_is_told() -> None:
    found = resolved(
        "llama",
        ("re:.*input_layernorm", ["re:.*q_proj", "re:.*k_proj"]),
        ("re:.*input_layernorm", ["re:.*v_proj"]),
        ("re:.*v_proj", ["re:.*o_proj"]),
        ("re:.*q_proj", ["re:.*o_proj"]),
    )

    assert [mapping.balance for mapping in found.mappings] == [QKV, ("self_attn.o_proj",)]
    assert [reason for _, reason in found.skipped] == [
        "an earlier mapping smooths the input of self_attn.q_proj, self_attn.k_proj, self_attn.v_proj by input_layernorm already",
        "an earlier mapping smooths the input of self_attn.o_proj by self_attn.v_proj already",
    ]


@pytest.mark.parametrize(
    ("family", "smooth", "balance", "reason"),
    [
        ("llama", "input_layernorm", ("mlp.gate_proj",), "mlp.gate_proj does not read the output of input_layernorm"),
        ("llama", "input_layernorm", ("self_attn.q_proj", "mlp.up_proj"), "self_attn.q_proj, mlp.up_proj do not read one tensor"),
        ("llama", "mlp.up_proj", ("self_attn.o_proj",), "mlp.up_proj has 128 outputs, self_attn.o_proj reads 64 inputs"),
        ("llama", "mlp.up_proj", ("mlp.gate_proj",), "mlp.gate_proj reads the output of post_attention_layernorm, not of mlp.up_proj"),
        ("olmo2", "post_attention_layernorm", ("mlp.gate_proj",), "mlp.gate_proj does not read the output of post_attention_layernorm"),
        ("olmo2", "self_attn.q_norm", ("self_attn.q_proj",), "self_attn.q_proj does not read the output of self_attn.q_norm"),
        ("gemma2", "post_attention_layernorm", ("mlp.up_proj",), "mlp.up_proj does not read the output of post_attention_layernorm"),
        ("qwen3", "self_attn.q_norm", ("self_attn.o_proj",), "self_attn.o_proj does not read the output of self_attn.q_norm"),
    ],
)  # fmt: skip
def test_modules_that_the_layer_does_not_connect_are_no_mapping(
    family: str, smooth: str, balance: tuple[str, ...], reason: str
) -> None:
    assert connected(family, smooth, *balance) == reason


def test_norms_that_multiply_by_one_plus_their_weight_are_found() -> None:
    assert set(traced("gemma2")[1].norms.values()) == {True}
    assert set(traced("llama")[1].norms.values()) == {False}
    assert set(traced("opt")[1].norms.values()) == {False}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2), HeadShape(4, 2, 16)),
        (LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=32), HeadShape(4, 4, 32)),
        (OPTConfig(hidden_size=64, num_attention_heads=4), HeadShape(4, 4, 16)),
        (OlmoConfig(hidden_size=64, num_attention_heads=4, clip_qkv=8.0), HeadShape(4, 4, 16, clipped=True)),
    ],
)
def test_the_head_shape_is_that_of_the_configuration(config: object, expected: HeadShape) -> None:
    assert HeadShape.of(config) == expected


def test_clamped_values_cannot_be_scaled() -> None:
    _, structure, heads = traced("olmo")
    clipped = HeadShape(heads.num_heads, heads.num_kv_heads, heads.head_dim, clipped=True)

    outcome = connect(structure, "self_attn.v_proj", ("self_attn.o_proj",), clipped)

    assert outcome == "the model clamps the outputs of self_attn.v_proj (clip_qkv)"
