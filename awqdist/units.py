"""Writes bytes, seconds and numbers as people read them, and reads them back. Imports nothing of awqdist."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

MISSING = "–"

_BYTES = {"": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for unit, base in (("B", 1000), ("IB", 1024))
}
# `layers.3.mlp` and `layer 3`, but neither `1.5` nor the last part of `mlp.0`, which names a linear of its own.
_INDEX = re.compile(r"(?<=[A-Za-z_]\.)\d+(?=\.[A-Za-z_])|(?<=\blayer )\d+")


def parse_bytes(text: str) -> int:
    """Returns the number of bytes in "1.5GB", "900MiB" or "1500000000".

    Raises:
        ValueError: The text is no amount of memory.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)?", text.strip().upper())
    if found is None:
        raise ValueError(f"{text!r} is no amount of memory; give one such as 1.5GB, 900MiB or 1500000000")
    return int(float(found[1]) * _BYTES[found[2] or ""])


def show_bytes(num_bytes: float) -> str:
    """Returns `1.5 GiB`, in the largest unit that leaves at least 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def show_seconds(value: float | None) -> str:
    """Returns `9.99 s`, `59.9 s`, `2 min 5 s` or `3 h 07 min`; a dash where the time is unknown."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value < 9.995:
        return f"{value:.2f} s"
    if value < 59.95:
        return f"{value:.1f} s"
    if value < 3600:
        return f"{int(value // 60)} min {int(value % 60)} s"
    return f"{int(value // 3600)} h {int(value % 3600 // 60):02d} min"


def show_number(value: float | None) -> str:
    """Returns the number with three digits; a dash where it is unknown."""
    return MISSING if value is None else f"{value:.3g}"


def show_percent(share: float | None) -> str:
    """Returns a share of 0 to 1 as `25.0 %`; a dash where it is unknown."""
    return MISSING if share is None else f"{100 * share:.1f} %"


def show_layers(layers: Iterable[int]) -> str:
    """Returns layer numbers as ranges: `0-2, 5`."""
    ranges: list[list[int]] = []
    for layer in sorted(layers):
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def pattern_of(text: str) -> str:
    """Returns a name, or a sentence with names in it, with `*` in place of the indices of layers and experts."""
    return _INDEX.sub("*", text)


def strict_json(value: Any) -> str:
    """Returns JSON that every parser reads: numbers that are not finite become null."""
    return json.dumps(_without_nonfinite(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(item) for item in value]
    return value
