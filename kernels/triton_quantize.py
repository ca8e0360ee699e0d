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

from kvferry.kernels.page import PageFormat
from kvferry.kernels.spec import PAGE as TILE_TOKENS
from kvferry.kernels.triton_boosted_keys import boost_fwd_kernel, is_listed, list_boosted_fwd_kernel
from kvferry.kernels.triton_fit import MAX_FOLDED, boosted_widths, code_widths, fit_groups, pack_words, power_of_two
from kvferry.kernels.triton_page import PageShape, page_shape

TILE = tl.constexpr(TILE_TOKENS)
VALUES_PER_WARP = 1024
"""Of a tile; a thread has several fp32 copies of its share."""
MAX_WARPS = 8
"""More leave a thread of CUDA fewer registers than ptxas needs without a spill."""
VALUES = tl.constexpr(VALUES_PER_WARP * MAX_WARPS)
"""The most values of K that are fitted at once."""


@triton.constexpr_function
def fit_lanes(head_dim: int, group: int) -> int:
    """Channels of each quarter that are fitted at once: the rest follow."""
    return int(min(power_of_two(head_dim // 4), VALUES // 4 // group))


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
    """One page of one KV head: keys in programs (.., .., 0), values in programs (.., .., 1). Which channels are boosted
    must already be in the page; their highest plane is left to `boost_fwd_kernel`."""
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
            quantize_keys(
                key_ptr, key_token_stride, first, sink_tokens, bytes_ptr, words_ptr, halves_ptr, flag_ptr, SHAPE
            )
    else:
        if SHAPE.values.bits == 16:
            copy_tokens(
                value_ptr, value_token_stride, first, sink_tokens, halves_ptr + SHAPE.values.codes // 2, flag_ptr, SHAPE
            )
        else:
            quantize_values(value_ptr, value_token_stride, first, sink_tokens, bytes_ptr, halves_ptr, flag_ptr, SHAPE)


BOOST_OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
"""Of the kernels for boosted channels."""


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
    words, halves = out.view(torch.int16), out.view(torch.float16)
    strides = keys.stride(0), keys.stride(1)
    if page.boosted:
        list_boosted_fwd_kernel[(pages, heads)](
            keys, out, *strides, sink_tokens, PAGES=pages, SHAPE=shape, **BOOST_OPTIONS
        )
    quantize_fwd_kernel[(pages, heads, 2)](
        keys,
        values,
        out,
        words,
        halves,
        flag,
        *strides,
        values.stride(0),
        values.stride(1),
        sink_tokens,
        PAGES=pages,
        SHAPE=shape,
        **quantize_options(shape),
    )
    if page.boosted:
        boost_fwd_kernel[(pages, heads)](
            keys, out, words, halves, *strides, sink_tokens, PAGES=pages, SHAPE=shape, **BOOST_OPTIONS
        )
