"""The mappings of a plan as patterns that a recipe can hold, and that resolve to the same mappings again.

The number of an expert becomes `\\d+`, and so does that of the layer, unless another layer has modules of these names without having the
mapping: then the layers are listed.
"""

from __future__ import annotations

import re

from awqdist.layer.plan import LayerPlan
from awqdist.recipe import MappingPattern
from awqdist.run.layer_plans import Plan

_NUMBER = r"\d+"

Key = tuple[str, tuple[str, ...]]  # patterns of the smooth layer and of the balance layers within a layer


def mapping_patterns(plan: Plan) -> tuple[MappingPattern, ...]:
    """In an order in which every layer's mappings come in their own order."""
    having: dict[Key, list[int]] = {}
    order: list[Key] = []
    for task in plan.layers:
        place = 0
        for key in _keys(task):
            if key not in having:
                order.insert(place, key)
            place = order.index(key) + 1
            having.setdefault(key, []).append(task.index)
    modules = {task.index: _modules(task) for task in plan.layers}
    start = re.escape(_start(plan.layers[0]))
    patterns = []
    for smooth, balance in order:
        could = [layer for layer, found in modules.items() if smooth in found and found.intersection(balance)]
        has = having[smooth, balance]
        number = _NUMBER if could == has else f"({'|'.join(map(str, has))})"
        names = [f"re:{start}{number}\\.{name}$" for name in (smooth, *balance)]
        patterns.append(MappingPattern(names[0], tuple(names[1:])))
    return tuple(patterns)


def _keys(task: LayerPlan) -> dict[Key, None]:
    """The mappings of a layer in their order, those of experts once."""
    keys: dict[Key, None] = {}
    for mapping in task.mappings:
        balance = dict.fromkeys(_pattern(task, path) for path in mapping.balance)
        keys[_pattern(task, mapping.smooth), tuple(balance)] = None
    return keys


def _modules(task: LayerPlan) -> set[str]:
    return {_pattern(task, name.removesuffix(".weight")) for name in task.tensors if name.endswith(".weight")}


def _start(task: LayerPlan) -> str:
    """What on-disk names of the layer begin with, up to its number."""
    path = next(name.removesuffix(".weight") for name in task.tensors if name.endswith(".weight"))
    return task.disk_module(path).partition(f".{task.index}.")[0] + "."


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
