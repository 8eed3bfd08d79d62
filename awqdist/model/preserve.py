"""The proof that smoothing keeps a layer's function: run it before and after, compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from awqdist.model.expert_products import made_experts
from awqdist.model.experts import FusedParameter, fuse_experts
from awqdist.model.forward import LayerCall, forward_layer, with_buffers
from awqdist.model.mapping import ResolvedMapping
from awqdist.model.smoothed import SmoothedParameters

TOLERANCE = 1e-4  # relative, float32


def change_of_output(
    layer: nn.Module,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    hidden: Tensor,
    call: LayerCall,
    experts: Sequence[FusedParameter] = (),
) -> float:
    """‖f_after(x) - f_before(x)‖ / ‖f_before(x) - x‖ in float32: the change of what the layer adds to its input.

    before, after: parameters in any dtype, by unfused names; hidden: (B, L, H). Experts are made one at a time
    where their parameter is sliced.
    """
    call = call.cast(hidden.device, torch.float32, hidden.shape[0])
    hidden = hidden.float()
    first, second = (_output(layer, side, hidden, call, experts) for side in (before, after))
    contribution = (first - hidden).norm()
    return float((second - first).norm() / contribution.clamp(min=1e-20))


def _output(
    layer: nn.Module, side: Mapping[str, Tensor], hidden: Tensor, call: LayerCall, experts: Sequence[FusedParameter]
) -> Tensor:
    """(B, L, H) float32. The float32 parameters live no longer than this."""
    made = [fused for fused in experts if fused.is_sliced]
    of_experts = {name for fused in made for name in fused.shapes()}
    parameters = ((name, side[name]) for name in side if name not in of_experts)
    working = {name: p.float() if p.is_floating_point() else p for name, p in parameters}
    working = fuse_experts([fused for fused in experts if fused not in made], working)
    with made_experts(made, partial(_weight_of_expert, side), hidden.device) as stand_ins:
        return forward_layer(layer, with_buffers(layer, {**working, **stand_ins}, hidden.device), hidden, call)


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
    smoothed = SmoothedParameters(parameters)
    generator = torch.Generator().manual_seed(0)
    for mapping in mappings:
        num_inputs = parameters[f"{mapping.balance[0]}.weight"].shape[1]
        source = mapping.source_channels(num_inputs)
        factors = torch.exp2(torch.randint(-6, 7, (int(source.max()) + 1,), generator=generator).float())[source]
        smoothed.apply(mapping, factors.to(hidden.device))
    return change_of_output(layer, parameters, smoothed, hidden, call, experts) < TOLERANCE


def _weight_of_expert(parameters: Mapping[str, Tensor], fused: FusedParameter, expert: int) -> Tensor:
    """An expert's slice (R, I) of a fused parameter, float32."""
    parts = [parameters[f"{path}.weight"].float() for path in fused.parts[expert]]
    return torch.cat(parts) if len(parts) > 1 else parts[0]
