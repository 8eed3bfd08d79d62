"""One whole layer, from statistics to packed tensors: order, bits on disk, and the errors in the record."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file
from support.quant_oracles import Array, activations, fake_quantized, output_error, statistics_of
from support.tiny_models import tiny_checkpoint
from torch import Tensor

from awqdist.errors import NumericalError
from awqdist.export.formats import output_format
from awqdist.layer.plan import LayerPlan
from awqdist.layer.quantize import LayerResult, Method, quantize_layer
from awqdist.quant.grid import scheme_args
from awqdist.quant.search import BalanceWeight, Problem, SearchGroup, choose_scales
from awqdist.recipe import Recipe, WeightScheme, load_recipe
from awqdist.run.job import prepare
from awqdist.settings import RunSettings

GROUPED = WeightScheme(4, False, 32)
RECIPE = """
default_stage:
  default_modifiers:
    AWQModifier: {{n_grid: 20{clip}}}
    {modifier}:
      ignore: [{ignore}]
      config_groups:
        group_0:
          targets: [Linear]
          weights: {{num_bits: 4, type: int, symmetric: false, strategy: group, group_size: 32}}
"""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def recipe(rounding: str = "nearest", clip: bool = False, ignore: str = "lm_head") -> Recipe:
    modifier = "GPTQModifier" if rounding == "gptq" else "QuantizationModifier"
    return load_recipe(RECIPE.format(modifier=modifier, clip=", clip: true" if clip else "", ignore=ignore))


@dataclass(frozen=True)
class Layer:
    """One layer of a tiny Llama with grouped queries, and activations that its linears are said to read."""

    task: LayerPlan
    parameters: dict[str, Tensor]
    inputs: dict[str, Tensor]  # by the path of the site
    recipe: Recipe

    def quantize(self, layout: str = "compressed-tensors", **changes: Any) -> LayerResult:
        task = replace(self.task, **changes)
        statistics = {s: statistics_of(self.inputs[s.path].split(60)) for s in self.task.sites}
        method = Method(self.recipe, output_format(layout))
        return quantize_layer(task, dict(self.parameters), statistics, method, None, lambda stage: nullcontext())

    def scales_of(self, first: str, layout: str = "compressed-tensors") -> Tensor:
        """What the search chooses for the site of linear `first`; the search has tests of its own."""
        assert self.recipe.smoothing is not None
        mapping = next(m for m in self.task.mappings if m.balance[0] == first)
        balance = [BalanceWeight(self.parameters[f"{p}.weight"].float(), GROUPED) for p in mapping.balance]
        num_inputs = self.inputs[first].shape[1]
        source, num_sources = mapping.source_channels(num_inputs), mapping.num_channels(num_inputs)
        grid_dtype = output_format(layout).grid_dtype(self.parameters[f"{first}.weight"].dtype)
        group = SearchGroup(balance, statistics_of(self.inputs[first].split(60)), self.recipe.rounding)
        problem = Problem([group], group.moments.mean_abs, source, num_sources, grid_dtype)
        return choose_scales([problem], self.recipe.smoothing)[0].scales


@pytest.fixture(scope="module")
def layer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Layer]:
    folders: dict[torch.dtype, Path] = {}

    def make(dtype: torch.dtype = torch.bfloat16, plan: Recipe | None = None) -> Layer:
        if dtype not in folders:
            folders[dtype] = tiny_checkpoint("llama", tmp_path_factory.mktemp("tiny") / "model", dtype)
        plan = plan or recipe()
        job = prepare(plan, RunSettings(folders[dtype], folders[dtype].with_name("output"), device="cpu"))
        task = job.plan.layers[0]
        tensors = load_file(folders[dtype] / "model.safetensors")
        parameters = {name: tensors[disk] for name, disk in task.tensors.items()}
        inputs = {site.path: activations(240, site.num_inputs, seed).to(dtype) for seed, site in enumerate(task.sites)}
        return Layer(task, parameters, inputs, plan)

    return make


Q, K, V, O = (f"self_attn.{name}_proj" for name in "qkvo")  # noqa: E741
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
INPUT_NORM, POST_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"


def smoothed_weights(layer: Layer, result: LayerResult, layout: str = "compressed-tensors") -> dict[str, Array]:
    """The weights before rounding, float32: columns times the scales of their input, rows divided by those of their output."""
    weights = {path: layer.parameters[f"{path}.weight"].float().numpy() for path in layer.task.by_path}
    for norm, readers in ((INPUT_NORM, (Q, K, V)), (POST_NORM, (GATE, UP))):
        applied = (layer.parameters[norm].float() / result.parameters[norm].float()).numpy()
        for path in readers:
            weights[path] = weights[path] * applied
    for smooth, reader in ((V, O), (UP, DOWN)):
        scales = layer.scales_of(reader, layout).numpy()
        outputs = scales.reshape(2, 2, 16)[:, 0].reshape(-1) if smooth == V else scales  # 2 query heads to a kv head
        weights[smooth] = weights[smooth] / outputs[:, None]
        weights[reader] = weights[reader] * scales
    return weights


def test_every_linear_is_smoothed_and_quantized(layer_of: Callable[..., Layer]) -> None:
    layer = layer_of()
    result = layer.quantize()
    assert set(result.weights) == {Q, K, V, O, GATE, UP, DOWN}
    assert {m.balance for m in layer.task.mappings} == {(Q, K, V), (O,), (GATE, UP), (DOWN,)}
    assert all(m.ratio is not None for m in result.mappings), "activations with outliers: every mapping must pay"
    assert set(result.parameters) == {INPUT_NORM, POST_NORM}
    assert all(tensor.dtype == torch.bfloat16 for tensor in result.parameters.values())


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("clip", [False, True])
def test_the_order_of_input_sites_does_not_matter(layer_of: Callable[..., Layer], rounding: str, clip: bool) -> None:
    layer = layer_of(plan=recipe(rounding, clip))
    one, other = layer.quantize(), layer.quantize(sites=layer.task.sites[::-1])
    assert one.weights.keys() == other.weights.keys()
    for path, weight in one.weights.items():
        for kind in ("codes", "weight_scale", "zero_point"):
            assert torch.equal(getattr(weight, kind), getattr(other.weights[path], kind))
    for name, tensor in one.parameters.items():
        assert torch.equal(tensor, other.parameters[name])
    assert {r.name: r for r in one.linears} == {r.name: r for r in other.linears}
    assert one.mappings == other.mappings


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_the_same_layer_gives_the_same_bytes(layer_of: Callable[..., Layer], rounding: str) -> None:
    layer = layer_of(plan=recipe(rounding, True))
    one, other = layer.quantize(), layer.quantize()
    for path, weight in one.weights.items():
        assert torch.equal(weight.codes, other.weights[path].codes)
        assert torch.equal(weight.weight_scale, other.weights[path].weight_scale)


def test_parameters_are_left_alone(layer_of: Callable[..., Layer]) -> None:
    layer = layer_of(plan=recipe("gptq", True))
    before = {name: tensor.clone() for name, tensor in layer.parameters.items()}
    layer.quantize()
    assert all(torch.equal(layer.parameters[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_tensors_are_those_of_compressed_tensors_for_the_smoothed_weights(
    layer_of: Callable[..., Layer], dtype: torch.dtype
) -> None:
    """Rounding to nearest: what its own observer, quantize and packing make of the smoothed weights in the checkpoint's dtype."""
    layer = layer_of(dtype)
    result = layer.quantize()
    args = scheme_args(GROUPED)
    described = QuantizationScheme(targets=["Linear"], weights=args)
    for path, array in smoothed_weights(layer, result).items():
        weight = torch.from_numpy(array).to(dtype)
        groups = weight.unflatten(1, (-1, 32))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        expected = PackedQuantizationCompressor.compress(state, described)
        packed = output_format("compressed-tensors").pack(result.weights[path])
        assert packed.keys() == expected.keys()
        for kind, tensor in expected.items():
            assert torch.equal(packed[kind], tensor), f"{path}.{kind}"


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_autoawq_stores_the_grid_that_the_codes_were_fixed_on(
    layer_of: Callable[..., Layer], dtype: torch.dtype, rounding: str
) -> None:
    layer = layer_of(dtype, recipe(rounding))
    result = layer.quantize("autoawq")
    layout = output_format("autoawq")
    for path, weight in result.weights.items():
        assert weight.weight_scale.dtype == torch.float16
        assert torch.equal(layout.unpack(layout.pack(weight), GROUPED).dequantize(), weight.dequantize()), path
    if rounding == "nearest":
        for path, array in smoothed_weights(layer, result, "autoawq").items():
            error = np.abs(result.weights[path].dequantize().numpy() - array)
            step = result.weights[path].weight_scale.float().repeat_interleave(32, 1).numpy()
            inside = (result.weights[path].codes > 0) & (result.weights[path].codes < 15)
            assert (error <= 0.52 * step)[inside.numpy()].all(), path


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_of_mappings_are_those_of_running_the_tokens_through(
    layer_of: Callable[..., Layer], dtype: torch.dtype
) -> None:
    layer = layer_of(dtype)
    result = layer.quantize()
    for mapping, record in zip(layer.task.mappings, result.mappings, strict=True):
        x = layer.inputs[mapping.balance[0]].float().numpy()
        for scales, found in (
            (np.ones(x.shape[1], np.float32), record.error_before),
            (layer.scales_of(mapping.balance[0]).numpy(), record.error_after),
        ):
            expected = 0.0
            for path in mapping.balance:
                weight = layer.parameters[f"{path}.weight"].float().numpy()
                expected += output_error(x, fake_quantized(weight * scales, GROUPED, dtype) / scales - weight)
            assert found == pytest.approx(expected, rel=2e-4)
        assert record.error_after < record.error_before


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_of_linears_are_those_of_running_the_tokens_through(
    layer_of: Callable[..., Layer], dtype: torch.dtype, clip: bool, rounding: str
) -> None:
    """What was written, against the smoothed weight, on the divided input."""
    layer = layer_of(dtype, recipe(rounding, clip))
    result = layer.quantize()
    smoothed = smoothed_weights(layer, result)
    records = {record.name: record for record in result.linears}
    for site in layer.task.sites:
        for path in (linear.path for linear in site.linears):
            original = layer.parameters[f"{path}.weight"].float().numpy()
            columns = (smoothed[path] / original)[0]  # the scales of the input, but for one factor of the row
            x = layer.inputs[site.path].float().numpy() / columns
            signal = output_error(x, smoothed[path])
            record = records[layer.task.disk_module(path)]
            written = result.weights[path].dequantize().numpy() - smoothed[path]
            assert record.relative_error == pytest.approx(output_error(x, written) / signal, rel=2e-3)
            assert (record.clipped_share > 0) == clip
            assert record.shape == original.shape
            if path not in (V, UP):  # whose rows smoothing weighs differently
                nearest = fake_quantized(original, GROUPED, dtype) - original
                tokens = layer.inputs[site.path].float().numpy()
                expected = output_error(tokens, nearest) / output_error(tokens, original)
                assert record.relative_error_nearest == pytest.approx(expected, rel=2e-3)


