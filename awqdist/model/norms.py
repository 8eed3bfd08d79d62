"""Norms: which modules are norms, what they multiply by, and which comes last."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call


def norms_of(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with a weight per channel that are norms, by their paths in `layer`."""
    for path, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.ndim == 1:
            yield path, module


def final_norm(decoder: nn.Module) -> tuple[str, bool]:
    """Path of the norm behind the decoder's layers, and whether it multiplies by (1 + weight); "" where it has none."""
    norms = [(path, norm) for path, norm in norms_of(decoder) if "." not in path]
    return (norms[-1][0], has_unit_offset(norms[-1][1])) if norms else ("", False)


def has_unit_offset(norm: nn.Module) -> bool:
    """Whether a norm multiplies by (1 + weight), as Gemma's and Qwen3-Next's do: with a weight of zero it still lets something through."""
    zeros = {name: torch.zeros(parameter.shape) for name, parameter in norm.named_parameters()}
    trial = torch.linspace(-1.0, 2.0, zeros["weight"].shape[0]).unsqueeze(0)
    parameters = inspect.signature(norm.forward).parameters.values()
    inputs = [
        trial for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]  # some read a gate too
    with torch.no_grad():
        output: Tensor = functional_call(norm, zeros, tuple(inputs))
    return bool(output.abs().max() > 0)
