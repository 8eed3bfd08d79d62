"""Reads recipes from preset names, YAML and modifier objects, and refuses contradictions and what cannot be honoured.

YAML is accepted in each layout that llm-compressor reads or writes: stages (`default_stage: {default_modifiers:
{AWQModifier: {...}}}`), a flat mapping of modifiers, or a list of such mappings, in any nesting.

A recipe has at most one AWQModifier (smoothing, clip) and at most one quantization modifier (schemes, rounding). Their
order does not matter: smoothing always comes before rounding. compressed-tensors' own models judge what a scheme may
say; of what they allow, only packed integer weights are written. compressed-tensors brings torch with it, so it is
imported inside functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import yaml
from pydantic import ValidationError

from awqdist.errors import RecipeError, first_line
from awqdist.recipe.modifiers import (
    AWQModifier,
    GPTQModifier,
    Modifier,
    QuantizationModifier,
    first_mistake,
    refuse_unknown_keys,
)
from awqdist.recipe.recipe import (
    MappingPattern,
    Recipe,
    Rounding,
    SchemeGroup,
    Smoothing,
    WeightScheme,
    check_patterns,
    suggestion,
)

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

RecipeSource = str | Path | Recipe | Modifier | Sequence[Modifier] | None

_PACKAGE = Path(__file__).parents[1]
_PRESET_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")  # of a wheel, of a checkout
_NESTING = re.compile(r"(.*_)?(stage|modifiers)(_\d+)?")  # quant_stage, quant_modifiers, default_stage_0
MODIFIERS: dict[str, type[Modifier]] = {m.__name__: m for m in (AWQModifier, QuantizationModifier, GPTQModifier)}

_MINMAX_OBSERVERS = ("minmax", "memoryless_minmax", "static_minmax")  # equal for weights, which are observed once


def load_recipe(source: RecipeSource = None) -> Recipe:
    """Returns the recipe that `source` describes.

    Args:
        source: A preset's name, the path of a YAML file, YAML text (any string with a line break), a modifier or a list
            of modifiers, a Recipe, or None for the preset "default".

    Raises:
        RecipeError: If the recipe cannot be read, contradicts itself or asks for something that cannot be done. The
            message names the file, and line and column of errors in YAML.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, str) and "\n" in source:
        return _from_text(source, "recipe text")
    if isinstance(source, (str, Path)) or source is None:
        path = _path_of("default" if source is None else source)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {path} cannot be read ({error}); give a readable YAML file in UTF-8") from error
        return _from_text(text, f"recipe {path}")
    modifiers: Any = source if isinstance(source, (list, tuple)) else [source]
    return build_recipe(modifiers)


def preset_names() -> list[str]:
    """Returns the names of the recipes that ship with awqdist, sorted."""
    return sorted({path.stem for folder in _PRESET_FOLDERS for path in folder.glob("*.yaml")})


def _path_of(source: str | Path) -> Path:
    presets = preset_names()
    if isinstance(source, str) and source in presets:
        return next(path for folder in _PRESET_FOLDERS if (path := folder / f"{source}.yaml").is_file())
    path = Path(source)
    if path.is_file():
        return path
    if path.exists():
        raise RecipeError(f"recipe {path} is not a file; give a YAML file or a preset ({', '.join(presets)})")
    nearest = suggestion(path.stem, presets)
    advice = f"; {nearest}" if nearest.startswith("did") else ""
    raise RecipeError(
        f"recipe {str(source)!r} is neither a file nor a preset; presets are {', '.join(presets)}{advice}"
    )


def _from_text(text: str, where: str) -> Recipe:
    try:
        return build_recipe(list(_modifiers(yaml.load(text, _RecipeLoader))))  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        message = f"{where}{place}: not valid YAML: {error.problem or error.context}; correct it there"
        raise RecipeError(message) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {first_line(error)}; correct it") from error
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    except RecursionError as error:
        raise RecipeError(f"{where}: a stage contains itself through a YAML alias; write it out") from error


def _modifiers(tree: Any) -> Iterator[Modifier]:
    """Yields all modifiers of a YAML tree in its order. Raises RecipeError for anything else in it."""
    if isinstance(tree, list):
        for item in tree:
            yield from _modifiers(item)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if key in MODIFIERS:
                yield _modifier(key, value)
            elif isinstance(key, str) and _NESTING.fullmatch(key):
                yield from _modifiers(value)
            elif key != "args":
                raise RecipeError(f"{str(key)!r} is not a known modifier; known are {', '.join(MODIFIERS)}")
            elif value:
                raise RecipeError(f"args are not filled in, found {value!r}; write the values where they belong")
    elif isinstance(tree, str) and tree in MODIFIERS:
        yield _modifier(tree, None)
    elif tree is not None:
        raise RecipeError(f"expected modifiers ({', '.join(MODIFIERS)}), found {tree!r}")


