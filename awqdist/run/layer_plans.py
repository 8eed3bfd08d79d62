"""Plans what is done to every layer: from the model's structure, the names in the checkpoint and the recipe, without tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from awqdist.checkpoint.index import CheckpointIndex
from awqdist.errors import ModelError, RecipeError
from awqdist.layer.plan import Expert, LayerPlan, Linear, Site
from awqdist.layer.records import SkippedMapping
from awqdist.model.families import full_precision_linears, registered_mappings
from awqdist.model.mapping import HeadShape, Resolution, infer_mappings, resolve
from awqdist.model.skeleton import Skeleton
from awqdist.model.structure import LayerStructure, trace_layers
from awqdist.recipe import MappingPattern, Recipe, SchemeGroup, WeightScheme, check_patterns_match, matches


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole run."""

    architecture: str
    layers: tuple[LayerPlan, ...]
    head: LayerPlan | None  # lm_head, where the recipe quantizes it
    outside: tuple[str, ...]  # on-disk tensors that are copied as they are
    ignored: tuple[
        str, ...
    ]  # linears in full precision, by their names in transformers' model, or on disk where it has none
    inferred: bool  # the mappings come from the structure, not from the registry or the recipe

    @property
    def tasks(self) -> tuple[LayerPlan, ...]:
        """The layers, and lm_head if it is quantized."""
        return self.layers + ((self.head,) if self.head else ())


def make_plan(skeleton: Skeleton, index: CheckpointIndex, recipe: Recipe) -> Plan:
    """Plans the quantization of a checkpoint. Raises RecipeError or ModelError for what cannot work, before any tensor is read."""
    structures = trace_layers(skeleton)
    config = skeleton.model.config.get_text_config(decoder=True)
    heads = HeadShape.of(config)
    known: tuple[MappingPattern, ...] | None = ()  # None: the mappings are inferred
    if recipe.smoothing is not None:
        known = recipe.smoothing.mappings or registered_mappings(skeleton.architecture, config)
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
        tasks.append(_decoder_layer(skeleton, layer, structure, resolution, recipe))
    head = _head(skeleton, recipe)
    in_layers = [f"{skeleton.prefix}.{task.index}.{linear.path}" for task in tasks for linear in task.linears]
    linears = list(dict.fromkeys([*skeleton.linears(), *in_layers]))  # experts' and routers among them
    _check_recipe(recipe, skeleton, tasks, linears)
    every = [*tasks, head] if head else tasks
    in_tasks = {name for task in every for name in task.tensors.values()}
    quantized = {linear.disk_name for task in every for linear in task.quantized}
    ignored = [name for name in linears if skeleton.disk_module(name) not in quantized]
    # a loader that knows more of the model than transformers, such as its multi-token prediction, may build linears from these
    unknown = [name for name in skeleton.unknown if name.endswith(".weight") and len(index.entries[name].shape) == 2]
    ignored += sorted(name.removesuffix(".weight") for name in unknown)
    return Plan(
        architecture=skeleton.architecture,
        layers=tuple(tasks),
        head=head,
        outside=tuple(name for name in index.entries if name not in in_tasks),
        ignored=tuple(ignored),
        inferred=known is None,
    )


def _disk_module(names: dict[str, str], path: str) -> str:
    return names[f"{path}.weight"].removesuffix(".weight")


def _decoder_layer(
    skeleton: Skeleton, layer: int, structure: LayerStructure, resolution: Resolution, recipe: Recipe
) -> LayerPlan:
    names = skeleton.layer_names(layer)
    linears = {}
    for path, shape in structure.linears.items():
        disk = _disk_module(names, path)
        kept = any(matches(pattern, disk) for pattern in full_precision_linears(skeleton.architecture))
        group = _group(recipe, f"{skeleton.prefix}.{layer}.{path}", disk, named=kept)
        scheme = group.weights if group is not None and path not in structure.gates else None
        if scheme is not None:
            _check_width(disk, shape, scheme)
        linears[path] = Linear(path, shape, scheme, disk)
    skipped = [SkippedMapping(mapping, reason) for mapping, reason in resolution.skipped]
    applied = []
    for mapping in resolution.mappings:
        if any(linears[path].scheme for path in mapping.balance):
            applied.append(mapping)
        else:
            label = f"{_disk_module(names, mapping.smooth)} -> {', '.join(mapping.balance)}"
            skipped.append(SkippedMapping(label, "none of its balance layers is quantized"))
    return LayerPlan(
        index=layer,
        kind="decoder",
        linears=tuple(linears.values()),
        sites=_sites(structure, linears),
        mappings=tuple(applied),
        skipped=tuple(skipped),
        experts=skeleton.layer_experts(layer),
        tensors=names,
    )


