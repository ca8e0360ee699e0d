"""Groups of values to codes, scales and zero points on a GPU, and codes of keys to words. Twin: `reference.fit_groups`.

A group is a row of a tile. Rows may have codes of different widths: those of boosted channels.
"""

# Triton is untyped, and the annotations of a kernel are Triton's, not Python's.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from kvferry.kernels import reference, scales

FIT_STEPS = tl.constexpr(reference.FIT_STEPS)
MIN_FOLDED_SCALE = tl.constexpr(scales.MIN_FOLDED_SCALE)
MAX_FOLDED = tl.constexpr(scales.MAX_FOLDED)
MAX_BYTE_SCALE = tl.constexpr(scales.MAX_BYTE_SCALE)
LIMIT = tl.constexpr(reference.LIMIT)
FOLD = tl.constexpr(scales.FOLD)
ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding and subtracting it rounds a small fp32 number to the nearest integer, ties to even."""


@triton.constexpr_function
def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


@triton.jit
def code_widths(ROWS: tl.constexpr, TENSOR: tl.constexpr):
    """What the fit needs to know of codes, fp32 [ROWS] each: the highest one, the first scale over max - min, F, and
    the step of a zero point over S, and the scale whose zero point is 127 steps, over that zero point."""
    TOP: tl.constexpr = (1 << TENSOR.bits) - 1
    return (
        tl.full([ROWS], TOP, tl.float32),
        tl.full([ROWS], TENSOR.first_scale, tl.float32),
        tl.full([ROWS], TENSOR.offset, tl.float32),
        tl.full([ROWS], TENSOR.zero_step, tl.float32),
        tl.full([ROWS], 1.0 / (127.0 * TENSOR.zero_step), tl.float32),
    )


@triton.jit
def boosted_widths(boosted, TENSOR: tl.constexpr, BOOST: tl.constexpr):
    """`code_widths` of rows, some of them boosted."""
    top, first_scale, offset, zero_step, least_scale = code_widths(boosted.shape[0], TENSOR)
    return (
        tl.where(boosted, BOOST.top, top),
        tl.where(boosted, BOOST.first_scale, first_scale),
        tl.where(boosted, BOOST.offset, offset),
        tl.where(boosted, BOOST.zero_step, zero_step),
        tl.where(boosted, 1.0 / (127.0 * BOOST.zero_step), least_scale),
    )


@triton.jit
def nearest_codes(x, scale, zero, top):
    inverse = 1.0 / tl.maximum(scale, MIN_FOLDED_SCALE / FOLD)
    y = (x - zero[:, None]) * inverse[:, None]
    return (tl.minimum(tl.maximum(y, 0.0), top[:, None]) + ROUNDER) - ROUNDER


@triton.jit
def round_scale(scale, zero, least_scale, TENSOR: tl.constexpr):
    """As stored, and as fp32 S. Twin: `scales.round_scale`."""
    folded = scale * FOLD
    if TENSOR.byte_scales:
        needed = tl.abs(zero) * least_scale
        half = tl.minimum(tl.maximum(tl.maximum(folded, needed), MIN_FOLDED_SCALE), MAX_BYTE_SCALE).to(tl.float16)
        bits = half.to(tl.int16, bitcast=True)
        stored = (bits + 63 + ((bits >> 7) & 1)) >> 7
        wide = (stored << 7).to(tl.float16, bitcast=True).to(tl.float32)
        return stored.to(tl.uint8), wide
    else:
        stored = tl.minimum(tl.maximum(folded, MIN_FOLDED_SCALE), MAX_FOLDED).to(tl.float16)
        return stored, stored.to(tl.float32)


@triton.jit
def round_zero(zero, wide_scale, offset, zero_step, TENSOR: tl.constexpr):
    """As stored, and as fp32 zero point. Twin: `scales.round_zero`."""
    if TENSOR.byte_scales:
        step = wide_scale * zero_step
        steps = (tl.minimum(tl.maximum(zero / step, -128.0), 127.0) + ROUNDER) - ROUNDER
        return (steps.to(tl.int32) & 255).to(tl.uint8), steps * step
    else:
        offset = wide_scale * offset
        stored = tl.minimum(tl.maximum(zero - offset, -MAX_FOLDED), MAX_FOLDED).to(tl.float16)
        return stored, stored.to(tl.float32) + offset


@triton.jit
def fit_groups(x, valid, widths, TENSOR: tl.constexpr):
    """Codes (int32 [rows, n]), scale and zero point as stored ([rows]). Twin: `reference.fit_groups`.

    `valid` is [rows, n], or [1, n] where it is the same for all rows, which saves registers; widths: `code_widths`.
    """
    top, first_scale, offset, zero_step, least_scale = widths
    x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
    weight = valid.to(tl.float32)
    members = tl.sum(weight, axis=1)
    count = tl.maximum(members, 1.0)
    lo = tl.min(tl.where(valid, x, float("inf")), axis=1)
    hi = tl.max(tl.where(valid, x, -float("inf")), axis=1)
    lo = tl.where(members > 0, lo, 0.0)
    hi = tl.where(members > 0, hi, 0.0)
    scale = (hi - lo) * first_scale
    zero = (lo + hi) * 0.5 - (top * 0.5) * scale
    mean_x = tl.sum(x * weight, axis=1) / count
    deviation = x - mean_x[:, None]
    deviations = tl.sum(deviation * weight, axis=1)
    for _ in tl.static_range(FIT_STEPS):
        codes = nearest_codes(x, scale, zero, top) * weight
        sum_c = tl.sum(codes, axis=1)
        mean_c = sum_c / count
        spread = count * tl.sum(codes * codes, axis=1) - sum_c * sum_c
        covariance = tl.sum(codes * deviation, axis=1) - mean_c * deviations
        scale = tl.where(spread > 0, covariance * count / tl.maximum(spread, 1.0), scale)
        zero = mean_x - scale * mean_c
    stored_scale, wide = round_scale(scale, zero, least_scale, TENSOR)
    stored_zero, zero = round_zero(mean_x - wide / FOLD * mean_c, wide, offset, zero_step, TENSOR)
    codes = nearest_codes(x, wide / FOLD, zero, top) * weight
    empty = members == 0
    return codes.to(tl.int32), tl.where(empty, 0, stored_scale), tl.where(empty, 0, stored_zero)


@triton.jit
def pack_words(fields, quarter, lane, LANES: tl.constexpr):
    """2-bit fields int32 [4 * LANES, tokens], rows in quarters -> words int16 [LANES / 2, tokens].

    Channel f * D/4 + 2 j + h is in bits 2 f + 8 h of word j.
    """
    TOKENS: tl.constexpr = fields.shape[1]
    fields = fields << (quarter * 2 + lane % 2 * 8)[:, None]
    pairs = tl.sum(tl.reshape(fields, [4, LANES, TOKENS]), axis=0)
    return tl.sum(tl.reshape(pairs, [LANES // 2, 2, TOKENS]), axis=1).to(tl.int16)