def _modifier(name: str, fields: Any) -> Modifier:
    if not isinstance(fields, dict) and fields is not None:
        raise RecipeError(f"{name}: expected a mapping of its keys, found {fields!r}")
    for key in fields or {}:
        if not isinstance(key, str):
            raise RecipeError(f"{name} has no key {key!r}; keys are words")
    return MODIFIERS[name](**(fields or {}))


class _RecipeLoader(yaml.SafeLoader):
    """Reads YAML safely, refuses repeated keys, and accepts the Python objects that llm-compressor 0.14 writes."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                problem = f"the key {key.value!r} appears twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _python_object(_: yaml.SafeLoader, kind: str, node: Any) -> None:
    """Reads a device, or llm-compressor's marker for "not given", as None. Runs nothing.

    Only `offload_device` holds such objects, and it changes nothing here.
    """
    if kind not in ("torch.device", "llmcompressor.sentinel.Sentinel"):
        problem = f"a Python object of {kind} cannot be a value of a recipe"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_RecipeLoader.add_multi_constructor("tag:yaml.org,2002:python/object/apply:", _python_object)


def build_recipe(modifiers: Sequence[Modifier]) -> Recipe:
    """Returns the recipe that the modifiers describe together.

    Raises:
        RecipeError: If they contradict each other, or a value cannot be honoured.
    """
    awq, quantizer = _split(modifiers)
    owner: Modifier | None = quantizer or awq
    assert owner is not None, "_split refuses a recipe without modifiers"
    rounding = _rounding(awq, quantizer)
    groups = _groups(owner, awq)
    if rounding.method == "gptq":
        explicit = isinstance(quantizer, GPTQModifier) and "actorder" in quantizer.model_fields_set
        order = quantizer.actorder if isinstance(quantizer, GPTQModifier) else "static"
        groups = tuple(_with_actorder(group, order, explicit) for group in groups)
    keeps_lm_head = quantizer is None and not owner.has_scheme() and "ignore" not in owner.model_fields_set
    ignore = ["lm_head"] if keeps_lm_head else owner.ignore
    check_patterns(ignore, "ignore")
    return Recipe(_smoothing(awq), awq is not None and awq.clip, rounding, groups, tuple(ignore))


def _split(modifiers: Sequence[Any]) -> tuple[AWQModifier | None, QuantizationModifier | None]:
    """Returns the AWQModifier and the quantization modifier, of which one may be missing."""
    known = ", ".join(MODIFIERS)
    for modifier in modifiers:
        if not isinstance(modifier, (AWQModifier, QuantizationModifier)):
            kind = f"{type(modifier).__module__}.{type(modifier).__qualname__}"
            raise RecipeError(f"a recipe holds {known} from awqdist; found an object of {kind}")
    if not modifiers:
        raise RecipeError(f"the recipe has no modifiers, so nothing to quantize; give one or more of {known}")
    awqs = [m for m in modifiers if isinstance(m, AWQModifier)]
    quantizers = [m for m in modifiers if isinstance(m, QuantizationModifier)]
    if len(awqs) > 1:
        raise RecipeError(f"the recipe has {len(awqs)} AWQModifiers, expected at most one; put all mappings into one")
    if len(quantizers) > 1:
        names = " and ".join(type(m).__name__ for m in quantizers)
        raise RecipeError(
            f"the recipe has {names}, which would quantize the same weights twice; keep one, with all its groups"
        )
    if awqs and quantizers and awqs[0].says_what_to_quantize():
        name = type(quantizers[0]).__name__
        raise RecipeError(
            f"AWQModifier and {name} both say what to quantize (targets, ignore, scheme, config_groups, observers); "
            f"leave that to {name}"
        )
    return (awqs[0] if awqs else None), (quantizers[0] if quantizers else None)


def _smoothing(awq: AWQModifier | None) -> Smoothing | None:
    """Returns None without AWQModifier, and where its list of mappings is empty."""
    if awq is None or awq.mappings == []:
        return None
    if awq.mappings is None:
        return Smoothing(None, awq.duo_scaling, awq.n_grid)
    for mapping in awq.mappings:
        check_patterns([mapping.smooth_layer, *mapping.balance_layers], "AWQModifier: mappings")
    patterns = tuple(MappingPattern(m.smooth_layer, tuple(m.balance_layers)) for m in awq.mappings)
    return Smoothing(patterns, awq.duo_scaling, awq.n_grid)


def _rounding(awq: AWQModifier | None, quantizer: QuantizationModifier | None) -> Rounding:
    method: Literal["nearest", "gptq"] = awq.rounding if awq is not None and awq.rounding is not None else "nearest"
    if not isinstance(quantizer, GPTQModifier):
        return Rounding(method)
    if awq is not None and awq.rounding == "nearest":
        raise RecipeError(
            "AWQModifier: rounding 'nearest' contradicts GPTQModifier; remove rounding or use QuantizationModifier"
        )
    dampening = 0.01 if quantizer.dampening_frac is None else quantizer.dampening_frac
    return Rounding("gptq", dampening, quantizer.actorder is not None, quantizer.block_size)


def _groups(owner: Modifier, awq: AWQModifier | None) -> tuple[SchemeGroup, ...]:
    """Returns the groups of `owner`. Where it has no scheme, AWQModifier's bits, symmetric and group_size are one."""
    where = type(owner).__name__
    if owner.scheme is not None and owner.config_groups is not None:
        raise RecipeError(f"{where} has both scheme and config_groups; keep one of them")
    fields = {} if awq is None else {"bits": awq.bits, "symmetric": awq.symmetric, "group_size": awq.group_size}
    given = {key: value for key, value in fields.items() if value is not None}
    schemes = _schemes(owner, given, awq is owner)
    observer = _weight_observer(owner)
    groups = tuple(_group(name, scheme, observer, f"{where}: {name}") for name, scheme in schemes.items())
    seen: dict[str, str] = {}
    for group in groups:
        weights = group.weights
        stored = {"bits": weights.num_bits, "symmetric": weights.symmetric, "group_size": weights.group_size}
        for key, value in given.items():
            if value != stored[key]:
                raise RecipeError(
                    f"AWQModifier: {key} {value} contradicts {stored[key]} in the scheme of {group.name}; "
                    "change one of the two"
                )
        for target in group.targets:
            if seen.setdefault(target, group.name) != group.name:
                raise RecipeError(
                    f"the target {target!r} is in {seen[target]} and in {group.name}; keep it in one of them"
                )
    return groups


