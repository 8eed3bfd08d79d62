"""Recipes: what is read, what it means, and what is refused with which words."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.quant_args import ActivationOrdering
from compressed_tensors.utils.match import match_targets

import awqdist.recipe.modifiers
from awqdist.errors import RecipeError
from awqdist.recipe import (
    AWQMapping,
    AWQModifier,
    GPTQModifier,
    MappingPattern,
    QuantizationModifier,
    Recipe,
    Rounding,
    SchemeGroup,
    Smoothing,
    WeightScheme,
    build_recipe,
    check_patterns_match,
    load_recipe,
    preset_names,
)

STAGED = """
prepare_stage:
  prepare_modifiers:
    AWQModifier:
      requires_calibration_data: true
      offload_device: !!python/object/apply:torch.device [cpu]
      mappings:
      - {smooth_layer: 're:.*norm1$', balance_layers: ['re:.*wq$', 're:.*wk$'], activation_hook_target: null}
      duo_scaling: both
      n_grid: 12
pack_stage:
  pack_modifiers:
    QuantizationModifier:
      targets: [Linear]
      ignore: [head]
      scheme: W4A16_ASYM
      bypass_divisibility_checks: false
      requires_calibration_data: false
"""
FLAT = """
AWQModifier:
  mappings: [{smooth_layer: 're:.*norm1$', balance_layers: ['re:.*wq$', 're:.*wk$']}]
  duo_scaling: both
  n_grid: 12
QuantizationModifier: {ignore: [head], scheme: W4A16_ASYM}
"""
LISTED = """
- AWQModifier:
    mappings: [{smooth_layer: 're:.*norm1$', balance_layers: ['re:.*wq$', 're:.*wk$']}]
    duo_scaling: both
    n_grid: 12
- QuantizationModifier: {ignore: [head], scheme: W4A16_ASYM}
"""
WRITTEN_IN_FULL = """
default_stage:
  default_modifiers:
    GPTQModifier:
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 3, type: int, symmetric: false, group_size: 64, strategy: group, block_structure: null,
            dynamic: false, actorder: null, scale_dtype: null, zp_dtype: torch.int8, observer: memoryless_minmax,
            observer_kwargs: {}}
          input_activations: null
          output_activations: null
          format: null
      targets: [Linear]
      ignore: []
      bypass_divisibility_checks: false
      requires_calibration_data: true
      block_size: 64
      dampening_frac: 0.02
      actorder: static
      batched_quantization: auto
