"""The formulas of awqdist/quant/README.md once more, slowly, in numpy, one group at a time. Independent of awqdist's own arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from awqdist.quant.moments import Moments
from awqdist.recipe import WeightScheme

Array = NDArray[Any]
ASYMMETRIC_4 = WeightScheme(num_bits=4, symmetric=False, group_size=16)


def stored_as(values: Any, dtype: torch.dtype) -> Array:
    """`values` rounded to `dtype`, as float32."""
    return torch.tensor(values, dtype=torch.float32).to(dtype).float().numpy()


def group_slices(num_inputs: int, scheme: WeightScheme) -> list[slice]:
    size = scheme.group_size if scheme.group_size > 0 else num_inputs
    return [slice(start, start + size) for start in range(0, num_inputs, size)]


def group_grid(low: Any, high: Any, scheme: WeightScheme, dtype: torch.dtype) -> tuple[Array, Array]:
    """Scale and unsigned zero point of groups with these ranges, in float32 but for the scale, which is stored in `dtype`."""
    limit = np.float32(2**scheme.num_bits - 1)
    low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    with np.errstate(all="ignore"):
        if scheme.symmetric:
            scale = stored_as(np.maximum(-low, high) / (limit / 2), dtype)
            zero = np.full_like(scale, 2 ** (scheme.num_bits - 1))
        else:
            scale = stored_as((high - low) / limit, dtype)
            ratio = -low / scale
            zero = np.where(np.isnan(ratio), np.float32(0), np.rint(np.clip(ratio, 0, limit)))
    return np.where(scale == 0, np.float32(torch.finfo(dtype).eps), scale), zero


def group_codes(group: Array, scale: Any, zero: Any, scheme: WeightScheme) -> Array:
    """Nearest codes of some weights under one scale and zero point."""
    return np.clip(np.rint(group / scale + zero), 0, 2**scheme.num_bits - 1)


def fake_quantized(weight: Array, scheme: WeightScheme, dtype: torch.dtype) -> Array:
    """Weights (O, I) rounded to nearest on the grid of their own ranges, group after group."""
    result = np.empty_like(weight)
    for part in group_slices(weight.shape[1], scheme):
        group = weight[:, part]
        scale, zero = group_grid(group.min(1, keepdims=True), group.max(1, keepdims=True), scheme, dtype)
        result[:, part] = (group_codes(group, scale, zero, scheme) - zero) * scale
    return result


def output_error(rows: Array, difference: Array) -> float:
    """‖X·Dᵀ‖² of rows (T, I) and difference (O, I), token by token, in float64."""
    return float(sum(((difference.astype(np.float64) @ x) ** 2).sum() for x in rows.astype(np.float64)))


def activations(num_tokens: int, num_inputs: int, seed: int = 0, *, mean: float = 0.0, outlier: float = 30.0) -> Tensor:
    """Correlated activations (T, I) float32 with a few strong outlier channels, all around `mean`."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_inputs, num_inputs, generator=generator) * num_inputs**-0.5
    rows = torch.randn(num_tokens, num_inputs, generator=generator) @ (mixing + 0.5 * torch.eye(num_inputs)) + mean
    rows[:, 1::13] *= outlier
    return rows


def random_weight(num_outputs: int, num_inputs: int, seed: int = 0) -> Tensor:
    """Weights (O, I) float32 whose rows and groups differ in size."""
    generator = torch.Generator().manual_seed(1000 + seed)
    weight = torch.randn(num_outputs, num_inputs, generator=generator) * 0.05
    return weight * torch.exp(0.7 * torch.randn(num_outputs, 1, generator=generator))


def statistics_of(chunks: Tensor | Sequence[Tensor]) -> Moments:
    """Statistics of chunks (..., I), told their number of tokens beforehand as a run does."""
    chunks = [chunks] if isinstance(chunks, Tensor) else chunks
    num_inputs = chunks[0].shape[-1]
    statistics = Moments(num_inputs, sum(c.numel() // num_inputs for c in chunks), torch.device("cpu"))
    for chunk in chunks:
        statistics.add(chunk)
    return statistics


def row_errors(moments: Moments, difference: Tensor, *, rough: bool = False) -> Tensor:
    """The output error of every row of difference (O, I): (O,) float64."""
    return moments.form(rough=rough).errors(difference.unsqueeze(0))[0]
