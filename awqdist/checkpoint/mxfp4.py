"""MXFP4 back to the dtype that the model computes in, exactly: w = q · 2^(s − 127).

Format: https://www.opencomputeproject.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf, as openai/gpt-oss stores it. Every 32
values of a row share a scale of 8 bits, an exponent, of which 255 means NaN. A value q is a sign, two bits of exponent and one of mantissa;
two lie in a byte, the first in the lower half.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_STRIP_BYTES = 1 << 18  # worked on at once: their values stay in the processor's cache


def dequantize_mxfp4(stored: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in `dtype`, (32·n,). stored: (16·n,) uint8, two values in each; scales: (n,) uint8."""
    values = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], device=stored.device)
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], 1)  # (256, 2): lower half first
    result = torch.empty(2 * stored.numel(), dtype=dtype, device=stored.device)
    step = _STRIP_BYTES // (BLOCK // 2)
    for start in range(0, scales.numel(), step):
        factors = _powers(scales[start : start + step]).unsqueeze(1)
        strip = stored[start * BLOCK // 2 : (start + step) * BLOCK // 2]
        wide = pairs.index_select(0, strip.int()).view(-1, BLOCK)  # (blocks, 32)
        result[start * BLOCK : (start + step) * BLOCK] = wide.mul_(factors).flatten()
    return result


def _powers(scales: Tensor) -> Tensor:
    """2^(s − 127) in float32, from its bits; 2^(−127) is subnormal there. scales: (n,) uint8."""
    exponents = scales.int()
    bits = torch.where(exponents == 0, 1 << 22, exponents << 23)
    return torch.where(exponents == 255, torch.nan, bits.view(torch.float32))
