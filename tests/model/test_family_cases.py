"""What a checkpoint may have besides its family: dtypes, shards, tied or quantized heads, ignored linears, settings that change a layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.family_oracles import (
    dequantized_checkpoint,
    distance,
    load,
    logits,
    open_job,
    read_all,
    recipe,
    smoothed_checkpoint,
    token_ids,
    write_all,
)
from support.tiny_models import WINDOW, tiny_checkpoint
from torch import Tensor

from awqdist import oneshot
from awqdist.errors import ModelError, RecipeError
from awqdist.layer.records import RunSummary
from awqdist.recipe import Recipe

SAMPLES = token_ids(6)
PROBE = token_ids(2, seed=1)


def quantized(source: Path, output: Path, chosen: Recipe) -> RunSummary:
    return oneshot(
        model=str(source),
        dataset=SAMPLES.tolist(),
        recipe=chosen,
        output_dir=output,
        num_calibration_samples=SAMPLES.shape[0],
        max_seq_length=SAMPLES.shape[1],
        device="cpu",
    )


def loaded(folder: Path) -> Any:
    model, info = load(folder, output_loading_info=True)
    assert {key: found for key, found in info.items() if found} == {}
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "phi3"])
def test_the_checkpoints_dtype_is_kept(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny_checkpoint(family, tmp_path / "source", dtype)
    summary = quantized(source, tmp_path / "output", recipe(8))

    output = read_all(tmp_path / "output")
    assert {tensor.dtype for tensor in output.values()} == {dtype, torch.int32, torch.int64}
    assert all(record.smoothing_error < 1e-4 for record in summary.layers)
    model = loaded(tmp_path / "output")
    assert model.dtype == dtype
    expected = logits(load(source, dtype=torch.float32), PROBE)
    assert distance(logits(load(tmp_path / "output", dtype=torch.float32), PROBE), expected) < 0.03


def test_a_sharded_source_gives_the_bytes_of_a_single_file(tmp_path: Path) -> None:
    single = tiny_checkpoint("llama", tmp_path / "single")
    sharded = tiny_checkpoint("llama", tmp_path / "sharded", shard_bytes=100_000)
    assert len(list(sharded.glob("*.safetensors"))) > 2

    quantized(single, tmp_path / "from-single", recipe())
    quantized(sharded, tmp_path / "from-sharded", recipe())

    expected, found = read_all(tmp_path / "from-single"), read_all(tmp_path / "from-sharded")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    loaded(tmp_path / "from-sharded")


def test_tied_embeddings_stay_one_tensor_in_full_precision(tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", tmp_path / "source", tie_word_embeddings=True)
    quantized(source, tmp_path / "output", recipe(8))

    output = read_all(tmp_path / "output")
    assert not [name for name in output if name.startswith("lm_head")]
    assert torch.equal(output["model.embed_tokens.weight"], read_all(source)["model.embed_tokens.weight"])
    model = loaded(tmp_path / "output")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert distance(logits(model, PROBE), logits(load(source), PROBE)) < 0.03


@pytest.mark.parametrize("family", ["llama", "gemma3-vision", "opt"])
@pytest.mark.parametrize("stored_twice", [False, True])
def test_a_tied_head_is_refused_as_a_target(family: str, stored_twice: bool, tmp_path: Path) -> None:
    source = tiny_checkpoint(family, tmp_path / "source", tie_word_embeddings=True)
    if stored_twice:
        tensors = read_all(source)
        embedding = next(tensor for name, tensor in tensors.items() if "embed_tokens" in name)
        head = "language_model.lm_head.weight" if family == "gemma3-vision" else "lm_head.weight"
        save_file({**tensors, head: embedding.clone()}, source / "model.safetensors")

    with pytest.raises(ModelError, match=r"lm_head is tied to the embeddings.*ignore"):
        quantized(source, tmp_path / "output", recipe(ignore=()))
    quantized(source, tmp_path / "output", recipe())
    loaded(tmp_path / "output")


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "mistral3", "cohere", "granite"])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_an_untied_head_is_quantized_where_the_recipe_does_not_ignore_it(
    family: str, rounding: str, tmp_path: Path
) -> None:
    source = tiny_checkpoint(family, tmp_path / "source", tie_word_embeddings=False)
    summary = quantized(source, tmp_path / "output", recipe(8, ignore=(), rounding=rounding))

    names = {"gpt-neox": "embed_out", "mistral3": "language_model.lm_head"}
    head = names.get(family, "lm_head")
    assert [linear.name for linear in summary.layers[-1].linears] == [head]
    assert f"{head}.weight_packed" in read_all(tmp_path / "output")
    model = loaded(tmp_path / "output")
    assert distance(logits(model, PROBE), logits(load(source), PROBE)) < 0.03
    plain = dequantized_checkpoint(tmp_path / "output", tmp_path / "plain")
    assert distance(logits(load(plain), PROBE), logits(model, PROBE)) < 1e-5


def test_the_heads_error_is_that_of_transformers_own_final_states(tmp_path: Path) -> None:
    source = tiny_checkpoint("gemma2", tmp_path / "source", tie_word_embeddings=False)
    summary = quantized(source, tmp_path / "output", recipe(4, ignore=()))

    model = load(source)
    with torch.no_grad():
        states = model.model(input_ids=SAMPLES).last_hidden_state.flatten(0, 1)
    plain = read_all(dequantized_checkpoint(tmp_path / "output", tmp_path / "plain"))
    weight = model.lm_head.weight.detach()
    expected = ((states @ (plain["lm_head.weight"] - weight).T).norm() / (states @ weight.T).norm()) ** 2
    assert summary.layers[-1].linears[0].relative_error == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(
    "ignored", ["re:.*q_proj$", "re:.*mlp.*", "re:.*layers.0.*", "model.layers.1.self_attn.v_proj"]
)
def test_linears_that_the_recipe_ignores_are_compensated_all_the_same(ignored: str, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", tmp_path / "source")
    quantized(source, tmp_path / "output", recipe(8, ignore=("lm_head", ignored)))

    model = loaded(tmp_path / "output")
    assert distance(logits(model, PROBE), logits(load(source), PROBE)) < 0.03
    before, after = read_all(source), read_all(tmp_path / "output")
    scales = before["model.layers.1.input_layernorm.weight"] / after["model.layers.1.input_layernorm.weight"]
    assert scales.max() > 1.1, "nothing was smoothed, so nothing is tested"
    if (name := "model.layers.1.self_attn.q_proj.weight") in after:
        torch.testing.assert_close(after[name], before[name] * scales)


@pytest.mark.parametrize(
    "ignored",
    ["re:.*vision_tower.*", "re:model.vision_tower.*", "re:vision_tower.*", "re:.*multi_modal_projector.*", "lm_head"],
)
def test_parts_outside_the_decoder_may_be_ignored_by_either_of_their_names(ignored: str, tmp_path: Path) -> None:
    source = tiny_checkpoint("mistral3", tmp_path / "source")

    job = open_job(source, recipe(ignore=("language_model.lm_head", ignored)))

    assert job.plan.head is None
    assert {name.split(".")[1] for name in job.plan.ignored if "." in name} == {"vision_tower", "multi_modal_projector"}


def test_linears_of_a_vision_model_may_be_ignored_by_either_of_their_names(tmp_path: Path) -> None:
    source = tiny_checkpoint("mistral3", tmp_path / "source")
    names = ("language_model.model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.down_proj")
    quantized(source, tmp_path / "output", recipe(8, ignore=("lm_head", *names)))

    output = read_all(tmp_path / "output")
    dense = {
        name for name in output if name.startswith("language_model.model.layers.0.mlp") and name.endswith(".weight")
    }
    assert dense == {f"language_model.model.layers.0.mlp.{name}.weight" for name in ("up_proj", "down_proj")}
    assert distance(logits(loaded(tmp_path / "output"), PROBE), logits(load(source), PROBE)) < 0.03


def test_a_target_that_matches_no_linear_is_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", tmp_path / "source")

    with pytest.raises(RecipeError, match=r"targets: 're:\.\*mpl\.\*' matches no module"):
        open_job(source, recipe(targets=("re:.*attn.*", "re:.*mpl.*")))


@pytest.mark.parametrize("family", ["mistral3", "gemma3-vision"])
def test_a_checkpoint_with_the_names_of_transformers_own_modules_is_read_too(family: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(family, tmp_path / "published")
    tensors = {name: tensor.clone() for name, tensor in load(source).state_dict().items()}
    if family == "gemma3-vision":
        del tensors["lm_head.weight"]  # tied
    renamed = write_all(tmp_path / "renamed", source, tensors)
    assert not set(tensors) & set(read_all(source))

    quantized(renamed, tmp_path / "output", recipe(8))

    assert distance(logits(loaded(tmp_path / "output"), PROBE), logits(load(source), PROBE)) < 0.03


def test_a_vision_model_with_the_flat_configuration_of_the_hub_is_read_too(tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen2.5-vl", tmp_path / "nested")
    flat = write_all(tmp_path / "flat", source, read_all(source))
    fields = json.loads((flat / "config.json").read_text())
    text = fields.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    kept = {key: value for key, value in text.items() if key != "model_type"}
    (flat / "config.json").write_text(
        json.dumps({**kept, **fields, "rope_theta": rope["rope_theta"], "rope_scaling": scaling})
    )

    quantized(source, tmp_path / "from-nested", recipe())
    quantized(flat, tmp_path / "from-flat", recipe())

    expected, found = read_all(tmp_path / "from-nested"), read_all(tmp_path / "from-flat")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.equal(logits(loaded(tmp_path / "from-flat"), PROBE), logits(load(tmp_path / "from-nested"), PROBE))


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
def test_a_quantized_vision_model_sees_what_the_float_model_sees(family: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(family, tmp_path / "source")
    quantized(source, tmp_path / "output", recipe(8))
    config = load(source).config
    tokens = torch.tensor([[1, config.vision_start_token_id, config.image_token_id, config.vision_end_token_id, 9, 8]])
    patches = torch.randn(4, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(2))  # (patches, channels of each)

    def seen(folder: Path, pixels: Tensor) -> Tensor:
        shape, kinds = torch.tensor([[1, 2, 2]]), (tokens == config.image_token_id).int()
        with torch.no_grad():
            found = load(folder)(tokens, pixel_values=pixels, image_grid_thw=shape, mm_token_type_ids=kinds)
        return found.logits

    assert distance(seen(tmp_path / "output", patches), seen(source, patches)) < 0.03
    assert distance(seen(source, 0 * patches), seen(source, patches)) > 0.03


def test_tensors_that_the_model_does_not_know_are_copied_and_told(tmp_path: Path) -> None:
    source = tiny_checkpoint("gpt-neox", tmp_path / "source")
    old = {"gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)}
    old["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    save_file({**read_all(source), **old}, source / "model.safetensors")

    summary = quantized(source, tmp_path / "output", recipe(8))

    output = read_all(tmp_path / "output")
    assert all(torch.equal(output[name], tensor) for name, tensor in old.items())
    assert any("gpt_neox.layers.0.attention" in warning for warning in summary.warnings)
    assert distance(logits(load(tmp_path / "output"), PROBE), logits(load(source), PROBE)) < 0.03


VARIANTS: list[tuple[str, dict[str, Any], set[str]]] = [
    ("opt", {"activation_function": "gelu"}, {"self_attn.q_proj", "self_attn.out_proj", "fc1"}),
    ("opt", {"do_layer_norm_before": False}, {"self_attn.out_proj", "fc2"}),
    ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}, {"self_attn.out_proj", "fc2"}),
    ("opt", {"word_embed_proj_dim": 32}, {"self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"}),
    ("gpt-neox", {"use_parallel_residual": False}, {"attention.query_key_value", "mlp.dense_h_to_4h"}),
    ("olmo", {"clip_qkv": 0.5}, {"mlp.down_proj"}),
    ("cohere", {"use_qk_norm": False}, {"self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"}),
    ("granite", {"attention_bias": True, "mlp_bias": True}, {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}),
    ("llama", {"num_key_value_heads": 1}, {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}),
    ("phi3", {"num_key_value_heads": 4}, {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}),
    ("phi3", {"num_key_value_heads": 1}, {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}),
    ("llama", {"num_hidden_layers": 1}, {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "expected"), VARIANTS)
def test_settings_that_change_a_layer_change_its_mappings(
    family: str, changes: dict[str, Any], expected: set[str], tmp_path: Path
) -> None:
    source = tiny_checkpoint(family, tmp_path / "source", **changes)
    job = open_job(source, recipe())

    assert {mapping.balance[0] for mapping in job.plan.layers[0].mappings} == expected
    generator = torch.Generator().manual_seed(3)

    def random(task: Any, mapping: Any, weights: dict[str, Tensor]) -> Tensor:
        channels = mapping.source_channels(task.by_path[mapping.balance[0]].shape[1])
        return torch.exp2(2 * torch.rand(int(channels.max()) + 1, generator=generator) - 1)[channels]

    smoothed = smoothed_checkpoint(job, tmp_path / "smoothed", random)
    expected_logits = logits(load(source), PROBE)
    assert distance(logits(load(smoothed), PROBE), expected_logits) < 1e-4
    quantized(source, tmp_path / "output", recipe(8))
    assert distance(logits(loaded(tmp_path / "output"), PROBE), expected_logits) < 0.03


def test_sliding_window_layers_see_their_window_only(tmp_path: Path) -> None:
    """The statistics of a layer behind a sliding one differ from those of the same weights without a window."""
    kinds = {"windowed": ["sliding_attention"] * 2, "full": ["full_attention"] * 2}
    errors = {}
    for name, layer_types in kinds.items():
        source = tiny_checkpoint("qwen2", tmp_path / name, layer_types=layer_types, sliding_window=WINDOW)
        summary = quantized(source, tmp_path / f"{name}-output", recipe())
        errors[name] = [mapping.error_before for mapping in summary.layers[0].mappings]

    assert errors["windowed"][0] == errors["full"][0]  # q, k and v read the embeddings
    assert errors["windowed"][1] != errors["full"][1]
    config = json.loads((tmp_path / "windowed-output" / "config.json").read_text())
    assert config["layer_types"] == kinds["windowed"]
