"""awqdist: 4-bit AWQ quantization of language models that fit neither one GPU nor one machine's memory.

Names are imported on first use, so that `import awqdist` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationScheme,
        QuantizationStrategy,
        QuantizationType,
    )

    from awqdist.api import oneshot, quantize, register_mappings
    from awqdist.errors import AwqdistError
    from awqdist.eval.evaluate import evaluate
    from awqdist.recipe import AWQMapping, AWQModifier, GPTQModifier, QuantizationModifier, load_recipe
    from awqdist.settings import Placement, RunSettings

__all__ = [
    "AWQMapping",
    "AWQModifier",
    "AwqdistError",
    "GPTQModifier",
    "Placement",
    "QuantizationArgs",
    "QuantizationModifier",
    "QuantizationScheme",
    "QuantizationStrategy",
    "QuantizationType",
    "RunSettings",
    "evaluate",
    "load_recipe",
    "oneshot",
    "quantize",
    "register_mappings",
]

_MODULES = {
    "awqdist.api": ("oneshot", "quantize", "register_mappings"),
    "awqdist.errors": ("AwqdistError",),
    "awqdist.eval.evaluate": ("evaluate",),
    "awqdist.recipe": ("AWQMapping", "AWQModifier", "GPTQModifier", "QuantizationModifier", "load_recipe"),
    "awqdist.settings": ("Placement", "RunSettings"),
    "compressed_tensors.quantization": (
        "QuantizationArgs",
        "QuantizationScheme",
        "QuantizationStrategy",
        "QuantizationType",
    ),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("awqdist")
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
