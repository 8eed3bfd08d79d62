"""The plan of a run: what is done to every layer. Pure: structure, recipe and names in, frozen tasks out; no tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from awqdist.checkpoint.index import CheckpointIndex
from awqdist.errors import ModelError, RecipeError
from awqdist.layer.records import SkippedMapping
from awqdist.model.families import full_precision_linears, registered_mappings
from awqdist.model.inference import infer_mappings
from awqdist.model.mapping import HeadShape, Resolution, ResolvedMapping, resolve
from awqdist.model.skeleton import Skeleton
from awqdist.model.structure import LayerStructure, trace_layers
from awqdist.recipe import MappingPattern, Recipe, SchemeGroup, WeightScheme, check_patterns_match, matches


@dataclass(frozen=True, slots=True)
class RoutedSite:
    """An input site that is only given the rows which the router sends to one expert: slice `expert` of parameter `fused` reads them.

    shared: first linear of the site that all tokens of the block go to; inner: whether the rows come out of the expert itself.
    """

    fused: str
    expert: int
    shared: str
    inner: bool


@dataclass(frozen=True, slots=True)
class LayerTask:
    """What is done to one decoder layer; with `layer` = L, to lm_head. Paths and parameter names are within the layer."""

    layer: int
    disk_names: dict[str, str]  # parameter -> on-disk name
    sites: tuple[tuple[str, ...], ...]  # linears that are given the same rows, and at least one of which is quantized
    shapes: dict[str, tuple[int, int]]  # linear -> (O, I)
    schemes: dict[str, WeightScheme]  # quantized linears
    mappings: tuple[ResolvedMapping, ...]
    skipped: tuple[SkippedMapping, ...]
    routed: dict[str, RoutedSite] = field(default_factory=dict)  # by first linear; shared sites come after them
    writers: frozenset[str] = frozenset()  # linears whose outputs are added to the residual stream
    inner: dict[str, str] = field(default_factory=dict)  # first linear of a site -> the module that makes what it reads

    def disk_module(self, path: str) -> str:
        return self.disk_names[f"{path}.weight"].removesuffix(".weight")


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole run."""

    architecture: str
    layers: tuple[LayerTask, ...]
    head: LayerTask | None  # lm_head, where the recipe quantizes it
    outside: tuple[str, ...]  # on-disk tensors that are copied as they are
    ignored: tuple[
        str, ...
    ]  # linears in full precision, by their names in transformers' model, or on disk where it has none
    inferred: bool  # the mappings come from the structure, not from the registry or the recipe

    @property
    def tasks(self) -> tuple[LayerTask, ...]:
        return self.layers + ((self.head,) if self.head else ())


def make_plan(skeleton: Skeleton, index: CheckpointIndex, recipe: Recipe) -> Plan:
    """Plans the quantization of a checkpoint. Raises RecipeError or ModelError for what cannot work, before any tensor is read."""
    structures = trace_layers(skeleton)
    heads = HeadShape.of(skeleton.model.config.get_text_config(decoder=True))
    known = _patterns(skeleton, recipe)
    resolutions: dict[int, Resolution] = {}
    tasks = []
    for layer, structure in enumerate(structures):
        names = skeleton.layer_names(layer)
        if recipe.smoothing is None:
            resolution = Resolution((), ())
        elif known is not None:
            resolution = resolve(known, structure, partial(_disk_module, names), heads)
        else:
            if id(structure) not in resolutions:
                resolutions[id(structure)] = Resolution(infer_mappings(skeleton, structure, layer), ())
            resolution = resolutions[id(structure)]
        tasks.append(_layer_task(skeleton, layer, structure, resolution, recipe))
    head = _head_task(skeleton, recipe)
    _check_recipe(recipe, skeleton, tasks)
    in_tasks = {name for task in tasks for name in task.disk_names.values()}
    in_tasks |= set(head.disk_names.values()) if head else set()
    quantized = {task.disk_module(path) for task in [*tasks, *([head] if head else [])] for path in task.schemes}
    linears = dict.fromkeys([*skeleton.linears(), *_linears(skeleton, tasks)])
    ignored = tuple(name for name in linears if skeleton.disk_module(name) not in quantized)
    ignored += _unknown_linears(skeleton, index)
    return Plan(
        architecture=skeleton.architecture,
        layers=tuple(tasks),
        head=head,
        outside=tuple(name for name in index.entries if name not in in_tasks),
        ignored=ignored,
        inferred=recipe.smoothing is not None and known is None,
    )


def _unknown_linears(skeleton: Skeleton, index: CheckpointIndex) -> tuple[str, ...]:
    """What a loader that knows more of the model than transformers, such as its multi-token prediction, may build linears from."""
    weights = [name for name in skeleton.unknown if name.endswith(".weight") and len(index.entries[name].shape) == 2]
    return tuple(sorted(name.removesuffix(".weight") for name in weights))


def _patterns(skeleton: Skeleton, recipe: Recipe) -> tuple[MappingPattern, ...] | None:
    if recipe.smoothing is None:
        return ()
    config = skeleton.model.config.get_text_config(decoder=True)
    return recipe.smoothing.mappings or registered_mappings(skeleton.architecture, config)


def _disk_module(names: dict[str, str], path: str) -> str:
    return names[f"{path}.weight"].removesuffix(".weight")


