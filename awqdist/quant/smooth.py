"""Moves scales from activations into weights without changing the layer's function; all functions are pure.

The output of the smooth layer is divided by s, and every linear that reads it multiplies its matching input column by s.
"""

from __future__ import annotations

import torch
from torch import Tensor


def balance_linear(weight: Tensor, scales: Tensor) -> Tensor:
    """Returns W·diag(s), (O, I) float32, for weight (O, I), any float dtype, and scales (I,)."""
    return weight * scales if weight.dtype == torch.float32 else weight.float().mul_(scales)


def smooth_linear(weight: Tensor, scales: Tensor) -> Tensor:
    """Returns `weight` (O, I), or a bias (O,), in float32 with its last len(scales) rows divided by `scales`.

    The other rows of a fused linear stay as they are.
    """
    smoothed = weight.to(torch.float32, copy=True)
    divisor = scales if weight.ndim == 1 else scales.unsqueeze(1)
    smoothed[-scales.shape[0] :] /= divisor
    return smoothed


def smooth_norm(weight: Tensor, scales: Tensor, unit_offset: bool) -> tuple[Tensor, Tensor]:
    """Divides a norm weight by `scales` as far as its dtype allows.

    The stored weight is rounded to the checkpoint's dtype, and the scales are computed back from the rounded value, so that the
    pair preserves the function exactly. With (1 + w) norms plain rounding could be off by percents where s is large. Channels where
    that is impossible (a factor that rounds to zero) keep scale 1.

    Args:
        weight: (I,), any float dtype.
        scales: (I,) float32.
        unit_offset: whether the norm multiplies by (1 + w), so that w becomes (1 + w)/s - 1.

    Returns:
        The weight to store, (I,) in its own dtype, and the scales that it divides by, (I,) float32.
    """
    offset = 1.0 if unit_offset else 0.0
    factor = weight.float() + offset
    stored = (factor / scales - offset).to(weight.dtype)
    effective = factor / (stored.float() + offset)
    sound = torch.isfinite(effective) & (effective > scales / 2) & (effective < scales * 2)
    inert = (factor == 0) & (stored.float() + offset == 0)  # a channel that the norm switches off: any scale will do
    effective = torch.where(inert, scales, torch.where(sound, effective, torch.ones_like(scales)))
    return torch.where(sound | inert, stored, weight), effective


def per_source(scales: Tensor, source: Tensor, num_channels: int) -> Tensor:
    """Returns the scales of the smooth layer's outputs (num_channels,) from those of the inputs that read them (I,).

    source: (I,) int64, the output that each input comes from. Outputs that no input reads get scale 1.
    """
    return torch.ones(num_channels, device=scales.device).index_copy_(0, source, scales)
