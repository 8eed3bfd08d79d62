"""Output formats: one contract for all, then each against what its readers define."""

from __future__ import annotations

import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from support.quant_oracles import activations, random_weight
from support.tiny_models import tiny_checkpoint
from torch import Tensor

from awqdist.errors import RecipeError
from awqdist.export.formats import Format, output_format
from awqdist.quant.gptq import gptq
from awqdist.quant.grid import QuantizedWeight, group_range, make_grid, round_to_nearest, scheme_args
from awqdist.recipe import Recipe, Rounding, WeightScheme, load_recipe

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUPED, SYMMETRIC, PER_ROW = WeightScheme(4, False, 32), WeightScheme(4, True, 32), WeightScheme(4, False, -1)
OTHER_BITS = [WeightScheme(b, s, g) for b in (2, 3, 5, 6, 7, 8) for s in (False, True) for g in (32, -1)]
CONTRACT = [  # (format, scheme): all that each format can hold
    *((name, scheme) for name in ("compressed-tensors", "autoawq") for scheme in (GROUPED, SYMMETRIC, PER_ROW)),
    *(("compressed-tensors", scheme) for scheme in OTHER_BITS),
]


def random_codes(scheme: WeightScheme, dtype: torch.dtype, shape: tuple[int, int] = (24, 96)) -> QuantizedWeight:
    """Every code and zero point that the scheme has, and random scales."""
    generator = torch.Generator().manual_seed(0)
    num_groups = shape[1] // scheme.group_size if scheme.group_size > 0 else 1
    codes = torch.randint(0, 2**scheme.num_bits, shape, generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 2**scheme.num_bits, (shape[0], num_groups), generator=generator, dtype=torch.uint8)
    if scheme.symmetric:
        zero = torch.full_like(zero, 2 ** (scheme.num_bits - 1))
    scale = (torch.rand(shape[0], num_groups, generator=generator) + 0.01).to(dtype)
    return QuantizedWeight(codes, scale, zero, scheme)


def recipe(weights: str, ignore: str = "[lm_head]", awq: bool = False) -> Recipe:
    return load_recipe(recipe_text(weights, ignore, awq))


def recipe_text(
    weights: str, ignore: str = "[lm_head]", awq: bool = False, modifier: str = "QuantizationModifier"
) -> str:
    smoothing = "AWQModifier: {n_grid: 4}\n    " if awq else ""
    return f"""
default_stage:
  default_modifiers:
    {smoothing}{modifier}:
      ignore: {ignore}
      {weights}
"""


def group(bits: int = 4, symmetric: bool = False, size: int = 32, more: str = "") -> str:
    strategy = f"strategy: group, group_size: {size}" if size > 0 else "strategy: channel"
    args = f"num_bits: {bits}, type: int, symmetric: {str(symmetric).lower()}, {strategy}{more}"
    return f"config_groups: {{group_0: {{targets: [Linear], weights: {{{args}}}}}}}"


# the contract


