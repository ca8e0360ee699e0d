"""Attention of a prefill chunk over packed pages: the prefix is dequantized in registers and shared memory only.

A program takes `ROW_TILE` rows, a row being one query head at one token of the chunk, of the query heads that share a
KV head. It goes through the packed prefix tile by tile, then the fp16 sinks, then the chunk itself, causally; the order
of these depends on a row's own context alone. Twin: `reference.ReferenceKernels.chunk_attention`.

Channels are taken in four quarters, as the fields of words have them: quarter i is channels i D/4 .. (i + 1) D/4 in
their order. Its *lanes* are a power of two; lanes beyond D/4 repeat the last channel, and what they yield is dropped.
"""

# Triton is untyped, and the annotations of a kernel are Triton's, not Python's.
# Nor does it compile (*tuple, item).
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvferry.kernels.packed import PackedPrefix
from kvferry.kernels.triton_boost import (
    DEPTH,
    KEY_ROW,
    boosted_queries,
    boosted_scores,
    load_boost_words,
    no_boosted_queries,
)
from kvferry.kernels.triton_launch import Device, chunk_options
from kvferry.kernels.triton_page import UNIT, page_shape
from kvferry.kernels.triton_pieces import TILE
from kvferry.kernels.triton_score import LOG2E, LOWEST, log2_scores
from kvferry.kernels.triton_unpack import fused_multiply_add, load_scales, unpack_planes

ROW_TILE = tl.constexpr(64)
KEY_TILE = tl.constexpr(32)
SINK_TILE = tl.constexpr(16)


