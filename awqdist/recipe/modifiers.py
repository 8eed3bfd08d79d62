"""The modifiers that users write, in YAML or in Python, under llm-compressor 0.14's names and fields.

Every field that llm-compressor can write is accepted. Those that steer only its own execution (offload_device,
batched_quantization, ...) change nothing here. `build_recipe` decides what a field means for the result and which
values cannot be honoured. All mistakes raise RecipeError, never pydantic's ValidationError.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from awqdist.errors import RecipeError
from awqdist.recipe.recipe import suggestion


def first_mistake(error: ValidationError, where: str) -> str:
    """Returns one sentence on the first finding: where the mistake is, what was expected and what was found."""
    details = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in details["loc"])
    if details["type"] == "missing":
        return f"{where} needs the key {place!r}; add it"
    message = details["msg"].removeprefix("Value error, ").rstrip(".")
    message = re.sub("^Input should be (?=less|greater)", "expected a value ", message)
    message = message.replace("Input should be", "expected")
    return f"{where}: {f'{place}: ' if place else ''}{message}; found {details['input']!r}"


def refuse_unknown_keys(fields: dict[str, Any], model: type[BaseModel], where: str) -> None:
    """Raises RecipeError for the first key that `model` has no field for, with the nearest valid key."""
    for key in fields:
        if key not in model.model_fields:
            raise RecipeError(f"{where} has no key {str(key)!r}; {suggestion(str(key), model.model_fields)}")


class _Strict(BaseModel):
    """Refuses unknown keys, and reports each mistake as a RecipeError of one sentence."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise RecipeError(first_mistake(error, type(self).__name__)) from error

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            raise RecipeError(f"{cls.__name__}: expected a mapping of its keys, found {fields!r}")
        refuse_unknown_keys(fields, cls, cls.__name__)
        return fields


class AWQMapping(_Strict):
    """A smooth layer and the balance layers that read its output, as patterns of module names.

    `activation_hook_target` is accepted and changes nothing: statistics are taken at the input of each linear itself.

    Example:
        >>> AWQMapping("re:.*input_layernorm", ["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"]).smooth_layer
        're:.*input_layernorm'
    """

    smooth_layer: str
    balance_layers: list[str] = Field(min_length=1)
    activation_hook_target: str | None = None

    def __init__(self, *positional: Any, **fields: Any) -> None:
        names = ("smooth_layer", "balance_layers", "activation_hook_target")
        if len(positional) > len(names) or set(names[: len(positional)]) & set(fields):
            raise RecipeError(
                f"AWQMapping takes {', '.join(names)}, each once; found {len(positional)} positional and {fields}"
            )
        super().__init__(**dict(zip(names, positional, strict=False)), **fields)


class Modifier(_Strict):
    """Which modules are quantized, and how: `scheme` (with `targets`) or `config_groups`, and `ignore`.

    `scheme` is the name of a preset such as W4A16_ASYM, or a dict of preset name -> targets. `config_groups` holds
    compressed-tensors' QuantizationScheme objects, or dicts of their fields, by group name. `build_recipe` checks both.
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
    # read and without effect: these order llm-compressor's own sessions
    bypass_divisibility_checks: bool = False
    requires_calibration_data: bool | None = None
    index: int | None = None
    group: str | None = None
    start: float | None = None
    end: float | None = None
    update: float | None = None
    sequential_targets: str | list[str] | None = None

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
        """Returns whether this modifier itself says how weights are stored."""
        return self.scheme is not None or bool(self.config_groups)

    def says_what_to_quantize(self) -> bool:
        """Returns whether any quantization field differs from its default."""
        fields = (self.weight_observer, self.input_observer, self.output_observer, self.observer, self.kv_cache_scheme)
        given = any(field is not None for field in fields)
        return self.has_scheme() or self.targets != ["Linear"] or bool(self.ignore) or given


class AWQModifier(Modifier):
    """Activation-aware smoothing before rounding.

    As in older recipes of llm-compressor, it may carry the quantization fields itself.

    Attributes:
        mappings: None for the mappings of the architecture, [] for no smoothing.
        duo_scaling: Whether scales are made from weights too: True, False or "both".
        n_grid: Candidates per mapping.
        bits: Must agree with the scheme. Without a scheme, bits, symmetric and group_size are the scheme (4, False, 128).
        symmetric: See bits.
        group_size: See bits; -1 for one group per row.
        clip: Whether to shrink each group's range where that lowers the error. llm-compressor has no such key.
        rounding: "nearest", "gptq", or None for what the quantization modifier says. llm-compressor has no such key.
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


class QuantizationModifier(Modifier):
    """Rounds each weight to the nearest code, unless AWQModifier's `rounding` says otherwise."""


class GPTQModifier(QuantizationModifier):
    """Rounds with GPTQ's error compensation. Defaults are those of llm-compressor.

    batched_quantization, offload_hessians and sequential_update are accepted and change nothing here.

    Attributes:
        dampening_frac: Fraction of the mean of the Gram's diagonal that is added to the diagonal.
        actorder: "static" (or its other name, "weight"): columns in order of activation; None: in plain order.
        block_size: Columns per lazy update.
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