def test_each_step_of_the_recipe_lowers_the_error(layer_of: Callable[..., Layer]) -> None:
    def total(*choice: Any) -> float:
        return sum(record.relative_error for record in layer_of(plan=recipe(*choice)).quantize().linears)

    nearest, clipped, compensated = total("nearest"), total("nearest", True), total("gptq")
    assert compensated < clipped < nearest


def test_a_linear_that_the_recipe_ignores_is_compensated_and_stays_a_float(layer_of: Callable[..., Layer]) -> None:
    layer = layer_of(plan=recipe(ignore='lm_head, "re:.*k_proj"'))
    result = layer.quantize()
    assert set(result.weights) == {Q, V, O, GATE, UP, DOWN}
    applied = layer.parameters[INPUT_NORM].float() / result.parameters[INPUT_NORM].float()
    expected = (layer.parameters[f"{K}.weight"].float() * applied).bfloat16()
    assert torch.equal(result.parameters[f"{K}.weight"], expected)
    assert len(result.linears) == 6


def test_a_recipe_without_smoothing_keeps_norms_and_rounds_the_original_weights(layer_of: Callable[..., Layer]) -> None:
    text = "QuantizationModifier:\n  ignore: [lm_head]\n  config_groups: {group_0: {targets: [Linear], weights: {num_bits: 4, type: int,"
    layer = layer_of(torch.float32, load_recipe(text + " symmetric: false, strategy: group, group_size: 32}}}\n"))
    result = layer.quantize()
    assert result.mappings == ()
    for norm in (INPUT_NORM, POST_NORM):
        assert torch.equal(result.parameters[norm], layer.parameters[norm])
    for record in result.linears:
        assert record.relative_error == pytest.approx(record.relative_error_nearest, rel=1e-3)


def test_inputs_that_are_never_active_are_counted(layer_of: Callable[..., Layer]) -> None:
    layer = layer_of(plan=recipe("gptq"))
    layer.inputs[DOWN][:, [3, 5]] = 0
    dead = {record.name: record.num_dead_inputs for record in layer.quantize().linears}
    assert dead == {layer.task.disk_module(path): 2 if path == DOWN else 0 for path in layer.task.by_path}


def test_weights_that_give_no_finite_error_are_an_error_that_names_the_mapping(layer_of: Callable[..., Layer]) -> None:
    layer = layer_of(torch.float32)
    layer.parameters[f"{GATE}.weight"][0, 0] = float("inf")
    with pytest.raises(
        NumericalError, match=r"layer 0, mapping post_attention_layernorm -> mlp.gate_proj, mlp.up_proj"
    ):
        layer.quantize()


def test_a_layer_is_quantized_without_the_run() -> None:
    code = "import awqdist.layer.quantize, sys; print(*(m for m in sys.modules if m.startswith('awqdist.')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "awqdist.layer.quantize" in loaded
    assert not [name for name in loaded if name.startswith(("awqdist.run", "awqdist.backends", "awqdist.plan"))]
