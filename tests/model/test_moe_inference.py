"""Mixtures of experts that are not in the registry: mapped from their structure, and the recipe that keeps the mappings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import awqdist
from support.family_oracles import distance, load, logits, open_job, recipe, routing, smoothed_checkpoint, token_ids
from support.odd_models import ClampedForCausalLM, MixedForCausalLM, RoutedForCausalLM, odd_checkpoint
from support.tiny_models import tiny_checkpoint
from torch import Tensor
from transformers import Dots1ForCausalLM, PretrainedConfig

from awqdist import oneshot
from awqdist.checkpoint.sources import read_source
from awqdist.errors import ModelError
from awqdist.layer.plan import LayerPlan
from awqdist.model.families import registered_mappings
from awqdist.model.mapping import ResolvedMapping, infer_mappings
from awqdist.model.skeleton import build_skeleton, read_config
from awqdist.model.structure import trace_layers
from awqdist.recipe import load_recipe

PROBE = token_ids(2, seed=1)
DOTS: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "n_group": 4,
    "topk_group": 2,
}


def kinds(task: LayerPlan) -> dict[str, set[str]]:
    """The mappings of a layer without the numbers of experts."""
    found: dict[str, set[str]] = {}
    for mapping in task.mappings:
        names = {".".join(part for part in path.split(".") if not part.isdigit()) for path in mapping.balance}
        found.setdefault(".".join(part for part in mapping.smooth.split(".") if not part.isdigit()), set()).update(
            names
        )
    return found


def test_an_unknown_mixture_of_experts_is_mapped_and_keeps_function_and_routing(tmp_path: Path) -> None:
    assert registered_mappings("Dots1ForCausalLM", PretrainedConfig()) is None
    source = odd_checkpoint(Dots1ForCausalLM, tmp_path / "source", **DOTS)
    job = open_job(source, recipe())

    block = {"mlp.gate", *(f"mlp.{e}.{p}_proj" for e in ("experts", "shared_experts") for p in ("gate", "up"))}
    attention = {"input_layernorm": {f"self_attn.{p}_proj" for p in "qkv"}, "self_attn.v_proj": {"self_attn.o_proj"}}
    dense = {"post_attention_layernorm": {"mlp.gate_proj", "mlp.up_proj"}, "mlp.up_proj": {"mlp.down_proj"}}
    experts = {f"mlp.{e}.up_proj": {f"mlp.{e}.down_proj"} for e in ("experts", "shared_experts")}
    assert kinds(job.plan.layers[0]) == attention | dense
    assert kinds(job.plan.layers[1]) == attention | {"post_attention_layernorm": block} | experts
    generator = torch.Generator().manual_seed(5)

    def between_a_half_and_two(task: LayerPlan, mapping: ResolvedMapping, weights: dict[str, Tensor]) -> Tensor:
        channels = mapping.source_channels(task.by_path[mapping.balance[0]].shape[1])
        return torch.exp2(2 * torch.rand(int(channels.max()) + 1, generator=generator) - 1)[channels]

    smoothed = smoothed_checkpoint(job, tmp_path / "smoothed", between_a_half_and_two)
    before, after = load(source), load(smoothed)
    assert all(map(torch.equal, routing(before, PROBE), routing(after, PROBE)))
    assert distance(logits(after, PROBE), logits(before, PROBE)) < 1e-4

    summary = oneshot(
        model=str(source),
        dataset=token_ids(6).tolist(),
        recipe=recipe(),
        output_dir=tmp_path / "output",
        num_calibration_samples=6,
        max_seq_length=32,
        device="cpu",
    )
    assert any("awqdist mappings MODEL --as-recipe" in warning for warning in summary.warnings)


@pytest.mark.parametrize(("family", "decides"), [("mixtral", "mlp.gate"), ("qwen2-moe", "mlp.shared_expert_gate")])
def test_a_norm_is_no_smooth_layer_where_a_router_or_gate_goes_uncompensated(
    family: str, decides: str, tmp_path: Path
) -> None:
    source = tiny_checkpoint(family, tmp_path)
    skeleton = build_skeleton(read_config(source), read_source(source).entries)
    structure = trace_layers(skeleton)[0]
    sites = tuple(tuple(path for path in site if path != decides) for site in structure.sites)
    norms = {next(p for p in structure.site_of(first) if p != decides): n for first, n in structure.site_norms.items()}

    whole = {mapping.smooth for mapping in infer_mappings(skeleton, structure, 0)}
    without = infer_mappings(skeleton, replace(structure, sites=sites, site_norms=norms), 0)

    assert {mapping.smooth for mapping in without} == whole - {"post_attention_layernorm"}


@pytest.mark.parametrize("family", ["mistral3", "deepseek-v3", "minimax-m2"])
def test_a_plan_printed_as_a_recipe_is_read_back_to_the_same_plan(family: str, tmp_path: Path) -> None:
    check_round_trip(tiny_checkpoint(family, tmp_path / "source"), tmp_path / "recipe.yaml")


@pytest.mark.parametrize(("kind", "sizes"), [(ClampedForCausalLM, {}), (Dots1ForCausalLM, DOTS)])
def test_inferred_mappings_printed_as_a_recipe_are_read_back_to_the_same_plan(
    kind: type[Any], sizes: dict[str, Any], tmp_path: Path
) -> None:
    check_round_trip(odd_checkpoint(kind, tmp_path / "source", **sizes), tmp_path / "recipe.yaml")


def check_round_trip(source: Path, file: Path) -> None:
    given = file.with_name("given.yaml")
    given.write_text(recipe().to_yaml())
    printed = awqdist("mappings", source, "--recipe", given, "--as-recipe")
    assert printed.code == 0, printed.stderr
    file.write_text(printed.stdout)

    before, after = open_job(source, recipe()).plan, open_job(source, load_recipe(file)).plan
    assert not after.inferred
    assert [replace(task, skipped=()) for task in after.tasks] == [replace(task, skipped=()) for task in before.tasks]
    again = awqdist("mappings", source, "--recipe", file, "--as-recipe")
    assert again.stdout == printed.stdout


def test_a_mapping_that_only_some_layers_have_is_printed_for_those(tmp_path: Path) -> None:
    """Of two layers with the same names the second clamps what `w3` gives."""
    source = odd_checkpoint(MixedForCausalLM, tmp_path / "source")

    check_round_trip(source, tmp_path / "recipe.yaml")

    smoothing = load_recipe(tmp_path / "recipe.yaml").smoothing
    assert smoothing is not None
    assert smoothing.mappings is not None
    last = smoothing.mappings[-1]
    assert (last.smooth_layer, last.balance_layers) == (
        r"re:model\.layers\.(0)\.ffn\.w3$",
        (r"re:model\.layers\.(0)\.ffn\.w2$",),
    )


def test_experts_that_are_modules_of_their_own_are_refused_in_one_line(tmp_path: Path) -> None:
    source = odd_checkpoint(RoutedForCausalLM, tmp_path / "source")

    with pytest.raises(ModelError, match=r"^RoutedForCausalLM: layer 0 chooses by its data what it computes"):
        open_job(source, recipe())