def _schemes(owner: Modifier, given: dict[str, Any], is_awq: bool) -> dict[str, QuantizationScheme]:
    """Returns compressed-tensors' schemes by group name.

    Args:
        owner: The modifier that says what to quantize.
        given: What AWQModifier says of bits, symmetric and group_size.
        is_awq: Whether `owner` is the AWQModifier, which needs no scheme.
    """
    where = type(owner).__name__
    if owner.config_groups:
        schemes = {name: _scheme(s, f"{where}: config_groups.{name}") for name, s in owner.config_groups.items()}
        in_groups = {target for scheme in schemes.values() for target in scheme.targets}
        if owner.targets != ["Linear"] and set(owner.targets) != in_groups:
            raise RecipeError(
                f"{where}: targets {owner.targets} contradicts the targets in config_groups {sorted(in_groups)}; "
                "remove targets"
            )
        return schemes
    if owner.scheme is not None:
        targets = {owner.scheme: owner.targets} if isinstance(owner.scheme, str) else owner.scheme
        return {f"group_{i}": _preset(name, targets[name], where) for i, name in enumerate(targets)}
    if not is_awq and not given:
        raise RecipeError(
            f"{where} leaves nothing to quantize: it has neither scheme nor config_groups; "
            "add for example 'scheme: W4A16_ASYM'"
        )
    given = {"bits": 4, "symmetric": False, "group_size": 128} | given
    args = {"num_bits": given["bits"], "type": "int", "symmetric": given["symmetric"], "dynamic": False}
    per_row = given["group_size"] == -1
    args |= {"strategy": "channel"} if per_row else {"strategy": "group", "group_size": given["group_size"]}
    return {"group_0": _scheme({"targets": owner.targets, "weights": args}, where)}


def _preset(name: str, targets: list[str], where: str) -> QuantizationScheme:
    from compressed_tensors.quantization import is_preset_scheme, preset_name_to_scheme
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    if not is_preset_scheme(name):
        raise RecipeError(f"{where}: no scheme is called {name!r}; {suggestion(name.upper(), PRESET_SCHEMES)}")
    return preset_name_to_scheme(name, list(targets))


def _scheme(scheme: Any, where: str) -> QuantizationScheme:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    if isinstance(scheme, dict):
        refuse_unknown_keys(scheme, QuantizationScheme, where)
        if isinstance(scheme.get("weights"), dict):
            refuse_unknown_keys(scheme["weights"], QuantizationArgs, f"{where}.weights")
    elif not isinstance(scheme, QuantizationScheme):
        raise RecipeError(f"{where}: expected a QuantizationScheme or a dict of its fields, found {scheme!r}")
    try:
        return QuantizationScheme.model_validate(scheme)
    except ValidationError as error:
        raise RecipeError(first_mistake(error, where)) from error
    except (TypeError, NotImplementedError, AttributeError) as error:  # from compressed-tensors' own validators
        raise RecipeError(f"{where}: a value has the wrong type ({error}); correct the scheme") from error