"""


def weights_of(recipe: Recipe) -> WeightScheme:
    return recipe.groups[0].weights


def with_weights(**weights: Any) -> QuantizationModifier:
    fields = {"num_bits": 4, "strategy": "group", "group_size": 128} | weights
    return QuantizationModifier(config_groups={"mine": {"targets": ["Linear"], "weights": fields}})


# Reading


def test_the_python_api_of_the_issue_gives_awq_with_the_given_scheme() -> None:
    args = QuantizationArgs(
        num_bits=4,
        type=QuantizationType.INT,
        dynamic=False,
        symmetric=False,
        strategy=QuantizationStrategy.GROUP,
        group_size=128,
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}
    recipe = build_recipe(
        [AWQModifier(bits=4, symmetric=False), QuantizationModifier(ignore=["lm_head"], config_groups=groups)]
    )
    assert recipe == load_recipe("awq")


def test_mappings_take_positional_arguments_and_keep_their_order() -> None:
    mappings = [
        AWQMapping("re:.*input_layernorm", ["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"]),
        AWQMapping("re:.*v_proj$", balance_layers=["re:.*o_proj$"], activation_hook_target="attn"),
    ]
    smoothing = build_recipe([AWQModifier(mappings=mappings)]).smoothing
    assert smoothing is not None
    assert smoothing.mappings == (
        MappingPattern("re:.*input_layernorm", ("re:.*q_proj", "re:.*k_proj", "re:.*v_proj")),
        MappingPattern("re:.*v_proj$", ("re:.*o_proj$",)),
    )


@pytest.mark.parametrize("text", [FLAT, LISTED], ids=["flat", "list"])
def test_stages_flat_mappings_and_lists_mean_the_same(text: str) -> None:
    assert load_recipe(text) == load_recipe(STAGED)


def test_a_staged_recipe_keeps_every_setting() -> None:
    recipe = load_recipe(STAGED)
    assert recipe.smoothing == Smoothing((MappingPattern("re:.*norm1$", ("re:.*wq$", "re:.*wk$")),), "both", 12)
    assert (recipe.clip, recipe.rounding, recipe.ignore) == (False, Rounding("nearest"), ("head",))
    assert weights_of(recipe) == WeightScheme(4, False, 128)


def test_a_scheme_written_in_full_is_read_with_gptq_settings() -> None:
    recipe = load_recipe(WRITTEN_IN_FULL)
    assert recipe.smoothing is None
    assert recipe.rounding == Rounding("gptq", 0.02, True, 64)
    assert weights_of(recipe) == WeightScheme(3, False, 64)


def test_a_recipe_is_read_from_a_file_by_path_or_by_text_of_the_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(FLAT)
    assert load_recipe(path) == load_recipe(str(path)) == load_recipe(FLAT)


def test_a_recipe_passes_through_and_one_modifier_needs_no_list() -> None:
    recipe = load_recipe(QuantizationModifier(scheme="W4A16"))
    assert load_recipe(recipe) is recipe


def test_none_means_the_default_preset_which_rounds_with_gptq() -> None:
    recipe = load_recipe(None)
    assert recipe == load_recipe("default")
    assert recipe.smoothing == Smoothing(None, True, 20)
    assert recipe.rounding == Rounding("gptq", 0.001, True, 128)
    assert (recipe.clip, recipe.ignore, weights_of(recipe)) == (False, ("lm_head",), WeightScheme(4, False, 128))


def test_the_awq_preset_is_plain_awq() -> None:
    recipe = load_recipe("awq")
    assert recipe.smoothing == Smoothing(None, True, 20)
    assert (recipe.clip, recipe.rounding, weights_of(recipe)) == (
        False,
        Rounding("nearest"),
        WeightScheme(4, False, 128),
    )


def test_importing_recipes_imports_neither_torch_nor_pydantic() -> None:
    code = "import sys, awqdist.recipe; print(sorted({'torch', 'transformers', 'pydantic', 'yaml'} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.strip() == "[]"


def test_reading_modifiers_does_not_import_torch() -> None:
    code = "import sys; from awqdist.recipe import AWQModifier, load_recipe; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.strip() == "False"


def test_the_examples_in_docstrings_run() -> None:
    result = doctest.testmod(awqdist.recipe.modifiers)
    assert result.attempted > 0
    assert result.failed == 0


# What the modifiers mean together


def test_awq_alone_takes_its_shorthands_and_leaves_lm_head() -> None:
    recipe = build_recipe([AWQModifier(bits=3, symmetric=True, group_size=-1)])
    assert (weights_of(recipe), recipe.ignore) == (WeightScheme(3, True, -1), ("lm_head",))
    assert weights_of(build_recipe([AWQModifier(bits=3)])) == WeightScheme(3, False, 128)
    assert build_recipe([AWQModifier(bits=4, ignore=[])]).ignore == ()


def test_awq_shorthands_fill_a_quantization_modifier_without_a_scheme() -> None:
    recipe = build_recipe([AWQModifier(bits=4, group_size=64), GPTQModifier(targets="re:.*mlp", ignore=["a"])])  # type: ignore[arg-type]
    assert (weights_of(recipe), recipe.groups[0].targets) == (WeightScheme(4, False, 64), ("re:.*mlp",))
    assert (recipe.ignore, recipe.rounding.method) == (("a",), "gptq")


def test_an_older_awq_modifier_may_carry_the_scheme_itself() -> None:
    old = AWQModifier(targets=["Linear"], ignore=["lm_head"], scheme="W4A16_ASYM")
    new = [AWQModifier(), QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme="W4A16_ASYM")]
    assert build_recipe([old]) == build_recipe(new)


def test_quantization_modifier_alone_rounds_to_nearest_without_smoothing() -> None:
    recipe = build_recipe([QuantizationModifier(scheme="W8A16")])
    assert (recipe.smoothing, recipe.rounding.method) == (None, "nearest")


def test_gptq_alone_has_no_smoothing_and_llm_compressors_defaults() -> None:
    recipe = build_recipe([GPTQModifier(scheme="W4A16")])
    assert (recipe.smoothing, recipe.rounding) == (None, Rounding("gptq", 0.01, True, 128))


@pytest.mark.parametrize("order", ["static", "weight", ActivationOrdering.WEIGHT])
def test_static_and_weight_are_one_column_order(order: Any) -> None:
    assert build_recipe([GPTQModifier(scheme="W4A16", actorder=order)]).rounding.actorder is True


@pytest.mark.parametrize("order", [None, False])
def test_gptq_without_column_order_records_none(order: Any) -> None:
    recipe = build_recipe([GPTQModifier(scheme="W4A16", actorder=order)])
    assert recipe.rounding.actorder is False
    assert json.loads(recipe.groups[0].definition)["weights"].get("actorder") is None


def test_rounding_gptq_on_awq_modifier_selects_gptq_with_defaults() -> None:
    recipe = build_recipe([AWQModifier(rounding="gptq"), QuantizationModifier(scheme="W4A16")])
    assert recipe.rounding == Rounding("gptq")
    assert recipe.smoothing is not None


def test_the_order_of_modifiers_does_not_matter() -> None:
    modifiers = [AWQModifier(clip=True), GPTQModifier(scheme="W4A16")]
    assert build_recipe(modifiers) == build_recipe(modifiers[::-1])


def test_an_empty_list_of_mappings_means_no_smoothing() -> None:
    recipe = build_recipe([AWQModifier(mappings=[], clip=True)])
    assert (recipe.smoothing, recipe.clip) == (None, True)


def test_execution_settings_of_llm_compressor_change_nothing() -> None:
    settings: dict[str, Any] = {"offload_device": torch.device("cpu"), "sequential_targets": ["Block"], "start": 0.0}
    gptq: dict[str, Any] = {"offload_hessians": True, "batched_quantization": 4, "bypass_divisibility_checks": True}
    plain = [AWQModifier(), GPTQModifier(scheme="W4A16")]
    assert build_recipe([AWQModifier(**settings), GPTQModifier(scheme="W4A16", **gptq)]) == build_recipe(plain)


# Schemes


@pytest.mark.parametrize("preset", ["W4A16_ASYM", "W4A16", "W8A16", "W3A16"])
def test_the_definition_of_a_preset_is_what_compressed_tensors_writes(preset: str) -> None:
    group = build_recipe([QuantizationModifier(scheme=preset)]).groups[0]
    assert json.loads(group.definition) == preset_name_to_scheme(preset, ["Linear"]).model_dump(mode="json")


def test_shorthands_define_the_same_scheme_as_the_preset() -> None:
    assert (
        build_recipe([AWQModifier(bits=4, symmetric=True)]).groups
        == load_recipe(QuantizationModifier(scheme="W4A16")).groups
    )


def test_a_given_scheme_is_dumped_as_compressed_tensors_dumps_it_and_not_changed() -> None:
    args = QuantizationArgs(num_bits=5, symmetric=True, strategy="channel", observer="minmax")
    scheme = QuantizationScheme(targets=["re:.*mlp"], weights=args)
    before = scheme.model_dump(mode="json")
    recipe = build_recipe([QuantizationModifier(config_groups={"rows": scheme})])
    assert scheme.model_dump(mode="json") == before == json.loads(recipe.groups[0].definition)
    assert (recipe.groups[0].name, weights_of(recipe)) == ("rows", WeightScheme(5, True, -1))


def test_gptq_records_its_column_order_in_the_definition() -> None:
    definition = json.loads(build_recipe([GPTQModifier(scheme="W4A16")]).groups[0].definition)
    expected = preset_name_to_scheme("W4A16", ["Linear"])
    assert expected.weights is not None
    expected.weights.actorder = ActivationOrdering.STATIC
    assert definition == expected.model_dump(mode="json")


def test_an_observer_named_at_the_modifier_is_recorded() -> None:
    recipe = build_recipe([QuantizationModifier(scheme="W4A16", observer={"weights": "MinMax"})])
    assert json.loads(recipe.groups[0].definition)["weights"]["observer"] == "minmax"
    assert recipe == build_recipe([QuantizationModifier(scheme="W4A16", weight_observer="minmax")])


def test_a_dict_of_presets_gives_one_group_each() -> None:
    recipe = build_recipe([QuantizationModifier(scheme={"w4a16": "re:.*mlp", "W8A16": ["re:.*attn"]})])  # type: ignore[dict-item]
    assert [(g.name, g.targets, g.weights.num_bits) for g in recipe.groups] == [
        ("group_0", ("re:.*mlp",), 4),
        ("group_1", ("re:.*attn",), 8),
    ]


# Which module gets which scheme


def group(name: str, *targets: str) -> SchemeGroup:
    return SchemeGroup(name, targets, WeightScheme(4, True, 128), "{}")


def recipe_of(*groups: SchemeGroup, ignore: tuple[str, ...] = ()) -> Recipe:
    return Recipe(None, False, Rounding("nearest"), groups, ignore)


def test_the_exact_name_beats_the_regex_which_beats_the_class() -> None:
    recipe = recipe_of(group("class", "Linear"), group("regex", "re:.*up"), group("name", "a.up"))
    names = [getattr(recipe.scheme_for(n), "name", None) for n in ("a.up", "b.up", "b.down")]
    assert names == ["name", "regex", "class"]


def test_ignored_and_untargeted_modules_get_no_scheme() -> None:
    recipe = recipe_of(group("g", "Linear", "b.up"), ignore=("re:a[.]", "b.up", "Router"))
    for name, kind in (("a.up", "Linear"), ("b.up", "Linear"), ("c.up", "Embedding"), ("d.up", "Router")):
        assert recipe.scheme_for(name, kind) is None
    assert recipe.scheme_for("xa.up") is not None


def test_a_regex_is_anchored_at_its_start_only() -> None:
    recipe = recipe_of(group("g", "re:layers.0.up"))
    assert recipe.scheme_for("layers.0.up_proj") is not None
    assert recipe.scheme_for("model.layers.0.up") is None
    assert recipe_of(group("g", "re:layers.0.up$")).scheme_for("layers.0.up_proj") is None


@pytest.mark.parametrize("name", ["b.up", "b.up_2", "a.up", "c"])
def test_precedence_is_that_of_compressed_tensors(name: str) -> None:
    targets = ["re:.*up", "Linear", "re:.*[.]up", "a.up", "re:b"]
    recipe = recipe_of(*(group(target, target) for target in targets))
    found = recipe.scheme_for(name)
    assert found is not None
    assert found.name == match_targets(name, torch.nn.Linear(1, 1), targets)[0]


# Round trip


@pytest.mark.parametrize(
    "modifiers",
    [
        [AWQModifier()],
        [AWQModifier(bits=3, group_size=-1, clip=True, n_grid=7, duo_scaling=False)],
        [AWQModifier(mappings=[], clip=True)],
        [
            AWQModifier(mappings=[AWQMapping("re:.*n$", ["re:.*q$", "k"])], duo_scaling="both"),
            GPTQModifier(scheme="W4A16"),
        ],
        [GPTQModifier(scheme="W4A16", actorder=None, dampening_frac=1e-5, block_size=32)],
        [GPTQModifier(scheme="W4A16", actorder="weight")],
        [AWQModifier(rounding="gptq"), QuantizationModifier(scheme="W8A16", weight_observer="static_minmax")],
        [with_weights(actorder="weight", zp_dtype="torch.int8", symmetric=False)],
        [QuantizationModifier(scheme={"W4A16": "re:a", "W8A16": ["re:b", "c: 'd'"]}, ignore=["lm_head", "re:é"])],  # type: ignore[dict-item]
    ],
)
def test_a_recipe_reads_back_equal_from_its_yaml(modifiers: list[Any]) -> None:
    recipe = build_recipe(modifiers)
    text = recipe.to_yaml()
    assert load_recipe(text) == recipe
    assert load_recipe(text).to_yaml() == text


@pytest.mark.parametrize("text", [STAGED, WRITTEN_IN_FULL])
def test_a_recipe_of_llm_compressor_reads_back_equal_from_our_yaml(text: str) -> None:
    assert load_recipe(load_recipe(text).to_yaml()) == load_recipe(text)


def test_every_preset_reads_back_equal_from_its_yaml() -> None:
    assert preset_names() == ["awq", "default"]
    for name in preset_names():
        assert load_recipe(load_recipe(name).to_yaml()) == load_recipe(name)


# Refusals of keys and values


@pytest.mark.parametrize(
    ("kind", "key", "words"),
    [
        (AWQModifier, "bit", "AWQModifier has no key 'bit'; did you mean 'bits'?"),
        (AWQModifier, "q_group_size", "did you mean 'group_size'?"),
        (QuantizationModifier, "target", "QuantizationModifier has no key 'target'; did you mean 'targets'?"),
        (GPTQModifier, "damp_frac", "did you mean 'dampening_frac'?"),
        (AWQMapping, "balance_layer", "AWQMapping has no key 'balance_layer'; did you mean 'balance_layers'?"),
        (GPTQModifier, "xyzzy", "valid are actorder, "),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_valid_name(kind: Any, key: str, words: str) -> None:
    with pytest.raises(RecipeError) as error:
        kind(**{key: 1})
    assert words in str(error.value)


def test_unknown_keys_inside_mappings_and_schemes_are_refused_with_the_nearest_valid_name() -> None:
    with pytest.raises(RecipeError, match="did you mean 'smooth_layer'"):
        AWQModifier(mappings=[{"smoth_layer": "a", "balance_layers": ["b"]}])  # type: ignore[list-item]
    with pytest.raises(RecipeError, match=r"config_groups\.mine\.weights has no key 'bits'; did you mean 'num_bits'"):
        build_recipe([with_weights(bits=4)])
    with pytest.raises(RecipeError, match="no key 'weight'; did you mean 'weights'"):
        build_recipe([QuantizationModifier(config_groups={"g": {"targets": ["Linear"], "weight": {}}})])


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (AWQModifier, {"bits": 9}, "AWQModifier: bits: expected a value less than or equal to 8; found 9"),
        (AWQModifier, {"group_size": 0}, "expected a positive number of input channels, or -1"),
        (AWQModifier, {"duo_scaling": "Both"}, "duo_scaling: expected true, false or \"both\"; found 'Both'"),
        (AWQModifier, {"rounding": "floor"}, "rounding: expected 'nearest' or 'gptq'; found 'floor'"),
        (AWQModifier, {"n_grid": 0}, "n_grid: expected a value greater than or equal to 1"),
        (AWQModifier, {"mappings": ["a"]}, "AWQMapping: expected a mapping of its keys, found 'a'"),
        (AWQMapping, {"smooth_layer": "a"}, "AWQMapping needs the key 'balance_layers'"),
        (AWQMapping, {"smooth_layer": "a", "balance_layers": []}, "should have at least 1 item"),
        (GPTQModifier, {"dampening_frac": -1}, "dampening_frac: expected a value greater than or equal to 0"),
        (GPTQModifier, {"actorder": "group"}, "actorder 'group' cannot be honoured"),
        (GPTQModifier, {"actorder": True}, "actorder True cannot be honoured"),
        (QuantizationModifier, {"scheme": {"weights": {}}}, "expected the name of a preset"),
        (QuantizationModifier, {"config_groups": 3}, "config_groups: expected a valid dictionary; found 3"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_what_was_expected(
    kind: Any, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError) as error:
        kind(**fields)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mapping_with_an_argument_too_many_is_refused() -> None:
    with pytest.raises(RecipeError, match="each once"):
        AWQMapping("a", ["b"], None, None)
    with pytest.raises(RecipeError, match="each once"):
        AWQMapping("a", smooth_layer="b")


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"num_bits": 9}, "num_bits 9 cannot be honoured; use 2 to 8"),
        ({"num_bits": 1}, "num_bits 1 cannot be honoured"),
        ({"num_bits": 8, "type": "float"}, "type 'float' cannot be honoured"),
        ({"dynamic": True}, "dynamic True cannot be honoured"),
        ({"observer": "mse"}, "observer 'mse' cannot be honoured; use minmax or"),
        ({"observer_kwargs": {"grid": 5}}, "observer_kwargs {'grid': 5} cannot be honoured"),
        ({"scale_dtype": "torch.uint8"}, "scale_dtype torch.uint8 cannot be honoured"),
        ({"zp_dtype": "torch.int32"}, "zp_dtype torch.int32 cannot be honoured"),
        ({"strategy": "tensor", "group_size": None}, "strategy 'tensor' cannot be honoured"),
        ({"strategy": "block", "group_size": None, "block_structure": [8, 8]}, "strategy 'block' cannot be honoured"),
        ({"actorder": "group"}, "actorder"),
        ({"strategy": "rows"}, "'rows' is not a valid QuantizationStrategy"),
        ({"group_size": "many"}, "a value has the wrong type"),
    ],
)
def test_weights_that_cannot_be_honoured_are_refused(weights: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as error:
        build_recipe([with_weights(**weights)])
    assert words in str(error.value)
    assert "mine" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scheme": "W4A61"}, "no scheme is called 'W4A61'; did you mean 'W4A16'?"),
        ({"scheme": "FP8"}, "input_activations cannot be honoured"),
        ({"scheme": "NVFP4A16"}, "type 'float' cannot be honoured"),
        ({"scheme": "UNQUANTIZED"}, "quantizes nothing"),
        ({"scheme": "W4A16", "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme cannot be honoured"),
        ({"scheme": "W4A16", "weight_observer": "mse"}, "observer 'mse' cannot be honoured"),
        ({"scheme": "W4A16", "input_observer": "minmax"}, "an observer for 'input' cannot be honoured"),
        ({"scheme": "W4A16", "observer": {"output": "minmax"}}, "an observer for 'output' cannot be honoured"),
        (
            {"scheme": "W4A16", "observer": {"weights": "minmax"}, "weight_observer": "minmax"},
            "both observer and an observer key",
        ),
        ({"scheme": "W4A16", "config_groups": {}}, "both scheme and config_groups"),
        ({"scheme": {"W4A16": "Linear", "W8A16": ["Linear"]}}, "target 'Linear' is in group_0 and in group_1"),
        ({"scheme": "W4A16", "targets": "re:("}, "'re:(' is not a valid regular expression"),
        ({"scheme": "W4A16", "targets": []}, "has no targets"),
        ({"scheme": "W4A16", "ignore": ["re:*a"]}, "ignore: 're:*a' is not a valid regular expression"),
        ({"scheme": "W4A16", "ignore": [""]}, "the pattern '' is empty"),
        ({"config_groups": {"g": 3}}, "expected a QuantizationScheme or a dict"),
        ({"config_groups": {"g": {"targets": "Linear"}}}, "targets: expected a valid list"),
        (
            {"targets": ["a"], "config_groups": {"g": {"targets": ["b"], "weights": {"num_bits": 4, "group_size": 8}}}},
            "targets ['a'] contradicts the targets in config_groups ['b']",
        ),
        (
            {"config_groups": {"g": {"targets": ["b"], "weights": {"group_size": 8}, "format": "int-quantized"}}},
            "format 'int-quantized' is not written",
        ),
    ],
)
def test_a_quantization_modifier_that_cannot_be_honoured_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as error:
        build_recipe([QuantizationModifier(**fields)])
    assert words in str(error.value)


def test_a_mapping_with_an_invalid_regex_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"mappings: 're:\.\*q_proj\('"):
        build_recipe([AWQModifier(mappings=[AWQMapping("re:.*norm", ["re:.*q_proj("])])])


# Contradictions


@pytest.mark.parametrize(
    ("shorthand", "words"),
    [
        ({"bits": 3}, "bits 3 contradicts 4 in the scheme of group_0"),
        ({"symmetric": True}, "symmetric True contradicts False"),
        ({"group_size": 64}, "group_size 64 contradicts 128"),
    ],
)
def test_a_shorthand_that_contradicts_the_scheme_is_refused(shorthand: dict[str, Any], words: str) -> None:
    for modifiers in (
        [AWQModifier(**shorthand), QuantizationModifier(scheme="W4A16_ASYM")],
        [AWQModifier(scheme="W4A16_ASYM", **shorthand)],
    ):
        with pytest.raises(RecipeError) as error:
            build_recipe(modifiers)
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("modifiers", "words"),
    [
        (
            [AWQModifier(rounding="nearest"), GPTQModifier(scheme="W4A16")],
            "rounding 'nearest' contradicts GPTQModifier",
        ),
        (
            [QuantizationModifier(scheme="W4A16"), GPTQModifier(scheme="W4A16")],
            "QuantizationModifier and GPTQModifier, which would quantize the same weights twice",
        ),
        ([AWQModifier(), AWQModifier(bits=4)], "has 2 AWQModifiers"),
        ([AWQModifier(scheme="W4A16"), GPTQModifier(scheme="W4A16")], "both say what to quantize"),
        ([AWQModifier(ignore=["a"]), QuantizationModifier(scheme="W4A16")], "both say what to quantize"),
        (
            [GPTQModifier(actorder=None, config_groups=with_weights(actorder="static").config_groups)],
            "actorder null contradicts actorder 'static'",
        ),
        ([], "nothing to quantize"),
        ([QuantizationModifier(ignore=["lm_head"])], "leaves nothing to quantize"),
        ([AWQModifier(), GPTQModifier()], "leaves nothing to quantize"),
        ([AWQModifier(), {"scheme": "W4A16"}], "found an object of builtins.dict"),
    ],
)
def test_a_contradiction_is_refused(modifiers: list[Any], words: str) -> None:
    with pytest.raises(RecipeError) as error:
        build_recipe(modifiers)
    assert words in str(error.value)


# Refusals of text and files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("AWQModifier:\n  bits: [4\n", "line 3, column 1: not valid YAML"),
        ("AWQModifier:\n\tbits: 4\n", "line 2, column 1: not valid YAML"),
        ("AWQModifier:\n  bits: 4\n  bits: 3\n", "line 3, column 3: not valid YAML: the key 'bits' appears twice"),
        ("AWQModifier:\n  offload_device: !!python/object/apply:os.getcwd []\n", "line 2, column 19"),
        ("AWQModifier: \x00\n", "not valid YAML"),
        ("just\nwords\n", "expected modifiers"),
        ("\n", "nothing to quantize"),
        ("AWQModifier:\n- 3\n", "AWQModifier: expected a mapping of its keys, found [3]"),
        ("AWQModifier:\n  3: 4\n", "AWQModifier has no key 3"),
        ("args: {a: 1}\nAWQModifier:\n", "args are not filled in"),
        ("x_stage: &x\n  y_modifiers: *x\n", "contains itself"),
        (
            "AWQModifer: {}\n",
            "'AWQModifer' is not a known modifier; known are AWQModifier, QuantizationModifier, GPTQModifier",
        ),
    ],
)
def test_text_that_is_no_recipe_is_refused_with_its_place(text: str, words: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(text)
    assert str(error.value).startswith("recipe text")
    assert words in str(error.value)


def test_an_unknown_modifier_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "smooth.yaml"
    path.write_text("quant_stage: {quant_modifiers: {SmoothQuantModifier: {smoothing_strength: 0.5}}}")
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(error.value) == (
        f"recipe {path}: 'SmoothQuantModifier' is not a known modifier; "
        "known are AWQModifier, QuantizationModifier, GPTQModifier"
    )


def test_a_marker_for_no_device_left_by_llm_compressor_is_read() -> None:
    marker = "!!python/object/apply:llmcompressor.sentinel.Sentinel [not_provided,\n      /x/sentinel.py]"
    assert load_recipe(f"AWQModifier:\n  offload_device: {marker}\n  bits: 4\n") == build_recipe([AWQModifier(bits=4)])


def test_an_unknown_preset_is_refused_with_the_valid_ones_and_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"presets are awq, default; did you mean 'default'\?"):
        load_recipe("defualt")


@pytest.mark.parametrize("source", ["", "no/such/recipe.yaml", Path("no/such.yaml"), 3, ["awq"]])
def test_a_source_that_is_no_recipe_is_refused(source: Any) -> None:
    with pytest.raises(RecipeError):
        load_recipe(source)


def test_a_folder_and_a_file_that_is_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not a file"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "binary.yaml")


# Patterns against a model's names

NAMES = [
    f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
]


def test_patterns_that_match_pass() -> None:
    check_patterns_match(["re:.*q_proj", "re:.*up_proj$", "model.layers.2.mlp.up_proj"], iter(NAMES), "mappings")


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("re:.*q_prj$", "mappings: 're:.*q_prj$' matches no module; the nearest is 'model.layers.0.self_attn.q_proj'"),
        ("re:.*mlp.up$", "the nearest is 'model.layers.0.mlp.up_proj'"),
        ("input_layernorm", "the nearest is 'model.layers.0.input_layernorm'"),
        (".*up_proj", "a regular expression is written 're:.*up_proj'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(pattern: str, words: str) -> None:
    with pytest.raises(RecipeError) as error:
        check_patterns_match(["re:.*q_proj", pattern], NAMES, "mappings")
    assert words in str(error.value)


def test_a_pattern_without_any_names_is_refused() -> None:
    with pytest.raises(RecipeError, match="there are no names here at all"):
        check_patterns_match(["lm_head"], [], "ignore")
