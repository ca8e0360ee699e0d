"""Quantize and pack one layer of one block on a GPU. Twin: `reference.quantize_pages`.

Groups are rows of a tile, whichever way they run: keys one a channel (tokens of a group), values some a token (channels
of a group). So both sides share the fit, and differ in their strides and in how codes are put into words.
"""

# Triton is untyped, and the annotations of a kernel are Triton's, not Python's.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvferry.kernels import reference, scales
from kvferry.kernels.page import PageFormat
from kvferry.kernels.spec import PAGE as TILE_TOKENS
from kvferry.kernels.triton_page import PageShape, page_shape
from kvferry.kernels.triton_widest import is_listed, list_channels, power_of_two

TILE = tl.constexpr(TILE_TOKENS)
FIT_STEPS = tl.constexpr(reference.FIT_STEPS)
MIN_FOLDED_SCALE = tl.constexpr(scales.MIN_FOLDED_SCALE)
MAX_FOLDED = tl.constexpr(scales.MAX_FOLDED)
MAX_BYTE_SCALE = tl.constexpr(scales.MAX_BYTE_SCALE)
LIMIT = tl.constexpr(reference.LIMIT)
FOLD = tl.constexpr(scales.FOLD)
ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding and subtracting it rounds a small fp32 number to the nearest integer, ties to even."""
VALUES_PER_WARP = 1024
"""Of a tile; a thread has several fp32 copies of its share."""
MAX_WARPS = 8
"""More leave a thread of CUDA fewer registers than ptxas needs without a spill."""
VALUES = tl.constexpr(VALUES_PER_WARP * MAX_WARPS)
"""The most values of K that are fitted at once."""


@triton.constexpr_function
def fit_lanes(head_dim: int, group: int) -> int:
    """Channels of each quarter that are fitted at once: the rest follow."""
    return min(int(power_of_two(head_dim // 4)), VALUES // 4 // group)


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
def flag_not_finite(flag_ptr, x):
    """fp16 as fp32: the largest number is 65504."""
    if tl.sum(tl.where(tl.abs(x) <= MAX_FOLDED, 0, 1)) > 0:
        tl.store(flag_ptr, 1)


@triton.jit
def store_scales(bytes_ptr, halves_ptr, place, scale, zero, mask, TENSOR: tl.constexpr):
    if TENSOR.byte_scales:
        tl.store(bytes_ptr + TENSOR.scale + place, scale, mask=mask)
        tl.store(bytes_ptr + TENSOR.zero + place, zero, mask=mask)
    else:
        tl.store(halves_ptr + TENSOR.scale // 2 + place, scale, mask=mask)
        tl.store(halves_ptr + TENSOR.zero // 2 + place, zero, mask=mask)


@triton.jit
def stored_scales(bytes_ptr, halves_ptr, place, TENSOR: tl.constexpr, BOOST: tl.constexpr):
    """fp32 S and zero point of boosted channels, bit by bit as `fit_groups` had them."""
    if TENSOR.byte_scales:
        scale = (tl.load(bytes_ptr + TENSOR.scale + place).to(tl.int16) << 7).to(tl.float16, bitcast=True)
        scale = scale.to(tl.float32)
        steps = tl.load(bytes_ptr + TENSOR.zero + place).to(tl.int8, bitcast=True).to(tl.float32)
        return scale, steps * (scale * BOOST.zero_step)
    else:
        scale = tl.load(halves_ptr + TENSOR.scale // 2 + place).to(tl.float32)
        zero = tl.load(halves_ptr + TENSOR.zero // 2 + place).to(tl.float32)
        return scale, zero + scale * BOOST.offset


@triton.jit
def pack_words(fields, quarter, lane, LANES: tl.constexpr):
    """2-bit fields int32 [4 * LANES, tokens], rows in quarters -> words int16 [LANES / 2, tokens].

    Channel f * D/4 + 2 j + h is in bits 2 f + 8 h of word j.
    """
    TOKENS: tl.constexpr = fields.shape[1]
    fields = fields << (quarter * 2 + lane % 2 * 8)[:, None]
    pairs = tl.sum(tl.reshape(fields, [4, LANES, TOKENS]), axis=0)
    return tl.sum(tl.reshape(pairs, [LANES // 2, 2, TOKENS]), axis=1).to(tl.int16)


@triton.jit
def quantize_keys(
    page_ptr,  # fp16 [tokens, D], the page's first token
    token_stride,
    first_token,
    sink_tokens,
    bytes_ptr,
    words_ptr,
    halves_ptr,
    flag_ptr,
    SHAPE: tl.constexpr,
):
    """Row of the tile: channel, of some lanes of every quarter, padded to powers of two; column: token of a group."""
    KEY: tl.constexpr = SHAPE.keys
    BOOST: tl.constexpr = SHAPE.boost
    HEAD_DIM: tl.constexpr = SHAPE.head_dim
    WORDS: tl.constexpr = HEAD_DIM // 8
    QUARTER: tl.constexpr = HEAD_DIM // 4
    GROUP: tl.constexpr = KEY.group
    GROUPS: tl.constexpr = KEY.groups
    PLANES: tl.constexpr = KEY.planes
    LANES: tl.constexpr = fit_lanes(HEAD_DIM, GROUP)
    quarter = tl.arange(0, 4 * LANES) // LANES
    for begin in tl.range(0, QUARTER, LANES):
        lane = begin + tl.arange(0, 4 * LANES) % LANES
        exists = lane < QUARTER
        channel = quarter * QUARTER + lane
        word = begin // 2 + tl.arange(0, LANES // 2)
        if BOOST.channels > 0:
            widths = boosted_widths(is_listed(bytes_ptr, channel, BOOST), KEY, BOOST)
        else:
            widths = code_widths(4 * LANES, KEY)
        for group in tl.static_range(GROUPS):
            token = group * GROUP + tl.arange(0, GROUP)
            pointers = page_ptr + token[None, :] * token_stride + channel[:, None]
            x = tl.load(pointers, mask=exists[:, None], other=0.0).to(tl.float32)
            flag_not_finite(flag_ptr, x)
            valid = (first_token + token >= sink_tokens)[None, :]
            codes, scale, zero = fit_groups(x, valid, widths, KEY)
            store_scales(bytes_ptr, halves_ptr, group * HEAD_DIM + channel, scale, zero, exists, KEY)
            for plane in tl.static_range(PLANES):
                words = pack_words(codes >> (2 * plane) & 3, quarter, lane, LANES)
                place = (token // TILE * PLANES + plane) * (WORDS * TILE) + token % TILE
                tl.store(
                    words_ptr + KEY.codes // 2 + word[:, None] * TILE + place[None, :],
                    words,
                    mask=(word < WORDS)[:, None],
                )


@triton.jit
def boost_keys(
    page_ptr,  # fp16 [tokens, D], the page's first token
    token_stride,
    first_token,
    sink_tokens,
    bytes_ptr,
    words_ptr,
    halves_ptr,
    SHAPE: tl.constexpr,
):
    """The highest plane of the boosted channels, from their list and from what `quantize_keys` stored of them: the same
    codes once more. Row of the tile: rank in the list, in quarters."""
    KEY: tl.constexpr = SHAPE.keys
    BOOST: tl.constexpr = SHAPE.boost
    WORDS: tl.constexpr = BOOST.channels // 8
    QUARTER: tl.constexpr = BOOST.channels // 4
    LANES: tl.constexpr = power_of_two(QUARTER)
    TILES: tl.constexpr = SHAPE.tiles
    SPAN: tl.constexpr = min(KEY.group, TILE)
    SPANS: tl.constexpr = TILES * TILE // SPAN
    quarter = tl.arange(0, 4 * LANES) // LANES
    lane = tl.arange(0, 4 * LANES) % LANES
    exists = lane < QUARTER
    rank = quarter * QUARTER + tl.minimum(lane, QUARTER - 1)
    channel = tl.load(bytes_ptr + BOOST.listed + rank).to(tl.int32)
    word = tl.arange(0, LANES // 2)
    top = tl.full([4 * LANES], BOOST.top, tl.float32)
    for span in tl.range(0, SPANS):
        token = span * SPAN + tl.arange(0, SPAN)
        pointers = page_ptr + token[None, :] * token_stride + channel[:, None]
        x = tl.load(pointers, mask=exists[:, None], other=0.0).to(tl.float32)
        x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
        place = span * SPAN // KEY.group * SHAPE.head_dim + channel
        scale, zero = stored_scales(bytes_ptr, halves_ptr, place, KEY, BOOST)
        codes = nearest_codes(x, scale / FOLD, zero, top).to(tl.int32) >> KEY.bits
        codes = tl.where((first_token + token >= sink_tokens)[None, :] & exists[:, None], codes, 0)
        begin = token // TILE * (WORDS * TILE) + token % TILE
        tl.store(
            words_ptr + BOOST.codes // 2 + word[:, None] * TILE + begin[None, :],
            pack_words(codes, quarter, lane, LANES),
            mask=(word < WORDS)[:, None],
        )


@triton.jit
def quarter_of(codes, field, HEAD_DIM: tl.constexpr, LANES: tl.constexpr):
    """One quarter of codes [tokens, channels], padded to LANES channels."""
    lane = tl.minimum(tl.arange(0, LANES), HEAD_DIM // 4 - 1) + field * (HEAD_DIM // 4)
    return tl.gather(codes, lane[None, :].broadcast_to([codes.shape[0], LANES]), axis=1)


@triton.jit
def quantize_values(
    page_ptr,  # fp16 [tokens, D], the page's first token
    token_stride,
    first_token,
    sink_tokens,
    bytes_ptr,
    halves_ptr,
    flag_ptr,
    SHAPE: tl.constexpr,
):
    """Row of the tile: group of a token; column: channel of the group. Channel f * D/4 + b is in bits 2 f of byte b."""
    VALUE: tl.constexpr = SHAPE.values
    HEAD_DIM: tl.constexpr = SHAPE.head_dim
    QUARTER: tl.constexpr = HEAD_DIM // 4
    LANES: tl.constexpr = power_of_two(QUARTER)
    GROUP: tl.constexpr = VALUE.group
    GROUPS: tl.constexpr = power_of_two(VALUE.groups)
    PLANES: tl.constexpr = VALUE.planes
    TILES: tl.constexpr = SHAPE.tiles
    row = tl.arange(0, TILE * GROUPS)
    group = row % GROUPS
    channel = (group * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    exists = channel < HEAD_DIM
    lane = tl.arange(0, LANES)
    for tile in tl.static_range(TILES):
        token = tile * TILE + row // GROUPS
        x = tl.load(page_ptr + token[:, None] * token_stride + channel, mask=exists, other=0.0).to(tl.float32)
        flag_not_finite(flag_ptr, x)
        valid = (first_token + token >= sink_tokens)[:, None] & exists
        codes, scale, zero = fit_groups(x, valid, code_widths(TILE * GROUPS, VALUE), VALUE)
        place = (tile * VALUE.groups + group) * TILE + row // GROUPS
        store_scales(bytes_ptr, halves_ptr, place, scale, zero, group < VALUE.groups, VALUE)
        for plane in tl.static_range(PLANES):
            fields = codes >> (2 * plane) & 3
            if GROUPS * GROUP == HEAD_DIM and LANES == QUARTER:
                fields = fields << (channel // QUARTER * 2)
                packed = tl.sum(tl.reshape(fields, [TILE, 4, QUARTER]), axis=1)
            else:
                fields = tl.reshape(fields, [TILE, GROUPS * GROUP])
                packed = quarter_of(fields, 0, HEAD_DIM, LANES)
                for f in tl.static_range(1, 4):
                    packed += quarter_of(fields, f, HEAD_DIM, LANES) << (2 * f)
            begin = VALUE.codes + (tile * PLANES + plane) * (TILE * QUARTER)
            tl.store(
                bytes_ptr + begin + tl.arange(0, TILE)[:, None] * QUARTER + lane[None, :],
                packed.to(tl.uint8),
                mask=(lane < QUARTER)[None, :],
            )


@triton.jit
def copy_tokens(
    page_ptr,  # fp16 [tokens, D], the page's first token
    token_stride,
    first_token,
    sink_tokens,
    halves_ptr,  # where they go: [tokens][D]
    flag_ptr,
    SHAPE: tl.constexpr,
):
    """16 bits: fp16 as it is, without the sinks."""
    HEAD_DIM: tl.constexpr = SHAPE.head_dim
    TILES: tl.constexpr = SHAPE.tiles
    channel = tl.arange(0, power_of_two(HEAD_DIM))
    exists = (channel < HEAD_DIM)[None, :]
    for tile in tl.static_range(TILES):
        token = tile * TILE + tl.arange(0, TILE)
        x = tl.load(page_ptr + token[:, None] * token_stride + channel[None, :], mask=exists, other=0.0)
        flag_not_finite(flag_ptr, x.to(tl.float32))
        x = tl.where((first_token + token >= sink_tokens)[:, None], x, 0.0)
        tl.store(halves_ptr + token[:, None] * HEAD_DIM + channel[None, :], x, mask=exists)


@triton.jit(do_not_specialize=["sink_tokens"])
def quantize_fwd_kernel(
    key_ptr,  # fp16 [H, T, D]
    value_ptr,  # fp16 [H, T, D]
    bytes_ptr,  # uint8 [H, pages, page_bytes]
    words_ptr,  # int16 view of the same
    halves_ptr,  # fp16 view of the same
    flag_ptr,  # int32 [1]: set to 1 when K or V is not finite, otherwise left alone
    key_head_stride,
    key_token_stride,
    value_head_stride,
    value_token_stride,
    sink_tokens,
    PAGES: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """One page of one KV head: keys in programs (.., .., 0), values in programs (.., .., 1)."""
    page = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    first = page * (SHAPE.tiles * TILE)
    base = (head * PAGES + page) * (SHAPE.units * 8)  # in 16-bit units
    bytes_ptr += 2 * base
    words_ptr += base
    halves_ptr += base
    key_ptr += head * key_head_stride + first * key_token_stride
    value_ptr += head * value_head_stride + first * value_token_stride
    if tl.program_id(2) == 0:
        if SHAPE.keys.bits == 16:
            copy_tokens(
                key_ptr, key_token_stride, first, sink_tokens, halves_ptr + SHAPE.keys.codes // 2, flag_ptr, SHAPE
            )
        else:
            if SHAPE.boost.channels > 0:
                list_channels(key_ptr, key_token_stride, first, sink_tokens, bytes_ptr, SHAPE)
                tl.debug_barrier()  # what other threads wrote to memory is read next
            quantize_keys(
                key_ptr, key_token_stride, first, sink_tokens, bytes_ptr, words_ptr, halves_ptr, flag_ptr, SHAPE
            )
            if SHAPE.boost.channels > 0:
                tl.debug_barrier()
                boost_keys(key_ptr, key_token_stride, first, sink_tokens, bytes_ptr, words_ptr, halves_ptr, SHAPE)
    else:
        if SHAPE.values.bits == 16:
            copy_tokens(
                value_ptr, value_token_stride, first, sink_tokens, halves_ptr + SHAPE.values.codes // 2, flag_ptr, SHAPE
            )
        else:
            quantize_values(value_ptr, value_token_stride, first, sink_tokens, bytes_ptr, halves_ptr, flag_ptr, SHAPE)


def quantize_options(shape: PageShape) -> dict[str, Any]:
    """Launch options. No fused multiply-add: the reference has none."""
    keys = power_of_two(shape.head_dim) * (shape.keys.group if shape.keys.planes else TILE_TOKENS)
    values = power_of_two(shape.head_dim) * TILE_TOKENS
    warps = min(max(4, max(keys, values) // VALUES_PER_WARP), MAX_WARPS)
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}


def quantize_block(
    keys: Tensor, values: Tensor, page: PageFormat, *, sink_tokens: int, out: Tensor, flag: Tensor
) -> None:
    """Quantizes keys, values fp16 [H, T, D] (channels contiguous) into out uint8 [H, pages, page_bytes], contiguous.

    Never synchronizes. `flag`, int32 [1], becomes 1 when a value is not finite: `out` must not be used then. Several
    calls may share a flag; the caller reads it before it publishes any of them.
    """
    heads, pages, _ = out.shape
    shape = page_shape(page)
    quantize_fwd_kernel[(pages, heads, 2)](
        keys,
        values,
        out,
        out.view(torch.int16),
        out.view(torch.float16),
        flag,
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        sink_tokens,
        PAGES=pages,
        SHAPE=shape,
        **quantize_options(shape),
    )
