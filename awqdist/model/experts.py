"""Represents experts as transformers computes with them, and watches or replaces its products with their weights.

In memory transformers keeps all experts of a layer in 3-D parameters (`mlp.experts.gate_up_proj`). The weight side works on each expert's
linears by their *unfused names*: the module that holds the 3-D parameter, the expert's number, the linear's name on disk
(`mlp.experts.3.gate_proj`). The forward side gets the parameter, made of them.

transformers' eager experts multiply rows by slices of a fused parameter, once for each expert that a token was routed to, or (Llama-4) by
the whole of it, with a row of zeros wherever a token was not. A parameter is recognised by its storage. No model code is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from awqdist.checkpoint.experts import ROWS, ExpertLayout

ExpertWatch = Callable[[int, Tensor], None]  # expert, its rows (n, I)
_PRODUCTS = (torch.nn.functional.linear, torch.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__)


@dataclass(frozen=True, slots=True)
class FusedParameter:
    """A parameter (E, R, I) of E experts, or (E, I, R) by its layout."""

    name: str
    parts: tuple[tuple[str, ...], ...]  # for every expert the linears whose weights its slice holds, by unfused names
    part_shape: tuple[int, int]  # the shape (O, I) of each of these weights
    layout: ExpertLayout
    bias: str | None = None  # the name of the parameter (E, R) of their biases

    @property
    def module(self) -> str:
        """Returns the path of the module that holds the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def is_inner(self) -> bool:
        """Returns whether it reads what is computed within the expert, not the expert's input."""
        return "down" in self.name.rpartition(".")[2]

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names of the model's parameters that the linears make up."""
        return (self.name, self.bias) if self.bias else (self.name,)

    @property
    def is_sliced(self) -> bool:
        """Returns whether an expert's slice is its linears' weights below one another, without biases."""
        return self.layout == ROWS and self.bias is None

    def within(self, prefix: str) -> FusedParameter:
        """Returns the same parameter by names without `prefix`."""
        parts = tuple(tuple(path.removeprefix(prefix) for path in expert) for expert in self.parts)
        bias = self.bias.removeprefix(prefix) if self.bias else None
        return replace(self, name=self.name.removeprefix(prefix), parts=parts, bias=bias)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the parts' weights and biases by unfused names."""
        paths = [path for part in self.parts for path in part]
        biases = {f"{path}.bias": self.part_shape[:1] for path in paths} if self.bias else {}
        return {**{f"{path}.weight": self.part_shape for path in paths}, **biases}

    def fuse(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes the parts' weights (O, I) and biases (O,) out of `parameters`; returns the model's parameters made of them."""
        fused = {}
        for name, leaf in zip(self.names, ("weight", "bias"), strict=False):
            fused[name] = self.layout.fuse([[parameters.pop(f"{path}.{leaf}") for path in e] for e in self.parts])
        return fused


def fuse_experts(fused: Sequence[FusedParameter], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns what a module with fused experts is run with, from parameters by unfused names."""
    result = dict(parameters)
    for parameter in fused:
        result |= parameter.fuse(result)
    return result


class WatchedExperts(TorchFunctionMode):
    """Passes the rows of every product with a slice of a fused parameter to a watch.

    watched: name -> the parameter (E, …) and its watch.
    """

    def __init__(self, watched: Mapping[str, tuple[Tensor, ExpertWatch]]) -> None:
        super().__init__()
        self._watched = {_storage(parameter): (parameter, watch) for parameter, watch in watched.values()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            if isinstance(weight, Tensor) and (told := self._watched.get(_storage(weight))):
                parameter, watch = told
                if weight.ndim == parameter.ndim:
                    for expert, own in enumerate(args[0]):  # (n, I), zeros where a token is not routed to the expert
                        watch(expert, own[own.any(-1)])
                else:
                    watch((weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0), args[0])
        return func(*args, **(kwargs or {}))


def run_all_experts(
    layer: nn.Module,
    parameters: Mapping[str, Tensor],
    experts: Sequence[FusedParameter],
    rows: Tensor,
    watch: ExpertWatch,
) -> None:
    """Runs rows through every expert of one module, by its own forward under a routing of every row to every expert.

    Args:
        layer: the decoder layer that holds the module.
        parameters: by names in the layer, experts fused.
        experts: the fused parameters of the module.
        rows: (m, H).
        watch: is given what the experts' inner linears read.
    """
    module = layer.get_submodule(experts[0].module)
    own = {name.rpartition(".")[2]: parameters[name] for fused in experts for name in fused.names}
    inner = {fused.name: (parameters[fused.name], watch) for fused in experts if fused.is_inner}
    num_experts = len(experts[0].parts)
    routing = torch.arange(num_experts, device=rows.device).expand(rows.shape[0], -1)  # (m, E)
    if (
        len(signature(module.forward).parameters) == 1
    ):  # it is given the rows of one expert after another, without routing
        arguments: tuple[Tensor, ...] = (rows.repeat(num_experts, 1),)  # (E·m, H)
    else:
        arguments = rows, routing, torch.ones_like(routing, dtype=rows.dtype)
    with WatchedExperts(inner), torch.no_grad():
        functional_call(module, own, arguments)


@contextmanager
def made_experts(
    experts: Sequence[FusedParameter], make: Callable[[FusedParameter, int], Tensor], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Yields stand-ins for fused parameters, by name, which take no memory; each expert's weight is made when it is used.

    They are NaN, and so is the output of whatever computes with them but a linear over an expert's slice.

    Args:
        experts: the fused parameters, all of them sliced.
        make: returns the slice (R, I) of an expert.
        device: of the stand-ins.
    """
    stand_ins: dict[str, Tensor] = {}
    made: dict[int, FusedParameter] = {}
    for fused in experts:
        num_experts, (num_rows, width) = len(fused.parts), fused.part_shape
        numbers = torch.full((num_experts,), torch.nan, device=device)
        stand_ins[fused.name] = numbers.as_strided((num_experts, num_rows * len(fused.parts[0]), width), (1, 0, 0))
        made[_storage(numbers)] = fused
    with _MadeExperts(made, make):
        yield stand_ins


class _MadeExperts(TorchFunctionMode):
    """Gives every linear over a slice of a stand-in the weight (R, I) that is made for that expert. made: by storage."""

    def __init__(self, made: Mapping[int, FusedParameter], make: Callable[[FusedParameter, int], Tensor]) -> None:
        super().__init__()
        self._made, self._make = made, make

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            inputs, weight, *rest = args if len(args) > 1 else (args[0], kwargs.pop("weight"))
            fused = self._made.get(_storage(weight))
            if fused is not None and weight.ndim == 2:
                weight = self._make(fused, weight.storage_offset())
            args = (inputs, weight, *rest)
        return func(*args, **kwargs)


def _storage(tensor: Tensor) -> int:
    """Returns a number that all views of one storage share while it lives; tensors without data have one, too."""
    return int(tensor.untyped_storage()._cdata)
