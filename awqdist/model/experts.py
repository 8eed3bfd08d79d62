"""Experts as transformers computes with them, and as they are quantized.

In memory transformers keeps all experts of a layer in 3-D parameters (`mlp.experts.gate_up_proj`). The weight side works on each expert's
linears by their *unfused names*: the module that holds the 3-D parameter, the expert's number, the linear's name on disk
(`mlp.experts.3.gate_proj`). The forward side gets the parameter, made of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from awqdist.checkpoint.experts import ROWS, ExpertLayout


@dataclass(frozen=True, slots=True)
class FusedParameter:
    """A parameter (E, R, I) of E experts, or (E, I, R) by its layout.

    parts: for every expert, the linears whose weights (R / len(parts), I) its slice holds, by unfused names; bias: the name of the
    parameter (E, R) of their biases.
    """

    name: str
    parts: tuple[tuple[str, ...], ...]
    part_shape: tuple[int, int]
    layout: ExpertLayout
    bias: str | None = None

    @property
    def module(self) -> str:
        """Path of the module that holds the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def is_inner(self) -> bool:
        """Whether it reads what is computed within the expert, not the expert's input."""
        return "down" in self.name.rpartition(".")[2]

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters of the model that the linears make up."""
        return (self.name, self.bias) if self.bias else (self.name,)

    @property
    def is_sliced(self) -> bool:
        """Whether an expert's slice is its linears' weights below one another, and all that it is multiplied by."""
        return self.layout == ROWS and self.bias is None

    def within(self, prefix: str) -> FusedParameter:
        """The same by names without `prefix`."""
        parts = tuple(tuple(path.removeprefix(prefix) for path in expert) for expert in self.parts)
        bias = self.bias.removeprefix(prefix) if self.bias else None
        return replace(self, name=self.name.removeprefix(prefix), parts=parts, bias=bias)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parts' weights and biases by unfused names."""
        paths = [path for part in self.parts for path in part]
        biases = {f"{path}.bias": self.part_shape[:1] for path in paths} if self.bias else {}
        return {**{f"{path}.weight": self.part_shape for path in paths}, **biases}

    def fuse(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes weights (O, I) and biases (O,) of the parts out of `parameters` and makes the model's parameters of them, by name."""
        fused = {}
        for name, leaf in zip(self.names, ("weight", "bias"), strict=False):
            fused[name] = self.layout.fuse([[parameters.pop(f"{path}.{leaf}") for path in e] for e in self.parts])
        return fused


def fuse_experts(fused: Sequence[FusedParameter], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a module with fused experts is run with, from parameters by unfused names."""
    result = dict(parameters)
    for parameter in fused:
        result |= parameter.fuse(result)
    return result
