"""The proof that smoothing keeps a layer's function: run it before and after, compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from awqdist.model.conversion import FusedParameter, fuse_experts
from awqdist.model.forward import LayerCall, forward_layer, with_buffers
from awqdist.model.mapping import ResolvedMapping
from awqdist.quant.smooth import balance_linear, per_source, smooth_linear, smooth_norm

TOLERANCE = 1e-4  # relative, float32


Step = Callable[[Tensor], Tensor]


class SmoothedParameters(Mapping[str, Tensor]):
    """The parameters of a layer under the scales of its mappings. Each is made when it is asked for: float32 copies of all of them
    would be twice the layer. parameters: float tensors by their names in the layer."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._steps: dict[str, list[Step]] = {}

    def apply(self, mapping: ResolvedMapping, scales: Tensor) -> Tensor:
        """Applies a mapping on top of those before it. scales: (I,) over the inputs of the balance layers. Returns them as applied."""
        steps, applied = _steps(self, mapping, scales)
        for name, step in steps:
            self._steps.setdefault(name, []).append(step)
        return applied

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._parameters[name]
        for step in self._steps.get(name, ()):
            tensor = step(tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def apply_scales(
    parameters: Mapping[str, Tensor], mapping: ResolvedMapping, scales: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Smoothed copies of the parameters that a mapping touches, by their names in the layer, and the scales as applied.

    parameters: float tensors of the layer; scales: (I,) over the inputs of the balance layers. The norm weight comes back in
    the dtype it had; linears come back in float32.
    """
    changed: dict[str, Tensor] = {}
    steps, applied = _steps(parameters, mapping, scales)
    for name, step in steps:
        changed[name] = step(changed.get(name, parameters[name]))
    return changed, applied


def _steps(
    parameters: Mapping[str, Tensor], mapping: ResolvedMapping, scales: Tensor
) -> tuple[list[tuple[str, Step]], Tensor]:
    """What a mapping does to each parameter that it touches, in order; and the scales as applied."""
    steps: list[tuple[str, Step]] = []
    weight, bias = f"{mapping.smooth}.weight", f"{mapping.smooth}.bias"
    if mapping.norm:
        stored, applied = smooth_norm(parameters[weight], scales, mapping.unit_offset)
        steps.append((weight, lambda _: stored))
        if bias in parameters:
            steps.append((bias, lambda tensor: tensor.float() / applied))
    else:
        applied = scales
        source = mapping.source_channels(scales.shape[0]).to(scales.device)
        outputs = mapping.over_rows(per_source(scales, source))
        steps += [(name, partial(smooth_linear, scales=outputs)) for name in (weight, bias) if name in parameters]
    steps += [(f"{path}.weight", partial(balance_linear, scales=applied)) for path in mapping.balance]
    return steps, applied


def change_of_output(
    layer: nn.Module,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    hidden: Tensor,
    call: LayerCall,
    experts: Sequence[FusedParameter] = (),
) -> float:
    """‖f_after(x) - f_before(x)‖ / ‖f_before(x) - x‖ in float32: the change of what the layer adds to its input.

    before, after: parameters in any dtype, by unfused names; hidden: (B, L, H).
    """
    call = call.cast(hidden.device, torch.float32, hidden.shape[0])
    hidden = hidden.float()
    first, second = (_output(layer, side, hidden, call, experts) for side in (before, after))
    contribution = (first - hidden).norm()
    return float((second - first).norm() / contribution.clamp(min=1e-20))


def _output(
    layer: nn.Module,
    side: Mapping[str, Tensor],
    hidden: Tensor,
    call: LayerCall,
    experts: Sequence[FusedParameter],
) -> Tensor:
    """(B, L, H) float32. The float32 parameters live no longer than this."""
    parameters = {name: p.float() if p.is_floating_point() else p for name, p in side.items()}
    working = with_buffers(layer, fuse_experts(experts, parameters), hidden.device)
    del parameters
    return forward_layer(layer, working, hidden, call)


def preserves_function(
    layer: nn.Module,
    parameters: Mapping[str, Tensor],
    mappings: Sequence[ResolvedMapping],
    hidden: Tensor,
    call: LayerCall,
    experts: Sequence[FusedParameter] = (),
) -> bool:
    """Whether scaling by random factors between 1/64 and 64 leaves the layer's output unchanged.

    The factors are powers of two, which float32 carries without rounding, and so far apart that a clamp on the way shows.
    """
    smoothed = dict(parameters)
    generator = torch.Generator().manual_seed(0)
    for mapping in mappings:
        num_inputs = parameters[f"{mapping.balance[0]}.weight"].shape[1]
        source = mapping.source_channels(num_inputs)
        factors = torch.exp2(torch.randint(-6, 7, (int(source.max()) + 1,), generator=generator).float())[source]
        changed, _ = apply_scales(smoothed, mapping, factors.to(hidden.device))
        smoothed.update(changed)
    return change_of_output(layer, parameters, smoothed, hidden, call, experts) < TOLERANCE
