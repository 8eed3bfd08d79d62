"""Experts as transformers' own code computes them: its products with fused parameters, watched or given other weights.

Its eager experts multiply rows by slices of a fused parameter, once for each expert that a token was routed to, or (Llama-4) by the whole
of it, with a row of zeros wherever a token was not. A parameter is recognised by its storage. No model code is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from awqdist.model.experts import FusedParameter

ExpertWatch = Callable[[int, Tensor], None]  # expert, its rows (n, I)
_PRODUCTS = (torch.nn.functional.linear, torch.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__)


class WatchedExperts(TorchFunctionMode):
    """Tells of every product of rows and a slice of a fused parameter. watched: name -> the parameter (E, …), and who is told."""

    def __init__(self, watched: Mapping[str, tuple[Tensor, ExpertWatch]]) -> None:
        super().__init__()
        self._watched = {
            parameter.untyped_storage().data_ptr(): (parameter, watch) for parameter, watch in watched.values()
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            if isinstance(weight, Tensor) and (told := self._watched.get(weight.untyped_storage().data_ptr())):
                self._tell(told[1], told[0], args[0], weight)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _tell(watch: ExpertWatch, parameter: Tensor, rows: Tensor, weight: Tensor) -> None:
        if weight.ndim == parameter.ndim:
            for expert, own in enumerate(rows):  # rows: (E, n, I), of zeros where a token is not routed to the expert
                watch(expert, own[own.any(-1)])
        else:
            watch((weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0), rows)


def run_all_experts(
    layer: nn.Module,
    parameters: Mapping[str, Tensor],
    experts: Sequence[FusedParameter],
    rows: Tensor,
    watch: ExpertWatch,
) -> None:
    """Takes rows (m, H) through every expert of one experts module, and tells what their inner linears read.

    The module's own forward does it, under a routing of every row to every expert.
    """
    module = layer.get_submodule(experts[0].module)
    own = {name.rpartition(".")[2]: parameters[name] for fused in experts for name in fused.names}
    inner = {fused.name: (parameters[fused.name], watch) for fused in experts if fused.is_inner}
    num_experts = len(experts[0].parts)
    routing = torch.arange(num_experts, device=rows.device).expand(rows.shape[0], -1)  # (m, E)
    if takes_rows_by_expert(module):
        arguments: tuple[Tensor, ...] = (rows.repeat(num_experts, 1),)  # (E·m, H)
    else:
        arguments = rows, routing, torch.ones_like(routing, dtype=rows.dtype)
    with WatchedExperts(inner), torch.no_grad():
        functional_call(module, own, arguments)


def takes_rows_by_expert(experts: nn.Module) -> bool:
    """Whether a module of experts is given rows of every expert, one expert after another, instead of rows and their routing."""
    return len(signature(experts.forward).parameters) == 1


@contextmanager
def made_experts(
    experts: Sequence[FusedParameter], make: Callable[[FusedParameter, int], Tensor], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Stand-ins for fused parameters, which take no memory: within it, a linear over an expert's slice uses what `make` returns.

    They are NaN, and so is the output of whatever else computes with them.
    """
    stand_ins: dict[str, Tensor] = {}
    made: dict[int, FusedParameter] = {}
    for fused in experts:
        num_experts, (num_rows, width) = len(fused.parts), fused.part_shape
        numbers = torch.full((num_experts,), torch.nan, device=device)
        stand_ins[fused.name] = numbers.as_strided((num_experts, num_rows * len(fused.parts[0]), width), (1, 0, 0))
        made[numbers.untyped_storage().data_ptr()] = fused
    with _MadeExperts(made, make):
        yield stand_ins


class _MadeExperts(TorchFunctionMode):
    """Gives every linear over a slice of a stand-in the weight (R, I) that is made for that expert. made: by the stand-in's storage."""

    def __init__(self, made: Mapping[int, FusedParameter], make: Callable[[FusedParameter, int], Tensor]) -> None:
        super().__init__()
        self._made, self._make = made, make

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            inputs, weight, *rest = args if len(args) > 1 else (args[0], kwargs.pop("weight"))
            fused = self._made.get(weight.untyped_storage().data_ptr())
            if fused is not None and weight.ndim == 2:
                weight = self._make(fused, weight.storage_offset())
            args = (inputs, weight, *rest)
        return func(*args, **kwargs)