@pytest.mark.parametrize("num_outputs", [8, 24, 40])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "scheme"), CONTRACT, ids=str)
def test_unpacking_gives_what_was_packed(name: str, scheme: WeightScheme, dtype: torch.dtype, num_outputs: int) -> None:
    output = output_format(name)
    weight = random_codes(scheme, output.grid_dtype(dtype), (num_outputs, 96))
    back = output.unpack(output.pack(weight), scheme)
    for ours, theirs in zip(fields(back), fields(weight), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert back.scheme == scheme


def fields(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    return weight.codes, weight.weight_scale, weight.zero_point


@pytest.mark.parametrize(("name", "scheme"), CONTRACT, ids=str)
def test_rows_of_a_stack_are_packed_as_if_alone(name: str, scheme: WeightScheme) -> None:
    """Linears that read one input are rounded together and packed apart, from views."""
    output = output_format(name)
    whole = random_codes(scheme, output.grid_dtype(torch.bfloat16), (32, 96))
    part = QuantizedWeight(*(t[8:24] for t in fields(whole)), scheme)
    alone = QuantizedWeight(*(t[8:24].clone() for t in fields(whole)), scheme)
    packed = output.pack(part)
    for kind, tensor in output.pack(alone).items():
        assert torch.equal(packed[kind], tensor)
        assert packed[kind].is_contiguous()


@pytest.mark.parametrize(("name", "scheme"), CONTRACT, ids=str)
def test_packing_leaves_the_codes_alone(name: str, scheme: WeightScheme) -> None:
    output = output_format(name)
    weight = random_codes(scheme, output.grid_dtype(torch.bfloat16))
    before = [t.clone() for t in fields(weight)]
    output.pack(weight)
    assert all(torch.equal(a, b) for a, b in zip(fields(weight), before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["compressed-tensors", "autoawq"])
def test_the_grid_is_fixed_in_the_dtype_that_is_stored(name: str, dtype: torch.dtype) -> None:
    output = output_format(name)
    grid_dtype = output.grid_dtype(dtype)
    assert grid_dtype == (dtype if name == "compressed-tensors" else torch.float16)
    weight = random_weight(8, 64).to(grid_dtype)
    rounded = round_to_nearest(weight, make_grid(*group_range(weight, GROUPED), GROUPED))
    packed = output.pack(rounded)
    assert packed["scales" if name == "autoawq" else "weight_scale"].dtype == grid_dtype
    assert torch.equal(output.unpack(packed, GROUPED).dequantize(), rounded.dequantize())


@pytest.mark.parametrize("name", ["compressed-tensors", "autoawq"])
def test_the_config_is_plain_json_and_names_what_is_ignored(name: str) -> None:
    output = output_format(name)
    config = output.config(recipe(group()), ["model.layers.0.self_attn.q_proj", "lm_head"])
    assert json.loads(json.dumps(config)) == config
    ignored = config["ignore" if name == "compressed-tensors" else "modules_to_not_convert"]
    assert ignored == ["model.layers.0.self_attn.q_proj", "lm_head"]


@pytest.mark.parametrize("name", ["compressed-tensors", "autoawq"])
def test_both_formats_hold_the_presets(name: str) -> None:
    for preset in ("awq", "default"):
        output_format(name).check(load_recipe(preset))


@pytest.mark.parametrize(("wrong", "nearest"), [("autoAWQ", "autoawq"), ("compressed_tensors", "compressed-tensors")])
def test_an_unknown_format_is_refused_with_the_nearest_name(wrong: str, nearest: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown output format '{wrong}'; did you mean '{nearest}'"):
        output_format(wrong)


# compressed-tensors


@pytest.mark.parametrize("scheme", [GROUPED, SYMMETRIC, PER_ROW, *OTHER_BITS], ids=str)
@pytest.mark.parametrize("shape", [(1, 32), (3, 32), (33, 96)])
def test_compressed_tensors_hold_any_number_of_outputs(shape: tuple[int, int], scheme: WeightScheme) -> None:
    output, weight = output_format("compressed-tensors"), random_codes(scheme, torch.bfloat16, shape)
    back = output.unpack(output.pack(weight), scheme)
    assert all(torch.equal(a, b) for a, b in zip(fields(back), fields(weight), strict=True))


@pytest.mark.parametrize("num_inputs", [7, 40, 100])
@pytest.mark.parametrize("num_bits", [3, 4, 5])
def test_compressed_tensors_hold_any_number_of_inputs_per_row(num_bits: int, num_inputs: int) -> None:
    scheme = WeightScheme(num_bits, False, -1)
    output, weight = output_format("compressed-tensors"), random_codes(scheme, torch.bfloat16, (5, num_inputs))
    packed = output.pack(weight)
    assert packed["weight_packed"].shape == (5, -(-num_inputs * num_bits // 32))
    assert packed["weight_packed"].tolist() == slow_pack(weight.codes, num_bits)
    assert torch.equal(output.unpack(packed, scheme).codes, weight.codes)


def test_the_lowest_code_sits_in_the_lowest_bits() -> None:
    weight = QuantizedWeight(
        torch.arange(8, dtype=torch.uint8)[None], torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8), PER_ROW
    )
    packed = output_format("compressed-tensors").pack(weight)["weight_packed"]
    assert packed.dtype == torch.int32
    assert packed.tolist() == [[0x76543210]]  # q = [-8 .. -1]


def slow_pack(values: Tensor, bits: int) -> list[list[int]]:
    """Rows of codes as one stream of bits, lowest first, cut into signed 32 bit words."""
    words = []
    for row in values.tolist():
        stream = sum(code << (bits * i) for i, code in enumerate(row))
        cut = [stream >> (32 * i) & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))]
        words.append([word - (1 << 32) if word >> 31 else word for word in cut])
    return words


@pytest.mark.parametrize("scheme", [GROUPED, SYMMETRIC, PER_ROW, *OTHER_BITS], ids=str)
def test_compressed_tensors_are_streams_of_bits_of_the_documented_shapes(scheme: WeightScheme) -> None:
    bits, weight = scheme.num_bits, random_codes(scheme, torch.bfloat16, (21, 96))
    packed = output_format("compressed-tensors").pack(weight)
    num_groups = 3 if scheme.group_size > 0 else 1
    assert packed["weight_packed"].shape == (21, 96 * bits // 32)
    assert packed["weight_packed"].tolist() == slow_pack(weight.codes, bits)
    assert packed["weight_shape"].dtype == torch.int64
    assert packed["weight_shape"].tolist() == [21, 96]
    assert packed["weight_scale"].shape == (21, num_groups)
    assert packed["weight_scale"].dtype == torch.bfloat16
    if scheme.symmetric:
        assert "weight_zero_point" not in packed
    else:
        assert packed["weight_zero_point"].dtype == torch.int32
        assert packed["weight_zero_point"].shape == (-(-21 * bits // 32), num_groups)
        assert packed["weight_zero_point"].T.tolist() == slow_pack(weight.zero_point.T, bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("scheme", [GROUPED, SYMMETRIC, PER_ROW, *OTHER_BITS], ids=str)
def test_tensors_are_those_that_compressed_tensors_itself_compresses(
    scheme: WeightScheme, rounding: str, dtype: torch.dtype
) -> None:
    """What compressed-tensors makes of the rounded weight, as a float tensor, under the same grid."""
    weight, x = random_weight(24, 96).to(dtype), activations(200, 96)
    grid = make_grid(*group_range(weight, scheme), scheme)
    compensated = gptq([weight.float()], [x.T @ x], [grid], Rounding("gptq"))[0]
    result = round_to_nearest(weight, grid) if rounding == "nearest" else compensated
    signed_zero = result.zero_point.to(torch.int16) - 2 ** (scheme.num_bits - 1)
    state = {
        "weight": result.dequantize()
        if rounding == "gptq"
        else weight,  # bfloat16 has too few digits to tell 256 codes apart
        "weight_scale": result.weight_scale,
        "weight_zero_point": signed_zero.to(torch.int8),
    }
    described = QuantizationScheme(targets=["Linear"], weights=scheme_args(scheme))
    expected = PackedQuantizationCompressor.compress(state, described)
    packed = output_format("compressed-tensors").pack(result)
    assert packed.keys() == expected.keys()
    for kind, tensor in expected.items():
        assert packed[kind].dtype == tensor.dtype
        assert torch.equal(packed[kind], tensor)
    restored = PackedQuantizationCompressor.decompress(packed, described)["weight"]
    torch.testing.assert_close(restored.float(), result.dequantize(), rtol=1e-2, atol=1e-6)


def peer_config(ignore: list[str], **weights: Any) -> dict[str, Any]:
    """`quantization_config` as llm-compressor 0.14 wrote it (with compressed-tensors 0.19), but for the version."""
    plain = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": 128,
        "num_bits": 4,
        "observer": "memoryless_minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": "group",
        "symmetric": False,
        "type": "int",
        "zp_dtype": "torch.int8",
    }
    return {
        "config_groups": {
            "group_0": {
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {**plain, **weights},
            }
        },
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
    }


def without_empty(config: Any) -> Any:
    """Drops entries that are null or empty, which newer compressed-tensors leave out, and the version."""
    if not isinstance(config, dict):
        return config
    kept = {key: without_empty(value) for key, value in config.items() if key != "version"}
    return {key: value for key, value in kept.items() if value is not None and value != {}}


GPTQ = "scheme: W4A16_ASYM"
WRITTEN_BY_THE_PEER = {
    "preset": (recipe_text("scheme: W4A16_ASYM", awq=True), {}),
    "symmetric preset": (recipe_text("scheme: W4A16"), {"symmetric": True, "zp_dtype": None}),
    "8 bit preset": (recipe_text("scheme: W8A16"), {"num_bits": 8, "symmetric": True, "zp_dtype": None}),
    "8 bit per row": (recipe_text(group(8, size=-1)), {"num_bits": 8, "strategy": "channel", "group_size": None}),
    "groups of 32": (recipe_text(group()), {"group_size": 32}),
    "an observer by name": (recipe_text(group(more=", observer: minmax")), {"group_size": 32, "observer": "minmax"}),
    "gptq": (recipe_text(GPTQ, modifier="GPTQModifier"), {"actorder": "static"}),
    "gptq in plain order": (recipe_text(f"{GPTQ}\n      actorder: null", modifier="GPTQModifier"), {"actorder": None}),
    "gptq by weight": (recipe_text(f"{GPTQ}\n      actorder: weight", modifier="GPTQModifier"), {"actorder": "weight"}),
}  # fmt: skip


@pytest.mark.parametrize(("text", "weights"), WRITTEN_BY_THE_PEER.values(), ids=list(WRITTEN_BY_THE_PEER))
def test_the_config_is_what_llm_compressor_writes(text: str, weights: dict[str, Any]) -> None:
    config = output_format("compressed-tensors").config(load_recipe(text), ["lm_head"])
    assert config["version"] == version("compressed-tensors")
    assert without_empty(config) == without_empty(peer_config(["lm_head"], **weights))
    assert config.keys() - {"version"} == peer_config([]).keys(), "the outermost entries are all there, even empty ones"


@pytest.mark.parametrize(("text", "weights"), WRITTEN_BY_THE_PEER.values(), ids=list(WRITTEN_BY_THE_PEER))
def test_compressed_tensors_reads_the_config_back(text: str, weights: dict[str, Any]) -> None:
    written = output_format("compressed-tensors").config(load_recipe(text), ["lm_head"])
    for config in (written, peer_config(["lm_head"], **weights)):
        read = QuantizationConfig.model_validate(
            {k: v for k, v in config.items() if k not in ("version", "sparsity_config")}
        )
        args = read.config_groups["group_0"].weights
        assert args is not None
        expected = load_recipe(text).groups[0].weights
        assert (args.num_bits, args.symmetric) == (expected.num_bits, expected.symmetric)
        assert (args.group_size or -1) == expected.group_size


def test_every_group_keeps_its_own_scheme() -> None:
    both = """config_groups:
        a: {targets: ["re:.*q_proj"], weights: {num_bits: 8, symmetric: true, strategy: channel}}
        b: {targets: ["re:.*mlp.*"], weights: {num_bits: 3, symmetric: false, strategy: group, group_size: 32}}"""
    groups = output_format("compressed-tensors").config(recipe(both), [])["config_groups"]
    found = {g["targets"][0]: (g["weights"]["num_bits"], g["weights"].get("group_size")) for g in groups.values()}
    assert found == {"re:.*q_proj": (8, None), "re:.*mlp.*": (3, 32)}


# AutoAWQ


def test_eight_columns_share_a_word_in_autoawqs_order() -> None:
    codes = torch.arange(8, dtype=torch.uint8).unsqueeze(1)  # (8, 1): row 0 of qweight holds columns 0 to 7
    weight = QuantizedWeight(codes, torch.ones(8, 1), codes.flip(0).clone(), PER_ROW)
    packed = output_format("autoawq").pack(weight)
    assert packed["qweight"].tolist() == [[0x75316420]]
    assert packed["qzeros"].tolist() == [[0x02461357]]


@pytest.mark.parametrize("scheme", [GROUPED, SYMMETRIC, PER_ROW], ids=str)
def test_autoawq_tensors_are_those_of_a_loop_over_its_definition(scheme: WeightScheme) -> None:
    weight = random_codes(scheme, torch.float16)
    packed = output_format("autoawq").pack(weight)
    num_groups = weight.weight_scale.shape[1]
    assert packed["qweight"].shape == (96, 3)
    assert packed["qzeros"].shape == (num_groups, 3)
    assert packed["scales"].shape == (num_groups, 24)
    assert packed["scales"].dtype == torch.float16
    assert torch.equal(packed["scales"], weight.weight_scale.T)
    for kind, values in (("qweight", weight.codes.T), ("qzeros", weight.zero_point.T)):
        assert packed[kind].dtype == torch.int32
        for k in range(values.shape[0]):
            for c in range(3):
                word = 0
                for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                    word |= int(values[k, 8 * c + column]) << (4 * i)
                assert int(packed[kind][k, c]) & 0xFFFFFFFF == word
    if scheme.symmetric:
        assert (packed["qzeros"] == -0x77777778).all(), "zero points of 8"


def test_autoawqs_dequantization_gives_the_same_weights() -> None:
    """W[k, n] = (qweight - qzeros)·scales in float16, as its kernels compute it."""
    weight = random_codes(GROUPED, torch.float16)
    packed = {k: t.numpy() for k, t in output_format("autoawq").pack(weight).items()}
    place = [0, 4, 1, 5, 2, 6, 3, 7]  # where column c of eight lies in a word, in nibbles

    def nibbles(words: Any) -> Any:
        return np.stack([words >> (4 * place[c % 8]) & 15 for c in range(8)], -1).reshape(words.shape[0], -1)

    zeros, scales = (np.repeat(t, 32, 0) for t in (nibbles(packed["qzeros"]), packed["scales"].astype(np.float32)))
    np.testing.assert_array_equal((nibbles(packed["qweight"]) - zeros) * scales, weight.dequantize().numpy().T)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_autoawq_config_says_what_its_readers_need(symmetric: bool) -> None:
    """vLLM asks for bits, group_size and zero_point; `zero_point: false` is read in different ways and never written."""
    assert output_format("autoawq").config(recipe(group(4, symmetric, 64)), ["lm_head"]) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }


TWO_SCHEMES = """config_groups:
        a: {targets: ["re:.*q_proj"], weights: {num_bits: 4, symmetric: true, strategy: group, group_size: 32}}
        b: {targets: ["re:.*mlp.*"], weights: {num_bits: 4, symmetric: false, strategy: group, group_size: 32}}"""


@pytest.mark.parametrize("weights", [group(8), group(3), TWO_SCHEMES], ids=["8 bit", "3 bit", "two schemes"])
def test_autoawq_refuses_what_it_cannot_hold_and_compressed_tensors_does_not(weights: str) -> None:
    with pytest.raises(RecipeError, match="autoawq format holds one 4 bit scheme"):
        output_format("autoawq").check(recipe(weights))
    output_format("compressed-tensors").check(recipe(weights))


def test_autoawq_refuses_outputs_that_do_not_fill_its_words() -> None:
    with pytest.raises(RecipeError, match="multiples of 8; a linear has 20"):
        output_format("autoawq").pack(random_codes(GROUPED, torch.float16, (20, 96)))


# the peer itself

_PEER = """
import json, sys
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer
IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None  # 0.14 pins memory always, which fails without an accelerator
source, output, recipes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
ids = [[(7 * i * j + 3) % 128 for i in range(16)] for j in range(4)]
data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 16] * 4})
for name, recipe in recipes.items():
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    oneshot(model=model, processor=AutoTokenizer.from_pretrained(source), dataset=data, recipe=recipe, max_seq_length=16,
            num_calibration_samples=4)
    model.save_pretrained(f"{output}/{name}", save_compressed=True)
"""


@pytest.mark.peer
@pytest.mark.skipif(
    not os.environ.get("AWQDIST_PEER_PYTHON"), reason="AWQDIST_PEER_PYTHON names no Python with llm-compressor"
)
def test_llm_compressor_itself_writes_the_same_config(tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", tmp_path / "source", torch.bfloat16)
    texts = {
        "awq": recipe_text(group(), awq=True),
        "symmetric": recipe_text(group(symmetric=True), ignore='[lm_head, "re:.*down_proj"]'),
        "per_row": recipe_text(group(8, size=-1)),
        "gptq": recipe_text(group(), modifier="GPTQModifier"),
        "plain_order": recipe_text(group() + "\n      actorder: null", modifier="GPTQModifier"),
    }
    command = [os.environ["AWQDIST_PEER_PYTHON"], "-c", _PEER, str(source), str(tmp_path), json.dumps(texts)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    for name, text in texts.items():
        theirs = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        ours = output_format("compressed-tensors").config(load_recipe(text), theirs["ignore"])
        assert without_empty(ours) == without_empty(theirs), name


def test_the_contract_covers_every_format() -> None:
    known = {output.name for output in all_formats()}
    assert {name for name, _ in CONTRACT} == known


def all_formats() -> list[Format]:
    with pytest.raises(RecipeError) as refusal:
        output_format("?")
    return [output_format(name) for name in str(refusal.value).rpartition("known: ")[2].split(", ")]


def test_autoawq_names_a_linear_whose_outputs_do_not_come_by_eights_before_the_run() -> None:
    with pytest.raises(RecipeError, match=r"model\.layers\.0\.gate has 12"):
        output_format("autoawq").check_linears({"model.layers.0.gate": (12, 64)})
    output_format("compressed-tensors").check_linears({"model.layers.0.gate": (12, 64)})
