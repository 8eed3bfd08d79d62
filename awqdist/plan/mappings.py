"""`awqdist mappings`, and what `awqdist plan` shows of them too: what smooths what, what is skipped, what is left as it is."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from awqdist.checkpoint.sources import resolve_config
from awqdist.layer.plan import LayerPlan
from awqdist.plan.config import prepare_to_plan
from awqdist.recipe import MappingPattern, Recipe, load_recipe
from awqdist.run.device import choose_device
from awqdist.run.job import Job
from awqdist.run.layer_plans import Plan
from awqdist.settings import RunSettings
from awqdist.units import pattern_of, show_layers

_NUMBER = r"\d+"
_Key = tuple[str, tuple[str, ...]]  # patterns of the smooth layer and of the balance layers within a layer


def show_mappings(model: str, recipe: str, *, as_json: bool, as_recipe: bool) -> None:
    """Shows the resolved mappings of every layer; with `as_recipe` as a recipe that gives the same ones whatever the registry holds."""
    built, settings = load_recipe(recipe), RunSettings(resolve_config(model), Path("."))
    job = prepare_to_plan(built, settings, choose_device(settings.device))
    if as_recipe:
        print(_with_mappings(built, job.plan).to_yaml(), end="")
    elif as_json:
        print(json.dumps(plan_json(job.plan), indent=2))
    else:
        console = Console()
        console.print(mapping_table(job.plan))
        print_left_out(console, job)


def _with_mappings(recipe: Recipe, plan: Plan) -> Recipe:
    if recipe.smoothing is None or recipe.smoothing.mappings is not None:
        return recipe
    return replace(recipe, smoothing=replace(recipe.smoothing, mappings=_mapping_patterns(plan)))


def mapping_table(plan: Plan) -> Table:
    """A row for every mapping, and for every one that is skipped with its reason."""
    table = Table("layers", "smooth layer", "balance layers", "note", title="Mappings", title_justify="left")
    rows: dict[tuple[str, str, str], list[int]] = {}
    for task in plan.layers:
        for mapping in task.mappings:
            repeats = mapping.source[1] if mapping.source else 1
            shared = "channel of {} heads" if mapping.norm else "key/value channel, {} query heads each"
            tied = f"one scale per {shared.format(repeats)}" if repeats > 1 else ""
            note = "(1 + w) norm" if mapping.unit_offset else tied
            balance = ", ".join(dict.fromkeys(map(pattern_of, mapping.balance)))  # experts are named once
            layers = rows.setdefault((pattern_of(mapping.smooth), balance, note), [])
            layers += [task.index] if task.index not in layers[-1:] else []
        for skipped in task.skipped:
            rows.setdefault((skipped.mapping, "", f"skipped: {skipped.reason}"), []).append(task.index)
    for (smooth, balance, note), layers in rows.items():
        table.add_row(show_layers(layers), smooth, balance, note)
    return table


def print_left_out(console: Console, job: Job) -> None:
    """What stays in full precision, and whether the mappings were inferred."""
    if job.plan.inferred:
        console.print(f"{job.plan.architecture} is not in the registry: inferred from its structure and verified.")
    for name in job.plan.ignored[:10]:
        console.print(
            f"left in full precision: {name} (not targeted, ignored by the recipe, or a router/gate)", soft_wrap=True
        )
    if len(job.plan.ignored) > 10:
        console.print(f"… and {len(job.plan.ignored) - 10} more; --json lists all")


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as `--json` prints it."""

    def layer(task: LayerPlan) -> dict[str, Any]:
        return {
            "layer": task.index,
            "quantized": [linear.disk_name for linear in task.quantized],
            "mappings": [
                {
                    "smooth_layer": task.disk_module(m.smooth),
                    "balance_layers": [task.disk_module(path) for path in m.balance],
                }
                for m in task.mappings
            ],
            "skipped": [asdict(skipped) for skipped in task.skipped],
        }

    return {
        "architecture": plan.architecture,
        "inferred": plan.inferred,
        "layers": [layer(task) for task in plan.tasks],
        "ignored": list(plan.ignored),
    }


def _mapping_patterns(plan: Plan) -> tuple[MappingPattern, ...]:
    """Returns patterns for a recipe that resolve to the mappings of `plan` again, every layer's in its own order.

    The number of an expert becomes `\\d+`, and so does that of the layer, unless another layer has modules of these names without
    having the mapping: then the layers are listed.
    """
    having: dict[_Key, list[int]] = {}
    order: list[_Key] = []
    for task in plan.layers:
        place = 0
        for key in _keys(task):
            if key not in having:
                order.insert(place, key)
            place = order.index(key) + 1
            having.setdefault(key, []).append(task.index)
    modules = {
        task.index: {_pattern(task, n.removesuffix(".weight")) for n in task.tensors if n.endswith(".weight")}
        for task in plan.layers
    }
    first = plan.layers[0]
    path = next(name.removesuffix(".weight") for name in first.tensors if name.endswith(".weight"))
    start = re.escape(first.disk_module(path).partition(f".{first.index}.")[0] + ".")
    patterns = []
    for smooth, balance in order:
        could = [layer for layer, found in modules.items() if smooth in found and found.intersection(balance)]
        has = having[smooth, balance]
        number = _NUMBER if could == has else f"({'|'.join(map(str, has))})"
        names = [f"re:{start}{number}\\.{name}$" for name in (smooth, *balance)]
        patterns.append(MappingPattern(names[0], tuple(names[1:])))
    return tuple(patterns)


def _keys(task: LayerPlan) -> dict[_Key, None]:
    """The mappings of a layer in their order, those of experts once."""
    keys: dict[_Key, None] = {}
    for mapping in task.mappings:
        balance = dict.fromkeys(_pattern(task, path) for path in mapping.balance)
        keys[_pattern(task, mapping.smooth), tuple(balance)] = None
    return keys


def _pattern(task: LayerPlan, path: str) -> str:
    """A pattern of the on-disk name within the layer, which leaves open what number an expert has."""
    name = task.disk_module(path).partition(f".{task.index}.")[2]
    blocks = {fused.module for fused in task.experts}
    block = next((block for block in blocks if path.startswith(f"{block}.")), None)
    if block is None:
        return re.escape(name)
    expert = path.removeprefix(f"{block}.").partition(".")[0]
    before, _, after = name.rpartition(f".{expert}.")
    return rf"{re.escape(before)}\.{_NUMBER}\.{re.escape(after)}"
