"""The proof that smoothing keeps a layer's function: run it before and after, compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from awqdist.model.experts import FusedParameter, fuse_experts
from awqdist.model.forward import LayerCall, forward_layer, with_buffers
from awqdist.model.mapping import ResolvedMapping
from awqdist.quant.smooth import balance_linear, per_source, smooth_linear, smooth_norm

TOLERANCE = 1e-4  # relative, float32


def apply_scales(
    parameters: Mapping[str, Tensor], mapping: ResolvedMapping, scales: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Smoothed copies of the parameters that a mapping touches, by their names in the layer, and the scales as applied.

    parameters: float tensors of the layer; scales: (I,) over the inputs of the balance layers. The norm weight comes back in
    the dtype it had; linears come back in float32.
    """
    changed: dict[str, Tensor] = {}
    weight, bias = f"{mapping.smooth}.weight", f"{mapping.smooth}.bias"
    source = mapping.source_channels(scales.shape[0]).to(scales.device)
    if mapping.norm:
        changed[weight], applied = smooth_norm(parameters[weight], per_source(scales, source), mapping.unit_offset)
        if bias in parameters:
            changed[bias] = parameters[bias].float() / applied
        scales = applied[source]
    else:
        outputs = mapping.over_rows(per_source(scales, source))
        changed[weight] = smooth_linear(parameters[weight], outputs)
        if bias in parameters:
            changed[bias] = smooth_linear(parameters[bias], outputs)
    for path in mapping.balance:
        name = f"{path}.weight"
        changed[name] = balance_linear(changed.get(name, parameters[name]), scales)
    return changed, scales


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
    outputs = []
    for side in (before, after):
        parameters = {name: p.float() if p.is_floating_point() else p for name, p in side.items()}
        working = with_buffers(layer, fuse_experts(experts, parameters), hidden.device)
        outputs.append(forward_layer(layer, working, hidden, call))
    contribution = (outputs[0] - hidden).norm()
    return float((outputs[1] - outputs[0]).norm() / contribution.clamp(min=1e-20))


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
