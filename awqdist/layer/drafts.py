"""Linears on their way to their codes: an input site after smoothing, and what is to be rounded on a fixed grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awqdist.layer.plan import Linear
from awqdist.quant.gptq import OutputOrder
from awqdist.quant.moments import Moments
from awqdist.recipe import WeightScheme


@dataclass(frozen=True, slots=True)
class SmoothedSite:
    """An input site after smoothing. gram: (I, I) of the input divided by scales (I,), if it is of use; grid_dtype: of the group scales to
    store; correction: (O, I), what its linear makes up for of those before it; outputs: what its linears' errors count by."""

    moments: Moments
    gram: Tensor | None
    scales: Tensor
    num_dead_inputs: int
    grid_dtype: torch.dtype
    correction: Tensor | None = None
    outputs: OutputOrder | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """Stacked linears on a fixed grid, to be rounded. weight: (ΣO, I) float32, smoothed; target: what is to be rounded, the same or
    corrected; weight_scale, zero_point: (ΣO, G)."""

    linears: list[Linear]
    weight: Tensor
    target: Tensor
    scheme: WeightScheme
    site: SmoothedSite
    weight_scale: Tensor
    zero_point: Tensor
    clipped: float
