"""Moving scales from activations into weights without changing the function.

The output of the smooth layer is divided by s, and every consumer multiplies its matching input column by s. All functions are pure.
"""

from __future__ import annotations

import torch
from torch import Tensor


def balance_linear(weight: Tensor, scales: Tensor) -> Tensor:
    """W·diag(s): (O, I) float32 for weight (O, I) and scales (I,)."""
    return weight * scales if weight.dtype == torch.float32 else weight.float().mul_(scales)


def smooth_linear(weight: Tensor, scales: Tensor) -> Tensor:
    """Divides the last len(scales) rows of `weight` (O, I), or of a bias (O,), by `scales`; a fused layer's other rows stay."""
    smoothed = weight.to(torch.float32, copy=True)
    divisor = scales if weight.ndim == 1 else scales.unsqueeze(1)
    smoothed[-scales.shape[0] :] /= divisor
    return smoothed


def smooth_norm(weight: Tensor, scales: Tensor, unit_offset: bool) -> tuple[Tensor, Tensor]:
    """The norm weight to store, and the scales that it really divides by.

    weight: (I,); `unit_offset`: the norm multiplies by (1 + w), so w becomes (1 + w)/s - 1. The stored weight is rounded to the
    checkpoint's dtype and the scales are taken back from the rounded value, so that the pair preserves the function exactly; with
    (1 + w) norms plain rounding could be off by percents where s is large. Channels where that is impossible (a factor that rounds
    to zero) keep scale 1. Returns (I,) in weight's dtype and (I,) float32.
    """
    offset = 1.0 if unit_offset else 0.0
    factor = weight.float() + offset
    stored = (factor / scales - offset).to(weight.dtype)
    effective = factor / (stored.float() + offset)
    sound = torch.isfinite(effective) & (effective > scales / 2) & (effective < scales * 2)
    inert = (factor == 0) & (stored.float() + offset == 0)  # a channel that the norm switches off: any scale will do
    effective = torch.where(inert, scales, torch.where(sound, effective, torch.ones_like(scales)))
    return torch.where(sound | inert, stored, weight), effective


def per_source(scales: Tensor, source: Tensor) -> Tensor:
    """Scales of the smooth layer's outputs (S,) from those of the inputs that read them (I,), tied by `source` (I,)."""
    return torch.ones(int(source.max()) + 1, device=scales.device).index_copy_(0, source, scales)
