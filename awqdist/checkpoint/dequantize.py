"""FP8 weights and their scales back to the dtype that the model computes in: w = (q · s), in float32, rounded once.

Layouts, all of them one value of s for every block of q:
- blocks, usually of 128×128: DeepSeek-V3 (https://huggingface.co/deepseek-ai/DeepSeek-V3, README_WEIGHTS.md and inference/kernel.py,
  weight_dequant), Qwen3-FP8, compressed-tensors' strategy "block". The last blocks of a row or column may be cut off by the shape.
- per channel, a block of 1×I: compressed-tensors' strategy "channel", FBGEMM's FP8.
- per tensor, a single block.

The name `weight_scale_inv` notwithstanding, the scales are factors of the stored values, not divisors.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

_STRIP_ELEMENTS = 1 << 18  # worked on at once: they stay in the processor's cache


def block_of(
    shape: tuple[int, ...], scale_shape: tuple[int, ...], declared: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Rows and columns of a weight that share a scale; None if scales of that shape do not fit.

    shape: (..., O, I); declared: the block that the checkpoint's configuration gives, if any.
    """
    if len(shape) < 2:
        return None
    *leading, rows, columns = shape
    if prod(scale_shape) == 1:
        return max(rows, 1), max(columns, 1)
    if declared and list(scale_shape) == [*leading, -(-rows // declared[0]), -(-columns // declared[1])]:
        return declared
    if not declared and list(scale_shape) in ([*leading, rows, 1], [*leading, rows]):
        return 1, max(columns, 1)
    return None


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, shape (..., O, I). weight: (..., O, I) float8; scale: a value for each block, of any floating dtype."""
    rows, columns = weight.shape[-2:]
    flat = weight.reshape(prod(weight.shape[:-2]), rows, columns)  # (N, O, I)
    factors = scale.float().reshape(
        1 if scale.numel() == 1 else len(flat), -(-rows // block[0]), -(-columns // block[1])
    )
    factors = factors.expand(len(flat), -1, -1)  # (N, O / block, I / block)
    result = torch.empty(flat.shape, dtype=dtype, device=weight.device)
    step = max(1, _STRIP_ELEMENTS // max(columns, 1))
    for matrix, values, target in zip(flat, factors, result, strict=True):
        for start in range(0, rows, step):
            strip = slice(start, min(start + step, rows))
            row_blocks = torch.arange(strip.start, strip.stop, device=scale.device) // block[0]
            wide = values[row_blocks].repeat_interleave(block[1], dim=1)[:, :columns]  # (strip, I)
            target[strip] = _widened(matrix[strip]).mul_(wide)
    return result.reshape(weight.shape)


def _widened(stored: Tensor) -> Tensor:
    """(n, I) float8 as float32, exactly.

    An e4m3 is a float16 whose exponent lacks a bit: moved into its place, its bits are the value / 256, subnormal ones included. Only its
    NaN, of all ones, is none there. torch's own conversion takes about three times as long.
    """
    if stored.dtype != torch.float8_e4m3fn:
        return stored.float()
    bits = stored.view(torch.int8).to(torch.int16)  # with the sign in the highest bit
    magnitude = bits.bitwise_left_shift(7).bitwise_and_(0x3FFF)
    is_nan = magnitude == 0x3F80
    halves = magnitude.bitwise_or_(bits.bitwise_and_(-0x8000)).view(torch.float16)
    return halves.float().mul_(256).masked_fill_(is_nan, torch.nan)
