"""A layer's parameters under the scales of its mappings, each made when it is asked for.

Smoothed linears are float32. Kept, they would take twice the layer's own memory or four times that; with hundreds of experts no more than
a few of them are needed at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import Tensor

from awqdist.model.mapping import ResolvedMapping
from awqdist.quant.smooth import balance_linear, per_source, smooth_linear, smooth_norm

Change = Callable[[Tensor], Tensor]


class SmoothedParameters(Mapping[str, Tensor]):
    """The parameters (any float dtype, by their names in the layer) after the mappings that were applied, in that order.

    Norm weights keep their dtype; linears and biases that were changed come in float32, made anew each time.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._changes: dict[str, list[Change]] = {}

    def apply(self, mapping: ResolvedMapping, scales: Tensor) -> Tensor:
        """Smooths by scales (I,) over the inputs of the balance layers. Returns the scales as applied, which a norm may have to adapt."""
        weight, bias = f"{mapping.smooth}.weight", f"{mapping.smooth}.bias"
        source = mapping.source_channels(scales.shape[0]).to(scales.device)
        outputs = per_source(scales, source, mapping.num_channels(scales.shape[0]))
        if mapping.norm:
            stored, applied = smooth_norm(self[weight], outputs, mapping.unit_offset)
            self._changes[weight] = [lambda _: stored]
            self._change(bias, lambda tensor: tensor.float() / applied)
            scales = applied[source]
        else:
            outputs = mapping.over_rows(outputs)
            self._change(weight, partial(smooth_linear, scales=outputs))
            self._change(bias, partial(smooth_linear, scales=outputs))
        for path in mapping.balance:
            self._change(f"{path}.weight", partial(balance_linear, scales=scales))
        return scales

    def _change(self, name: str, change: Change) -> None:
        if name in self._parameters:
            self._changes.setdefault(name, []).append(change)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._parameters[name]
        for change in self._changes.get(name, ()):
            tensor = change(tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)
