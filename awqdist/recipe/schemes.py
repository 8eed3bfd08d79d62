"""From a modifier's quantization fields to scheme groups, with compressed-tensors' own models as the judge of what is
valid.

Weights of integer type, grouped or per row, are all that is written here; a scheme that asks for more is refused, never
trimmed. compressed-tensors brings torch with it, so it is imported inside functions.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from awqdist.errors import RecipeError
from awqdist.recipe.matching import check_patterns, suggestion
from awqdist.recipe.modifiers import first_mistake
from awqdist.recipe.recipe import SchemeGroup, WeightScheme

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    from awqdist.recipe.modifiers import QuantizationFields

_MINMAX_OBSERVERS = (
    "minmax",
    "memoryless_minmax",
    "static_minmax",
)  # one and the same for weights, which are seen once


def scheme_groups(fields: QuantizationFields) -> tuple[SchemeGroup, ...]:
    """The groups that a modifier with `scheme` or `config_groups` defines.

    Raises RecipeError for what cannot be honoured.
    """
    where = type(fields).__name__
    if fields.scheme is not None and fields.config_groups is not None:
        raise RecipeError(f"{where} has both scheme and config_groups; keep one of them")
    observer = _weight_observer(fields, where)
    if fields.config_groups is not None:
        schemes = {name: _validated(s, f"{where}: config_groups.{name}") for name, s in fields.config_groups.items()}
        _check_targets_agree(fields, schemes, where)
    else:
        assert fields.scheme is not None, "scheme_groups needs a scheme or config_groups"
        targets = {fields.scheme: fields.targets} if isinstance(fields.scheme, str) else fields.scheme
        schemes = {f"group_{i}": _preset(name, targets[name], where) for i, name in enumerate(targets)}
    return tuple(_group(name, scheme, observer, f"{where}: {name}") for name, scheme in schemes.items())


def plain_group(fields: QuantizationFields, weights: WeightScheme) -> SchemeGroup:
    """A group "group_0" for the targets of a modifier without a scheme: integer weights and nothing else."""
    where = type(fields).__name__
    per_row = weights.group_size == -1
    args: dict[str, Any] = {
        "num_bits": weights.num_bits,
        "type": "int",
        "symmetric": weights.symmetric,
        "dynamic": False,
    }
    args |= {"strategy": "channel"} if per_row else {"strategy": "group", "group_size": weights.group_size}
    scheme = _validated({"targets": fields.targets, "weights": args}, where)
    return _group("group_0", scheme, _weight_observer(fields, where), where)


def with_actorder(group: SchemeGroup, actorder: str | None, explicit: bool) -> SchemeGroup:
    """The group with GPTQ's column order in its definition, where llm-compressor records it.

    A scheme's own order stands unless the modifier was given another one, which is a contradiction; "static" and
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
    return SchemeGroup(group.name, group.targets, group.weights, _canonical(definition))


def _preset(name: str, targets: list[str], where: str) -> QuantizationScheme:
    from compressed_tensors.quantization import is_preset_scheme, preset_name_to_scheme
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    if not is_preset_scheme(name):
        raise RecipeError(f"{where}: no scheme is called {name!r}; {suggestion(name.upper(), PRESET_SCHEMES)}")
    return preset_name_to_scheme(name, list(targets))


def _validated(scheme: Any, where: str) -> QuantizationScheme:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    if isinstance(scheme, dict):
        _refuse_unknown_keys(scheme, QuantizationScheme, where)
        if isinstance(scheme.get("weights"), dict):
            _refuse_unknown_keys(scheme["weights"], QuantizationArgs, f"{where}.weights")
    elif not isinstance(scheme, QuantizationScheme):
        raise RecipeError(f"{where}: expected a QuantizationScheme or a dict of its fields, found {scheme!r}")
    try:
        return QuantizationScheme.model_validate(scheme)
    except ValidationError as error:
        raise RecipeError(first_mistake(error, where)) from error
    except (
        TypeError,
        NotImplementedError,
        AttributeError,
    ) as error:  # compressed-tensors' validators let these through
        raise RecipeError(f"{where}: a value has the wrong type ({error}); correct the scheme") from error


def _refuse_unknown_keys(fields: dict[str, Any], model: type[BaseModel], where: str) -> None:
    for key in fields:
        if key not in model.model_fields:
            raise RecipeError(f"{where} has no key {str(key)!r}; {suggestion(str(key), model.model_fields)}")


def _check_targets_agree(fields: QuantizationFields, schemes: dict[str, QuantizationScheme], where: str) -> None:
    """`targets` belongs to `scheme`; beside config_groups its default may stand, anything else must agree."""
    in_groups = {target for scheme in schemes.values() for target in scheme.targets}
    if fields.targets != ["Linear"] and set(fields.targets) != in_groups:
        raise RecipeError(
            f"{where}: targets {fields.targets} contradicts the targets in config_groups {sorted(in_groups)}; "
            "remove targets"
        )


def _weight_observer(fields: QuantizationFields, where: str) -> str | None:
    """The observer named at the modifier, lower case, or None.

    Raises RecipeError for observers and schemes of activations.
    """
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
    group_size = scheme.weights.group_size if scheme.weights.strategy == "group" else None
    weights = WeightScheme(scheme.weights.num_bits, scheme.weights.symmetric, -1 if group_size is None else group_size)
    return SchemeGroup(name, tuple(scheme.targets), weights, _canonical(definition))


def _check_weights(args: QuantizationArgs, observer: str | None, where: str) -> None:
    """Raises RecipeError for the first setting that packed integer weights cannot honour."""
    used_observer = (observer or args.observer or "minmax").lower()
    findings = (
        (args.type == "int", f"type {args.type!r}", "'int'"),
        (2 <= args.num_bits <= 8, f"num_bits {args.num_bits}", "2 to 8"),
        (
            args.strategy in ("group", "channel"),
            f"strategy {args.strategy!r}",
            "'group' with a group_size, or 'channel'",
        ),
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


def _canonical(definition: dict[str, Any]) -> str:
    return json.dumps(definition, sort_keys=True, separators=(",", ":"))