def _sites(structure: LayerStructure, linears: Mapping[str, Linear]) -> tuple[Site, ...]:
    """The sites of a layer with quantized linears, each expert's apart. In front of experts the site that all tokens go to is kept even
    where nothing in it is quantized: it is what experts with few tokens are fitted to."""
    parts = {path: routed for routed in structure.routed for path in routed.linears}
    any_expert = any(linears[path].scheme for path in parts if path in linears)
    found: list[Site] = []
    block: Site | None = None
    for paths in structure.sites:
        common = tuple(linears[path] for path in paths if path not in parts)
        experts = list(dict.fromkeys(parts[path] for path in paths if path in parts))
        refit_in = structure.inner.get(common[0].path) if common and common[0].scheme else None
        to_residual = _is_written(structure, common)
        site = Site(common, refit_in=refit_in, to_residual=to_residual) if common else None
        block = site if experts and site else block
        for routed in experts:
            own = tuple(linears[path] for path in routed.linears)
            if any(linear.scheme for linear in own):
                assert block is not None, f"nothing beside the experts reads what {own[0].path} reads"
                expert = Expert(routed.expert, routed.fused, block, is_inner=site is None)
                found.append(Site(own, expert, to_residual=_is_written(structure, own)))
        if site and (any(linears[path].scheme for path in paths) or (experts and any_expert)):
            found.append(site)
    return tuple(found)


def _is_written(structure: LayerStructure, linears: tuple[Linear, ...]) -> bool:
    return len(linears) == 1 and linears[0].path in structure.writers


def _group(recipe: Recipe, name: str, disk: str, *, named: bool = False) -> SchemeGroup | None:
    """The scheme group of a linear. Targets mean names in transformers' model, as they do to loaders; `ignore` may mean either name.

    named: only a target that is a name or a pattern counts, not "Linear".
    """
    if any(matches(pattern, disk) for pattern in recipe.ignore):
        return None
    return recipe.scheme_for(name, "") if named else recipe.scheme_for(name)


def _head(skeleton: Skeleton, recipe: Recipe) -> LayerPlan | None:
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
    linear = Linear(path, shape, group.weights, _disk_module(names, path))
    return LayerPlan(skeleton.num_layers, "head", (linear,), (Site((linear,)),), tensors=names)


def _check_width(name: str, shape: tuple[int, int], scheme: WeightScheme) -> None:
    if scheme.group_size > 0 and shape[1] % scheme.group_size:
        fitting = [size for size in (128, 64, 32, 16) if shape[1] % size == 0]
        advice = f"use group_size {fitting[0]}, or " if fitting else ""
        raise RecipeError(
            f"linear {name} has {shape[1]} inputs, which group size {scheme.group_size} does not divide; {advice}add it to ignore"
        )


def _check_recipe(recipe: Recipe, skeleton: Skeleton, tasks: list[LayerPlan], linears: list[str]) -> None:
    """Raises RecipeError if a pattern of the recipe names nothing, or nothing is quantized. linears: names in the model."""
    modules = [
        task.disk_module(p.removesuffix(".weight")) for task in tasks for p in task.tensors if p.endswith(".weight")
    ]
    on_disk = [skeleton.disk_module(name) for name in linears]
    check_patterns_match(recipe.ignore, [*linears, *on_disk, *modules, "lm_head"], "ignore")
    targets = [target for group in recipe.groups for target in group.targets if target != "Linear"]
    check_patterns_match(targets, linears, "targets")
    for mapping in (recipe.smoothing.mappings if recipe.smoothing else None) or ():
        check_patterns_match((mapping.smooth_layer, *mapping.balance_layers), [*on_disk, *modules], "mappings")
    if not any(task.quantized for task in tasks):
        raise RecipeError("the recipe quantizes no linear of the decoder layers; check targets and ignore")