def _weight_observer(fields: Modifier) -> str | None:
    """Returns the observer of weights named at the modifier, in lower case, or None.

    Raises:
        RecipeError: For observers and schemes of activations.
    """
    where = type(fields).__name__
    if fields.kv_cache_scheme is not None:
        raise RecipeError(f"{where}: kv_cache_scheme cannot be honoured, only weights are quantized; remove it")
    observers = dict(fields.observer or {})
    single = {"weights": fields.weight_observer, "input": fields.input_observer, "output": fields.output_observer}
    given = {key: value for key, value in single.items() if value is not None}
    if observers and given:
        raise RecipeError(f"{where} has both observer and an observer key for {next(iter(given))!r}; keep one of them")
    observers |= given
    for key in observers:
        if key != "weights":
            raise RecipeError(
                f"{where}: an observer for {key!r} cannot be honoured, only weights are quantized; remove it"
            )
    return observers["weights"].lower() if observers else None


def _group(name: str, scheme: QuantizationScheme, observer: str | None, where: str) -> SchemeGroup:
    if not scheme.targets:
        raise RecipeError(f"{where} has no targets; name classes, modules or regexes, such as Linear")
    check_patterns(scheme.targets, where)
    for side in ("input_activations", "output_activations"):
        if getattr(scheme, side) is not None:
            raise RecipeError(
                f"{where}: {side} cannot be honoured, only weights are quantized; use a scheme like W4A16"
            )
    if scheme.format not in (None, "pack-quantized"):
        raise RecipeError(f"{where}: format {scheme.format!r} is not written; use 'pack-quantized' or leave it out")
    if scheme.weights is None:
        raise RecipeError(
            f"{where} quantizes nothing: it has no weights; give weights or a preset scheme such as W4A16_ASYM"
        )
    _check_weights(scheme.weights, observer, f"{where}.weights")
    definition = scheme.model_dump(mode="json")
    if observer is not None:
        definition["weights"]["observer"] = observer
    group_size = scheme.weights.group_size if scheme.weights.strategy == "group" else -1
    weights = WeightScheme(scheme.weights.num_bits, scheme.weights.symmetric, cast(int, group_size))
    return SchemeGroup(name, tuple(scheme.targets), weights, _canonical(definition))


def _check_weights(args: QuantizationArgs, observer: str | None, where: str) -> None:
    """Raises RecipeError for the first setting that packed integer weights cannot honour."""
    used_observer = (observer or args.observer or "minmax").lower()
    findings = (
        (args.type == "int", f"type {args.type!r}", "'int'"),
        (2 <= args.num_bits <= 8, f"num_bits {args.num_bits}", "2 to 8"),
        (args.strategy in ("group", "channel"), f"strategy {args.strategy!r}", "'group' or 'channel'"),
        (args.actorder in (None, "static", "weight"), f"actorder {args.actorder!r}", "'static', 'weight' or null"),
        (args.dynamic is False, f"dynamic {args.dynamic!r}", "false"),
        (used_observer in _MINMAX_OBSERVERS, f"observer {used_observer!r}", " or ".join(_MINMAX_OBSERVERS)),
        (not args.observer_kwargs, f"observer_kwargs {args.observer_kwargs}", "none"),
        (args.scale_dtype is None, f"scale_dtype {args.scale_dtype}", "none: scales have the checkpoint's dtype"),
        (str(args.zp_dtype) in ("None", "torch.int8"), f"zp_dtype {args.zp_dtype}", "torch.int8"),
    )
    for honoured, found, expected in findings:
        if not honoured:
            raise RecipeError(f"{where}: {found} cannot be honoured; use {expected}")


def _with_actorder(group: SchemeGroup, actorder: str | None, explicit: bool) -> SchemeGroup:
    """Records GPTQ's column order in the group's definition, where llm-compressor records it.

    A scheme's own order stands unless the modifier was given another one, which is a contradiction. "static" and
    "weight" are two names of the same order.
    """
    definition = json.loads(group.definition)
    own = definition["weights"].get("actorder")
    if explicit and own is not None and actorder is None:
        raise RecipeError(
            f"GPTQModifier: actorder null contradicts actorder {own!r} in the weights of {group.name}; remove one"
        )
    if own is None and actorder is not None:
        definition["weights"]["actorder"] = actorder
    return replace(group, definition=_canonical(definition))


def _canonical(definition: dict[str, Any]) -> str:
    return json.dumps(definition, sort_keys=True, separators=(",", ":"))
