"""Boosted channels of K on a GPU: which they are, and their highest plane. Twin: `reference.widest_channels`.

Kernels of their own, before and after `triton_quantize`'s: within one, what some threads write to memory would have to
be read by others, which Triton's barrier does not order on HIP.
"""

# Triton is untyped, and the annotations of a kernel are Triton's, not Python's.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from kvferry.kernels.page import NO_CHANNEL as FILLING
from kvferry.kernels.triton_fit import FOLD, LIMIT, nearest_codes, pack_words, power_of_two
from kvferry.kernels.triton_pieces import TILE

NO_CHANNEL = tl.constexpr(FILLING)


@triton.jit(do_not_specialize=["sink_tokens"])
def list_boosted_fwd_kernel(
    key_ptr,  # fp16 [H, T, D]
    bytes_ptr,  # uint8 [H, pages, page_bytes]
    head_stride,
    token_stride,
    sink_tokens,
    PAGES: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Writes the list of one page of one KV head.

    A channel is boosted if fewer than N come before it, in the order of ranges; equal ones in the order of channels.
    """
    page = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    HEAD_DIM: tl.constexpr = SHAPE.head_dim
    TILES: tl.constexpr = SHAPE.tiles
    LANES: tl.constexpr = power_of_two(HEAD_DIM)
    first = page * (TILES * TILE)
    page_ptr = key_ptr + head * head_stride + first * token_stride
    list_ptr = bytes_ptr + (head * PAGES + page) * (SHAPE.units * 16) + SHAPE.boost.listed
    channel = tl.arange(0, LANES)
    exists = channel < HEAD_DIM
    lowest = tl.full([LANES], float("inf"), tl.float32)
    highest = tl.full([LANES], -float("inf"), tl.float32)
    for tile in tl.range(0, TILES):
        token = tile * TILE + tl.arange(0, TILE)
        pointers = page_ptr + token[None, :] * token_stride + channel[:, None]
        x = tl.load(pointers, mask=exists[:, None], other=0.0).to(tl.float32)
        x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
        valid = (first + token >= sink_tokens)[None, :]
        lowest = tl.minimum(lowest, tl.min(tl.where(valid, x, float("inf")), axis=1))
        highest = tl.maximum(highest, tl.max(tl.where(valid, x, -float("inf")), axis=1))
    spread = tl.where(exists, highest - lowest, -float("inf"))
    wider = spread[None, :] > spread[:, None]
    before = wider | ((spread[None, :] == spread[:, None]) & (channel[None, :] < channel[:, None]))
    chosen = (tl.sum(before.to(tl.int32), axis=1) < SHAPE.boost.channels).to(tl.int32)
    rank = tl.cumsum(chosen, axis=0) - chosen
    # Numbers that are not finite could make more than N.
    tl.store(list_ptr + rank, channel.to(tl.uint8), mask=(chosen > 0) & (rank < SHAPE.boost.channels))
    filling = SHAPE.boost.channels + tl.arange(0, 16)
    tl.store(list_ptr + filling, tl.full([16], NO_CHANNEL, tl.uint8), mask=filling < SHAPE.boost.room)


@triton.jit
def is_listed(bytes_ptr, channel, BOOST: tl.constexpr):
    """bool [n] for channels [n], from the list of a page."""
    rank = tl.arange(0, power_of_two(BOOST.channels))
    listed = tl.load(bytes_ptr + BOOST.listed + rank, mask=rank < BOOST.channels, other=NO_CHANNEL).to(tl.int32)
    found = (listed[None, :] == channel[:, None]) & (rank < BOOST.channels)[None, :]
    return tl.sum(found.to(tl.int32), axis=1) > 0


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


@triton.jit(do_not_specialize=["sink_tokens"])
def boost_fwd_kernel(
    key_ptr,  # fp16 [H, T, D]
    bytes_ptr,  # uint8 [H, pages, page_bytes]
    words_ptr,  # int16 view of the same
    halves_ptr,  # fp16 view of the same
    head_stride,
    token_stride,
    sink_tokens,
    PAGES: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """The highest plane of one page of one KV head, from the list and the scales in the page: the codes of
    `fit_groups` once more, bit by bit. Row of the tile: rank in the list, in quarters that are padded to powers of two.
    """
    KEY: tl.constexpr = SHAPE.keys
    BOOST: tl.constexpr = SHAPE.boost
    WORDS: tl.constexpr = BOOST.channels // 8
    QUARTER: tl.constexpr = BOOST.channels // 4
    LANES: tl.constexpr = power_of_two(QUARTER)
    TILES: tl.constexpr = SHAPE.tiles
    SPAN: tl.constexpr = min(KEY.group, TILE)
    SPANS: tl.constexpr = TILES * TILE // SPAN
    page = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    first = page * (TILES * TILE)
    page_ptr = key_ptr + head * head_stride + first * token_stride
    base = (head * PAGES + page) * (SHAPE.units * 8)  # in 16-bit units
    bytes_ptr += 2 * base
    words_ptr += base
    halves_ptr += base
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
        codes = tl.where((first + token >= sink_tokens)[None, :] & exists[:, None], codes, 0)
        begin = token // TILE * (WORDS * TILE) + token % TILE
        tl.store(
            words_ptr + BOOST.codes // 2 + word[:, None] * TILE + begin[None, :],
            pack_words(codes, quarter, lane, LANES),
            mask=(word < WORDS)[:, None],
        )
