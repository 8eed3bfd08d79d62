"""Which linears of a layer write to the residual stream: what they compute is added to the layer's output, and nothing else is done to it.

Seen from outside while a layer runs on the meta device: sums, views and products with a number are followed from the linears' outputs on.
A norm, a gate or an attention in between ends the trail.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Identity = tuple[int, int, int]

_SUMS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
_PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
_VIEWS = {
    *(torch.nn.functional.dropout, torch.dropout, Tensor.contiguous, Tensor.to, Tensor.type_as, Tensor.float),
    *(Tensor.view, Tensor.reshape, torch.reshape, Tensor.unsqueeze, Tensor.squeeze, Tensor.clone),
}


class ResidualTrail(TorchFunctionMode):
    """Within it, what is computed of the outputs that `starts` was told of is followed."""

    def __init__(self) -> None:
        super().__init__()
        self._writers: dict[Identity, frozenset[str]] = {}
        self._alive: list[Tensor] = []  # storages stay distinct only while they live

    def starts(self, *paths: str) -> Callable[[nn.Module, Any, Any], None]:
        """A forward hook for a linear, or for a module that sums up the linears of those paths. What gives several tensors, as routers do,
        writes nothing."""
        return lambda module, args, output: self._mark(output, frozenset(paths if isinstance(output, Tensor) else ()))

    def writers(self, output: Tensor) -> frozenset[str]:
        """The linears that `output` is a sum of, among others."""
        return self._writers.get(identity(output), frozenset())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            scaled = func in _PRODUCTS and any(isinstance(value, Number) for value in args[:2])
            followed = args[:2] if func in _SUMS or scaled else args[:1] if func in _VIEWS else ()
            terms = (self.writers(term) for term in followed if isinstance(term, Tensor))
            self._mark(result, frozenset().union(*terms))
        return result

    def _mark(self, tensor: Tensor, paths: frozenset[str]) -> None:
        if paths:
            self._alive.append(tensor)
            self._writers[identity(tensor)] = paths


def identity(tensor: Tensor) -> Identity:
    """Of a tensor by its storage: views of all of it are the same tensor."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.numel()