def _layer_task(
    skeleton: Skeleton, layer: int, structure: LayerStructure, resolution: Resolution, recipe: Recipe
) -> LayerTask:
    names = skeleton.layer_names(layer)
    disk_module: Callable[[str], str] = partial(_disk_module, names)
    schemes = {}
    for path, shape in structure.linears.items():
        kept = any(matches(pattern, disk_module(path)) for pattern in full_precision_linears(skeleton.architecture))
        group = _group(recipe, f"{skeleton.prefix}.{layer}.{path}", disk_module(path), named=kept)
        if group is not None and path not in structure.gates:
            _check_width(disk_module(path), shape, group.weights)
            schemes[path] = group.weights
    skipped = [SkippedMapping(mapping, reason) for mapping, reason in resolution.skipped]
    applied = []
    for mapping in resolution.mappings:
        if any(path in schemes for path in mapping.balance):
            applied.append(mapping)
        else:
            label = f"{disk_module(mapping.smooth)} -> {', '.join(mapping.balance)}"
            skipped.append(SkippedMapping(label, "none of its balance layers is quantized"))
    sites, routed = _sites(structure, schemes)
    inner = {first: module for first, module in structure.inner.items() if first in schemes}
    return LayerTask(
        layer,
        names,
        sites,
        structure.linears,
        schemes,
        tuple(applied),
        tuple(skipped),
        routed,
        structure.writers,
        inner,
    )


def _sites(
    structure: LayerStructure, schemes: Mapping[str, WeightScheme]
) -> tuple[tuple[tuple[str, ...], ...], dict[str, RoutedSite]]:
    """The sites of a layer with quantized linears, each expert's apart, and what is routed. In front of experts the site that all tokens
    go to is kept even where nothing in it is quantized: it is what experts with few tokens are fitted to."""
    parts = {path: linears for linears in structure.routed for path in linears.linears}
    found: list[tuple[str, ...]] = []
    routed: dict[str, RoutedSite] = {}
    shared = ""
    for site in structure.sites:
        common = tuple(path for path in site if path not in parts)
        experts = list(dict.fromkeys(parts[path] for path in site if path in parts))
        shared = common[0] if experts and common else shared
        for linears in experts:
            if any(path in schemes for path in linears.linears):
                found.append(linears.linears)
                routed[linears.linears[0]] = RoutedSite(linears.fused, linears.expert, shared, inner=not common)
        needed = any(path in schemes for path in site) or (experts and any(path in schemes for path in parts))
        if needed and common:
            found.append(common)
    return tuple(found), routed


def _linears(skeleton: Skeleton, tasks: Iterable[LayerTask]) -> Iterator[str]:
    """All linears of the layers, experts' and routers among them, by their names in the model."""
    return (f"{skeleton.prefix}.{task.layer}.{path}" for task in tasks for path in task.shapes)


def _group(recipe: Recipe, name: str, disk: str, *, named: bool = False) -> SchemeGroup | None:
    """The scheme group of a linear. Targets mean names in transformers' model, as they do to loaders; `ignore` may mean either name.

    named: only a target that is a name or a pattern counts, not "Linear".
    """
    if any(matches(pattern, disk) for pattern in recipe.ignore):
        return None
    return recipe.scheme_for(name, "") if named else recipe.scheme_for(name)


def _head_task(skeleton: Skeleton, recipe: Recipe) -> LayerTask | None:
    """lm_head as a last layer, if the recipe quantizes it. Raises ModelError where it is tied to the embeddings."""
    head = skeleton.model.get_output_embeddings()
    name = next((n for n, module in skeleton.model.named_modules() if module is head), None)
    group = _group(recipe, name, skeleton.disk_module(name)) if name else None
    if name is None or group is None or any(matches(pattern, name.rpartition(".")[2]) for pattern in recipe.ignore):
        return None  # "lm_head" means Llama-4's language_model.lm_head too
    if f"{name}.weight" in skeleton.model.all_tied_weights_keys:
        raise ModelError(
            f'{name} is tied to the embeddings and cannot be quantized alone; add "{name}" to the recipe\'s ignore'
        )
    shape = skeleton.linears()[name]
    _check_width(name, shape, group.weights)
    names = {
        key.removeprefix(name.rpartition(".")[0] + ".") if "." in name else key: value
        for key, value in skeleton.on_disk.items()
        if key.startswith(f"{name}.")
    }
    path = name.rpartition(".")[2]
    return LayerTask(skeleton.num_layers, names, ((path,),), {path: shape}, {path: group.weights}, (), ())


def _check_width(name: str, shape: tuple[int, int], scheme: WeightScheme) -> None:
    if scheme.group_size > 0 and shape[1] % scheme.group_size:
        fitting = [size for size in (128, 64, 32, 16) if shape[1] % size == 0]
        advice = f"use group_size {fitting[0]}, or " if fitting else ""
        raise RecipeError(
            f"linear {name} has {shape[1]} inputs, which group size {scheme.group_size} does not divide; {advice}add it to ignore"
        )


def _check_recipe(recipe: Recipe, skeleton: Skeleton, tasks: list[LayerTask]) -> None:
    """Every pattern of the recipe must name something; something must be quantized."""
    linears = list(dict.fromkeys([*skeleton.linears(), *_linears(skeleton, tasks)]))
    modules = [
        task.disk_module(p.removesuffix(".weight")) for task in tasks for p in task.disk_names if p.endswith(".weight")
    ]
    on_disk = [skeleton.disk_module(name) for name in linears]
    check_patterns_match(recipe.ignore, [*linears, *on_disk, *modules, "lm_head"], "ignore")
    targets = [target for group in recipe.groups for target in group.targets if target != "Linear"]
    check_patterns_match(targets, linears, "targets")
    for mapping in (recipe.smoothing.mappings if recipe.smoothing else None) or ():
        check_patterns_match((mapping.smooth_layer, *mapping.balance_layers), [*on_disk, *modules], "mappings")
    if not any(task.schemes for task in tasks):
        raise RecipeError("the recipe quantizes no linear of the decoder layers; check targets and ignore")