@triton.constexpr_function
def num_lanes(head_dim: int) -> int:
    return max(16, 1 << (head_dim // 4 - 1).bit_length())


@triton.constexpr_function
def is_one_group(quarter: int, head_dim: int, group: int) -> bool:
    """Whether the channels of a quarter are in one value group."""
    size = head_dim // 4
    return quarter * size // group == ((quarter + 1) * size - 1) // group


@triton.jit
def lane_channel(quarter: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The channels of a quarter's lanes."""
    lane = tl.arange(0, num_lanes(HEAD_DIM))
    if num_lanes(HEAD_DIM) > HEAD_DIM // 4:
        lane = tl.minimum(lane, HEAD_DIM // 4 - 1)
    return lane + quarter * (HEAD_DIM // 4)


@triton.jit
def softmax_step(scores, peak, total):
    """Online softmax. Returns weights (fp16), the factor of what was accumulated before, and the new state."""
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    decay = tl.exp2(peak - new_peak)
    weights = tl.exp2(scores - new_peak[:, None])
    total = total * decay + tl.sum(weights, axis=1)
    return weights.to(tl.float16), decay[:, None], new_peak, total


@triton.jit
def attend_plain(
    queries,  # 4 x fp16 [ROW_TILE, lanes]
    key_ptr,  # fp16 [count, D]
    value_ptr,  # fp16 [count, D]
    start,
    count,
    row_first,  # int32 [ROW_TILE]: with a window, a row sees key tokens from here
    row_limit,  # int32 [ROW_TILE]: a row sees key tokens below it
    scale_log2,
    state,  # peak, total, 4 x fp32 [ROW_TILE, lanes]
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Attention over rows start .. start + ROWS of unpacked K and V."""
    peak, total, acc = state
    token = start + tl.arange(0, ROWS)
    exists = token < count
    scores = tl.zeros([ROW_TILE, ROWS], tl.float32)
    for i in tl.static_range(4):
        channel = lane_channel(i, HEAD_DIM)
        key = tl.load(key_ptr + token[None, :] * HEAD_DIM + channel[:, None], mask=exists[None, :], other=0.0)
        scores = tl.dot(queries[i], key, scores)
    visible = exists[None, :] & (token[None, :] < row_limit[:, None])
    if WINDOW > 0:
        visible &= token[None, :] >= row_first[:, None]
    scores = tl.where(visible, log2_scores(scores, scale_log2, SOFTCAP), -float("inf"))
    weights, decay, peak, total = softmax_step(scores, peak, total)
    new_acc = ()
    for i in tl.static_range(4):
        channel = lane_channel(i, HEAD_DIM)
        value = tl.load(value_ptr + token[:, None] * HEAD_DIM + channel[None, :], mask=exists[:, None], other=0.0)
        new_acc = new_acc + (tl.dot(weights, value, acc[i] * decay),)
    return peak, total, new_acc


@triton.jit
def key_quarter(
    planes, bytes_ptr, halves_ptr, quarter: tl.constexpr, HEAD_DIM: tl.constexpr, KEY: tl.constexpr, ASM: tl.constexpr
):
    """fp16 keys [lanes, TILE] of a quarter, from int16 words [lanes / 2, TILE] of every plane."""
    pairs = tl.join(unpack_planes(planes, quarter, False, ASM), unpack_planes(planes, quarter + 4, False, ASM))
    unit = tl.reshape(tl.permute(pairs, (0, 2, 1)), [num_lanes(HEAD_DIM), TILE])
    channel = lane_channel(quarter, HEAD_DIM)
    scale, zero = load_scales(bytes_ptr, halves_ptr, channel, None, KEY, ASM)
    scale, zero = scale[:, None], zero[:, None]
    if KEY.group == KEY_ROW:
        is_later = (tl.arange(0, TILE) >= KEY_ROW)[None, :]
        later_scale, later_zero = load_scales(bytes_ptr, halves_ptr, HEAD_DIM + channel, None, KEY, ASM)
        scale = tl.where(is_later, later_scale[:, None], scale)
        zero = tl.where(is_later, later_zero[:, None], zero)
    return fused_multiply_add(unit, scale, zero, ASM)


@triton.jit
def value_quarter(
    planes, bytes_ptr, halves_ptr, tile,
    quarter: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """fp16 values [TILE, lanes] of a quarter, from int16 words [TILE, lanes / 2] of every plane."""
    pairs = tl.join(unpack_planes(planes, quarter, False, ASM), unpack_planes(planes, quarter + 4, False, ASM))
    unit = tl.reshape(pairs, [TILE, num_lanes(HEAD_DIM)])
    token = tl.arange(0, TILE)
    begin = tile * VALUE.groups
    if is_one_group(quarter, HEAD_DIM, VALUE.group):
        place = (begin + quarter * HEAD_DIM // 4 // VALUE.group) * TILE + token
        scale, zero = load_scales(bytes_ptr, halves_ptr, place, None, VALUE, ASM)
        scale, zero = scale[:, None], zero[:, None]
    else:
        group = begin + lane_channel(quarter, HEAD_DIM) // VALUE.group
        place = group[None, :] * TILE + token[:, None]
        scale, zero = load_scales(bytes_ptr, halves_ptr, place, None, VALUE, ASM)
    return fused_multiply_add(unit, scale, zero, ASM)


@triton.jit
def load_planes(words_ptr, place, HEAD_DIM: tl.constexpr, PLANES: tl.constexpr):
    """A tuple over planes of int16 words."""
    planes = ()
    for plane in tl.static_range(PLANES):
        planes = planes + (tl.load(words_ptr + plane * (HEAD_DIM // 8 * TILE) + place),)
    return planes


@triton.jit(do_not_specialize=["n", "num_blocks", "block_units"])
def chunk_attention_fwd_kernel(
    query_ptr,  # [H * GROUP, n, D]
    key_ptr,  # fp16 [H, n, D]
    value_ptr,  # fp16 [H, n, D]
    bytes_ptr,  # uint8, one layer of the pool: [block, H, BLOCK_TILES / SHAPE.tiles, page_bytes]
    words_ptr,  # int16 view of the same
    halves_ptr,  # fp16 view
    table_ptr,  # int32 [prefix blocks]
    sink_ptr,  # fp16 [H, K|V, SINKS, D], one layer
    out_ptr,  # [H * GROUP, n, D]
    scale_log2,
    n,
    num_blocks,
    block_units,  # from one block to the next, in units of 16 bytes
    GROUP: tl.constexpr,
    SHAPE: tl.constexpr,  # `triton_page.PageShape`
    BLOCK_TILES: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    SOFTCAP: tl.constexpr,  # 0: none
    ASM: tl.constexpr,
):
    HEAD_DIM: tl.constexpr = SHAPE.head_dim
    TILES: tl.constexpr = SHAPE.tiles
    KEY: tl.constexpr = SHAPE.keys
    VALUE: tl.constexpr = SHAPE.values
    BOOST: tl.constexpr = SHAPE.boost
    WORDS: tl.constexpr = HEAD_DIM // 8
    LANES: tl.constexpr = num_lanes(HEAD_DIM)
    BLOCK_PAGES: tl.constexpr = BLOCK_TILES // TILES
    row_tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)

    row = row_tile * ROW_TILE + tl.arange(0, ROW_TILE)
    position = row // GROUP  # in the chunk
    used = position < n
    stored = used[:, None]
    if LANES > HEAD_DIM // 4:
        stored = stored & (tl.arange(0, LANES) < HEAD_DIM // 4)[None, :]
    offset = ((head * GROUP + row % GROUP) * n + position)[:, None] * HEAD_DIM
    queries = ()
    acc = ()
    for i in tl.static_range(4):
        q = tl.load(query_ptr + offset + lane_channel(i, HEAD_DIM)[None, :], mask=stored, other=0.0)
        queries = queries + (q.to(tl.float16),)
        acc = acc + (tl.zeros([ROW_TILE, LANES], tl.float32),)
    if BOOST.channels > 0:
        column = tl.arange(0, DEPTH)
        boosted = no_boosted_queries(ROW_TILE, 1, KEY, BOOST)
    peak = tl.full([ROW_TILE], LOWEST, tl.float32)
    total = tl.zeros([ROW_TILE], tl.float32)

    num_tiles = num_blocks * BLOCK_TILES
    prefix = num_tiles * TILE
    # The first position that a row, and that any row of the program sees. Tiles that are seen by some rows only leave
    # the others as they are, bit by bit.
    row_seen = position
    seen = 0
    if WINDOW > 0:
        row_seen = prefix + position - (WINDOW - 1)
        seen = tl.maximum(prefix + row_tile * ROW_TILE // GROUP - (WINDOW - 1), 0)

    token = tl.arange(0, TILE)
    word = tl.arange(0, LANES // 2)
    if LANES // 2 > WORDS:
        word = tl.minimum(word, WORDS - 1)
    first_tile = seen // TILE
    for tile in tl.range(first_tile, num_tiles):
        page = tile // TILES
        tile_of_page = tile % TILES
        block = tl.load(table_ptr + page // BLOCK_PAGES).to(tl.int64)
        units = block * block_units + (head * BLOCK_PAGES + page % BLOCK_PAGES) * SHAPE.units
        page_bytes = bytes_ptr + units * 16
        page_words = words_ptr + units * 8
        page_halves = halves_ptr + units * 8
        key_codes = page_words + KEY.codes // 2 + tile_of_page * (KEY.planes * WORDS * TILE)
        value_codes = page_words + VALUE.codes // 2 + tile_of_page * (VALUE.planes * WORDS * TILE)
        key_planes = load_planes(key_codes, word[:, None] * TILE + token[None, :], HEAD_DIM, KEY.planes)
        value_planes = load_planes(value_codes, token[:, None] * WORDS + word[None, :], HEAD_DIM, VALUE.planes)
        place = (tile_of_page * TILE + token) * HEAD_DIM  # in fp16 K or V
        if BOOST.channels > 0:
            boost_words = load_boost_words(page_words, tile_of_page, column[:, None], token[None, :], BOOST, ASM)
            if (tile_of_page == 0) | (tile == first_tile):
                boosted = boosted_queries(
                    query_ptr + offset, used[:, None], page_bytes, page_halves, 1, HEAD_DIM, KEY, BOOST, ASM
                )
            scores = boosted_scores(boost_words, boosted, token[None, :], 1, KEY, BOOST, ASM)
        else:
            scores = tl.zeros([ROW_TILE, TILE], tl.float32)
        for i in tl.static_range(4):
            if KEY.planes > 0:
                key = key_quarter(key_planes, page_bytes, page_halves, i, HEAD_DIM, KEY, ASM)
            else:
                channel = lane_channel(i, HEAD_DIM)
                key = tl.load(page_halves + KEY.codes // 2 + place[None, :] + channel[:, None])
            scores = tl.dot(queries[i], key, scores)
        scores = log2_scores(scores, scale_log2, SOFTCAP)
        if SINKS > 0:
            scores = tl.where((token + tile * TILE >= SINKS)[None, :], scores, -float("inf"))
        if WINDOW > 0:
            scores = tl.where((token + tile * TILE)[None, :] >= row_seen[:, None], scores, -float("inf"))
        weights, decay, peak, total = softmax_step(scores, peak, total)
        new_acc = ()
        for i in tl.static_range(4):
            if VALUE.planes > 0:
                value = value_quarter(value_planes, page_bytes, page_halves, tile_of_page, i, HEAD_DIM, VALUE, ASM)
            else:
                channel = lane_channel(i, HEAD_DIM)
                value = tl.load(page_halves + VALUE.codes // 2 + place[:, None] + channel[None, :])
            new_acc = new_acc + (tl.dot(weights, value, acc[i] * decay),)
        acc = new_acc

    state = (peak, total, acc)
    if SINKS > 0:
        every = tl.full([ROW_TILE], 1 << 30, tl.int32)
        keys = sink_ptr + head * (2 * SINKS * HEAD_DIM)
        count = tl.where((num_blocks > 0) & (seen < SINKS), SINKS, 0)
        for start in tl.range(0, count, SINK_TILE):
            state = attend_plain(
                queries, keys, keys + SINKS * HEAD_DIM, start, count, row_seen, every, scale_log2, state,
                HEAD_DIM, SINK_TILE, WINDOW, SOFTCAP,
            )  # fmt: skip
    chunk = head * n * HEAD_DIM
    last = tl.minimum(n, (row_tile * ROW_TILE + ROW_TILE - 1) // GROUP + 1)
    first = 0
    if WINDOW > 0:
        row_seen -= prefix
        first = tl.maximum(seen - prefix, 0) // KEY_TILE * KEY_TILE
    for start in tl.range(first, last, KEY_TILE):
        state = attend_plain(
            queries, key_ptr + chunk, value_ptr + chunk, start, n, row_seen, position + 1, scale_log2, state,
            HEAD_DIM, KEY_TILE, WINDOW, SOFTCAP,
        )  # fmt: skip

    peak, total, acc = state
    for i in tl.static_range(4):
        tl.store(out_ptr + offset + lane_channel(i, HEAD_DIM)[None, :], acc[i] / total[:, None], mask=stored)


def chunk_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix: PackedPrefix,
    *,
    layer: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    device: Device,
) -> Tensor:
    """`PackedKernels.chunk_attention`. Never synchronizes."""
    heads, n, _ = keys.shape
    group = query.shape[0] // heads
    query, keys, values = query.contiguous(), keys.contiguous(), values.contiguous()
    out = torch.empty_like(query)
    pool = prefix.layout.layer_pages(prefix.pool, layer)
    shape = page_shape(prefix.layout.layers[layer].page)
    chunk_attention_fwd_kernel[(triton.cdiv(group * n, ROW_TILE.value), heads)](
        query,
        keys,
        values,
        pool,
        pool.view(torch.int16),
        pool.view(torch.float16),
        prefix.table,
        prefix.sinks[layer],
        out,
        scale * LOG2E,
        n,
        prefix.table.numel(),
        pool.stride(0) // UNIT,
        GROUP=group,
        SHAPE=shape,
        BLOCK_TILES=prefix.layout.block_size // TILE.value,
        SINKS=prefix.sinks.shape[-2],
        WINDOW=window or 0,
        SOFTCAP=softcap or 0.0,
        ASM=device.asm,
        **chunk_options(device, 4 * num_lanes(shape.head_dim)),
    )
    return out
