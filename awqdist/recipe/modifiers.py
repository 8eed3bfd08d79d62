"""The modifiers that users write, in YAML or in Python, under llm-compressor 0.14's names and fields.

Every field that llm-compressor can write is accepted. Those that steer only its own execution (offload_device,
batched_quantization, ...) change nothing here. What a field means for the result, and which values cannot be honoured,
is decided in `build` and `schemes`. All mistakes raise RecipeError, never pydantic's ValidationError.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from awqdist.errors import RecipeError
from awqdist.recipe.matching import suggestion


class _Strict(BaseModel):
    """Refuses unknown keys with the nearest valid one, and tells every mistake in one sentence."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise RecipeError(first_mistake(error, type(self).__name__)) from error

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            raise RecipeError(f"{cls.__name__}: expected a mapping of its keys, found {fields!r}")
        for key in fields:
            if key not in cls.model_fields:
                raise RecipeError(f"{cls.__name__} has no key {str(key)!r}; {suggestion(str(key), cls.model_fields)}")
        return fields


def first_mistake(error: ValidationError, where: str) -> str:
    """One sentence on the first of pydantic's findings: what holds the mistake, what was expected, what was found."""
    details = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in details["loc"])
    message = details["msg"].removeprefix("Value error, ").rstrip(".")
    message = re.sub("^Input should be (?=less|greater)", "expected a value ", message)
    message = message.replace("Input should be", "expected")
    if details["type"] == "missing":
        return f"{where} needs the key {place!r}; add it"
    return f"{where}: {f'{place}: ' if place else ''}{message}; found {details['input']!r}"


class AWQMapping(_Strict):
    """`AWQMapping("re:.*input_layernorm", ["re:.*q_proj", ...])`: the balance layers read the smooth layer's output.

    activation_hook_target is accepted as llm-compressor has it and changes nothing: statistics are taken at the input
    of each linear itself.
    """

    smooth_layer: str
    balance_layers: list[str]
    activation_hook_target: str | None = None

    def __init__(self, *positional: Any, **fields: Any) -> None:
        names = ("smooth_layer", "balance_layers", "activation_hook_target")
        if len(positional) > len(names) or set(names[: len(positional)]) & set(fields):
            raise RecipeError(
                f"AWQMapping takes {', '.join(names)}, each once; found {len(positional)} positional and {fields}"
            )
        super().__init__(**dict(zip(names, positional, strict=False)), **fields)

    @field_validator("balance_layers")
    @classmethod
    def _at_least_one(cls, value: list[str]) -> list[str]:
        if not value:
            raise ValueError("expected at least one balance layer")
        return value


class Modifier(_Strict):
    """What all modifiers share. These fields order llm-compressor's own sessions and change nothing here."""

    requires_calibration_data: bool | None = None
    index: int | None = None
    group: str | None = None
    start: float | None = None
    end: float | None = None
    update: float | None = None
    sequential_targets: str | list[str] | None = None


class QuantizationFields(Modifier):
    """Which modules are quantized, and how: `scheme` (with `targets`) or `config_groups`, and `ignore`.

    config_groups: compressed-tensors QuantizationScheme objects, or dicts of their fields, by group name; scheme: a
    preset name such as W4A16_ASYM, or a dict of preset name -> targets. Both are checked by `build_recipe`.
    """

    targets: list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: list[str] = Field(default_factory=list)
    scheme: str | dict[str, list[str]] | None = None
    config_groups: dict[str, Any] | None = None
    kv_cache_scheme: Any = None
    weight_observer: str | None = None
    input_observer: str | None = None
    output_observer: str | None = None
    observer: dict[str, str] | None = None
    bypass_divisibility_checks: bool = False

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else [] if value is None else value

    @field_validator("scheme", mode="before")
    @classmethod
    def _scheme_targets_as_lists(cls, value: Any) -> Any:
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, dict) or not all(isinstance(t, (str, list)) for t in value.values()):
            raise ValueError("expected the name of a preset such as W4A16_ASYM, or a mapping of presets to targets")
        return {name: [targets] if isinstance(targets, str) else targets for name, targets in value.items()}

    def has_scheme(self) -> bool:
        """True where this modifier itself says how weights are stored."""
        return self.scheme is not None or bool(self.config_groups)

    def says_what_to_quantize(self) -> bool:
        """True where any quantization field differs from its default."""
        observers = (
            self.weight_observer,
            self.input_observer,
            self.output_observer,
            self.observer,
            self.kv_cache_scheme,
        )
        others = self.targets != ["Linear"] or bool(self.ignore) or any(o is not None for o in observers)
        return self.has_scheme() or others


class AWQModifier(QuantizationFields):
    """Activation-aware smoothing before rounding.

    mappings: None for the architecture's own, [] for no smoothing; duo_scaling: True, False or "both"; n_grid:
    candidates per mapping; clip (ours): shrink each group's range where that lowers the error; rounding (ours):
    "nearest" or "gptq", None for what the quantization modifier says. bits, symmetric and group_size must agree with
    the scheme; alone, they are the scheme (4, False, 128). As older llm-compressor recipes do, it may carry the
    quantization fields itself.
    """

    mappings: list[AWQMapping] | None = None
    duo_scaling: bool | Literal["both"] = True
    n_grid: int = Field(default=20, ge=1)
    bits: int | None = Field(default=None, ge=2, le=8)
    symmetric: bool | None = None
    group_size: int | None = None
    clip: bool = False
    rounding: Literal["nearest", "gptq"] | None = None
    offload_device: Any = None

    @field_validator("duo_scaling", mode="before")
    @classmethod
    def _a_switch_or_both(cls, value: Any) -> Any:
        if value not in (True, False, "both"):
            raise ValueError('expected true, false or "both"')
        return value

    @field_validator("group_size")
    @classmethod
    def _positive_or_channel(cls, value: int | None) -> int | None:
        if value is not None and value != -1 and value < 1:
            raise ValueError("expected a positive number of input channels, or -1 for one group per row")
        return value


class QuantizationModifier(QuantizationFields):
    """Rounds each weight to the nearest code, unless AWQModifier's `rounding` says otherwise."""


class GPTQModifier(QuantizationModifier):
    """Rounds with GPTQ's error compensation.

    dampening_frac: added to the Gram's diagonal, as a fraction of its mean; actorder: "static" (or its alias "weight")
    or None; block_size: columns per lazy update. Defaults are llm-compressor's. batched_quantization, offload_hessians
    and sequential_update steer only its execution and change nothing here.
    """

    dampening_frac: float | None = Field(default=0.01, ge=0, allow_inf_nan=False)
    actorder: str | None = "static"
    block_size: int = Field(default=128, ge=1)
    batched_quantization: int | str | None = None
    offload_hessians: bool | None = None
    sequential_update: bool | None = None

    @field_validator("actorder", mode="before")
    @classmethod
    def _static_or_none(cls, value: Any) -> str | None:
        name = value.value if isinstance(value, Enum) else value
        if name is None or name is False:
            return None
        if not isinstance(name, str) or name.lower() not in ("static", "weight"):
            raise RecipeError(
                f"{cls.__name__}: actorder {name!r} cannot be honoured (it would need columns stored out of order); "
                "use 'static', 'weight' or null"
            )
        return name.lower()
