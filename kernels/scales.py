"""How a group's scale and zero point are stored.

Both encodings store the *folded* pair, because the cheapest unpacking of codes on a GPU is the fp16 number u = F + c/4
(one bit operation a plane, no conversion):

    S = 4 * scale        Z = zero_point - F * S        value = S * u + Z = c * scale + zero_point

with F = 1, 5, 85 for codes of 2, 4, 8 bits: a third of 4^planes - 1.

"fp16"  S and Z as fp16.

"8bit"  S as one byte: an fp16 number without its sign and its seven low bits (5 bits of exponent, 3 of mantissa), so
        that `byte << 7` is the number. The zero point as a signed byte b, in steps of 2^bits / 32 scales:
        zero_point = b * S * 2^bits / 128. Both are relative, so that outlier channels and quiet ones fare alike; a
        group too far from zero for its zero point to be stored gets a larger scale. On unit normal data at 2 bits it
        costs 1.5 % of the mean square error at 32 values a group, 1 % at 64.

Codes are chosen after rounding, for the numbers that a reader will see.
"""

from __future__ import annotations

import torch
from torch import Tensor

FOLD = 4.0
"""S over scale."""
MIN_FOLDED_SCALE = 2.0**-14
"""Smallest normal fp16: a constant group keeps a scale that is not zero and not subnormal."""
MAX_FOLDED = 65504.0
MAX_BYTE_SCALE = 57344.0
"""Largest fp16 with three bits of mantissa, less one step: its rounding stays finite."""


def unit_offset(bits: int) -> int:
    """F: what u is for the code 0."""
    return ((1 << bits) - 1) // 3


def zero_step(bits: int) -> float:
    """Step of an 8-bit zero point, over S."""
    return (1 << bits) / 128


def round_scale(scale: Tensor, zero: Tensor, bits: int, encoding: str) -> Tensor:
    """fp32 scale and zero point of a group -> the stored S, uint8 or fp16."""
    folded = scale * FOLD
    if encoding == "fp16":
        return folded.clamp(MIN_FOLDED_SCALE, MAX_FOLDED).half()
    # The least scale whose zero point fits. 127 steps, because the fit moves it once more after this.
    needed = zero.abs() * (1.0 / (127.0 * zero_step(bits)))
    half = torch.maximum(folded, needed).clamp(MIN_FOLDED_SCALE, MAX_BYTE_SCALE).half().view(torch.int16).int()
    return ((half + 63 + ((half >> 7) & 1)) >> 7).to(torch.uint8)  # to nearest, ties to even


def round_zero(zero: Tensor, stored_scale: Tensor, bits: int) -> Tensor:
    """fp32 zero point -> the stored one (fp16 Z, or int8 as uint8), for a scale as stored."""
    if stored_scale.dtype == torch.float16:
        folded = stored_scale.float()
        return (zero - unit_offset(bits) * folded).clamp(-MAX_FOLDED, MAX_FOLDED).half()
    step = widen(stored_scale) * zero_step(bits)
    return (zero / step).round().clamp(-128, 127).to(torch.int8).view(torch.uint8)


def widen(stored_scale: Tensor) -> Tensor:
    """S as fp32."""
    if stored_scale.dtype == torch.float16:
        return stored_scale.float()
    return (stored_scale.to(torch.int16) << 7).view(torch.float16).float()


def unfold(stored_scale: Tensor, stored_zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(S, Z) as stored -> (scale, zero point) fp32: a code c stands for c * scale + zero_point."""
    folded = widen(stored_scale)
    if stored_scale.dtype == torch.float16:
        return folded / FOLD, stored_zero.float() + unit_offset(bits) * folded
    return folded / FOLD, stored_zero.view(torch.int8).float() * (folded * zero_step(bits))
