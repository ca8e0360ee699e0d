"""Decode attention over packed pages: the kernel that reads K and V of a context.

The product is transposed, S^T = K q^T and O^T = V^T P^T: words are a tensor-core operand before they are unpacked
(unpacked values need not pass through shared memory), and query heads sit on the narrow side of the instruction.

A dot is 16 deep, and a *step* is one dot: 16 channels. How a step's columns stand for channels depends on the page:

- Words, D > 64: a step is one field of 16 words; 128 channels have 16 words, which is 8 steps. More words are further
  *parts* of 16; where D/8 is no multiple of 16, columns beyond the last word repeat others, and what they yield is
  dropped: their query is 0 and their values are not stored.
- Words, D <= 64: 64 channels have 8 words, that is 16 bytes, taken in 4 steps, one a field of a byte: word j stands in
  columns j and j + 8, once for either byte. There the select of a key scale keeps the compiler from unpacking keys in
  place: they do pass through shared memory.
- fp16: 16 channels in their order.

What boosted channels add to the scores is in `triton_boost.py`.
"""

# Triton is untyped, and the annotations of a kernel are Triton's, not Python's.
# Nor does it compile (*tuple, item).
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from kvferry.kernels.triton_boost import (
    DEPTH,
    KEY_ROW,
    boosted_queries,
    boosted_scores,
    load_boost_words,
    no_boosted_queries,
)
from kvferry.kernels.triton_pieces import TILE, first_seen, skipped_tiles, tiles_per_piece
from kvferry.kernels.triton_score import LOWEST, log2_scores
from kvferry.kernels.triton_unpack import (
    byte_scale,
    byte_zero,
    fused_multiply_add,
    half_of_pair,
    load_scales,
    load_words,
    selected_half_of_pair,
    unpack_planes,
)


@triton.constexpr_function
def is_split(head_dim: int) -> bool:
    """Whether a step takes fields of bytes, not of words."""
    return head_dim // 4 <= 16


@triton.constexpr_function
def num_parts(head_dim: int) -> int:
    return -(-head_dim // 8 // 16)


@triton.constexpr_function
def num_steps(head_dim: int, planes: int) -> int:
    if planes == 0:
        return head_dim // 16
    return 4 if is_split(head_dim) else 8 * num_parts(head_dim)


@triton.constexpr_function
def shares_shift(step: int) -> bool:
    """Whether a step's field is unpacked to u + 3 F, because it then shares a shift with the next field."""
    return step % 2 == 1 and step % 8 != 7


@triton.constexpr_function
def step_groups(step: int, head_dim: int, group: int) -> tuple[int, int]:
    """First and last value group of a step's channels."""
    quarter, words = head_dim // 4, head_dim // 8
    field, part = step % 8, step // 8
    first = 0 if is_split(head_dim) else 2 * 16 * part
    last = min(first + 2 * 16, 2 * words) - 1
    begin = field % 4 * quarter
    return (begin + first) // group, (begin + last) // group


@triton.constexpr_function
def first_group(step: int, head_dim: int, group: int) -> int:
    first, _ = step_groups(step, head_dim, group)
    return int(first)


@triton.constexpr_function
def last_group(step: int, head_dim: int, group: int) -> int:
    _, last = step_groups(step, head_dim, group)
    return int(last)


@triton.constexpr_function
def has_even_groups(head_dim: int, group: int, planes: int) -> bool:
    """Whether the channels of every step are in one value group."""
    groups = [step_groups(step, head_dim, group) for step in range(num_steps(head_dim, planes))]
    return all(first == last for first, last in groups)


@triton.constexpr_function
def sum_rows(groups: int) -> int:
    """Scales and zero points of a token's groups, padded to the rows of a dot."""
    return max(16, 1 << (2 * groups - 1).bit_length())


@triton.jit
def word_of(column, part: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The word that stands in a column."""
    return (column + part * DEPTH) % (HEAD_DIM // 8)


@triton.jit
def byte_of(column, HEAD_DIM: tl.constexpr):
    """Which byte of its word a column stands for, where steps take fields of bytes; else 0."""
    return column // (HEAD_DIM // 8) if is_split(HEAD_DIM) else column // DEPTH


@triton.jit
def channel_of(column, step: tl.constexpr, HEAD_DIM: tl.constexpr, PLANES: tl.constexpr):
    """The channels of a step, and whether they exist."""
    WORDS: tl.constexpr = HEAD_DIM // 8
    QUARTER: tl.constexpr = HEAD_DIM // 4
    if PLANES == 0:
        return column + step * DEPTH, column >= 0
    elif is_split(HEAD_DIM):
        return 2 * word_of(column, 0, HEAD_DIM) + byte_of(column, HEAD_DIM) + step * QUARTER, column < 2 * WORDS
    else:
        word = word_of(column, step // 8, HEAD_DIM)
        return 2 * word + step % 4 * QUARTER + step % 8 // 4, column + step // 8 * DEPTH < WORDS


@triton.jit
def load_queries(query_row, column, used, HEAD_DIM: tl.constexpr, PLANES: tl.constexpr):
    """A tuple of fp16 [DEPTH, PADDED], one a step."""
    STEPS: tl.constexpr = num_steps(HEAD_DIM, PLANES)
    queries = ()
    for step in tl.static_range(STEPS):
        channel, exists = channel_of(column, step, HEAD_DIM, PLANES)
        q = tl.load(query_row + channel[:, None], mask=used[None, :] & exists[:, None], other=0.0)
        queries = queries + (q.to(tl.float16),)
    return queries


@triton.jit
def load_key_words(words_ptr, column, token, HEAD_DIM: tl.constexpr, PLANES: tl.constexpr, ASM: tl.constexpr):
    """A tuple over parts of tuples over planes of int16 [TILE, DEPTH], from the tile's codes."""
    WORDS: tl.constexpr = HEAD_DIM // 8
    PARTS: tl.constexpr = num_parts(HEAD_DIM)
    high = (byte_of(column, HEAD_DIM) > 0)[None, :]
    parts = ()
    for part in tl.static_range(PARTS):
        pointers = words_ptr + word_of(column, part, HEAD_DIM)[None, :] * TILE + token[:, None]
        planes = ()
        for plane in tl.static_range(PLANES):
            planes = planes + (load_words(pointers + plane * (WORDS * TILE), high, is_split(HEAD_DIM), ASM),)
        parts = parts + (planes,)
    return parts


@triton.jit
def load_value_words(words_ptr, column, token, HEAD_DIM: tl.constexpr, PLANES: tl.constexpr, ASM: tl.constexpr):
    """A tuple over parts of tuples over planes of int16 [DEPTH, TILE], from the tile's codes."""
    WORDS: tl.constexpr = HEAD_DIM // 8
    PARTS: tl.constexpr = num_parts(HEAD_DIM)
    high = (byte_of(column, HEAD_DIM) > 0)[:, None]
    parts = ()
    for part in tl.static_range(PARTS):
        pointers = words_ptr + token[None, :] * WORDS + word_of(column, part, HEAD_DIM)[:, None]
        planes = ()
        for plane in tl.static_range(PLANES):
            planes = planes + (load_words(pointers + plane * (WORDS * TILE), high, is_split(HEAD_DIM), ASM),)
        parts = parts + (planes,)
    return parts


@triton.jit
def load_key_pairs(words_ptr, pairs_ptr, column, row: tl.constexpr, HEAD_DIM: tl.constexpr, KEY: tl.constexpr):
    """Scales and zero points of two adjacent channels each, for one row of key groups: two tuples over parts of tuples
    over quarters of int32 (fp16) or int16 (bytes) [DEPTH]."""
    WORDS: tl.constexpr = HEAD_DIM // 8
    PARTS: tl.constexpr = num_parts(HEAD_DIM)
    scales = ()
    zeros = ()
    for part in tl.static_range(PARTS):
        word = word_of(column, part, HEAD_DIM)
        part_scales = ()
        part_zeros = ()
        for i in tl.static_range(4):
            begin = row * (HEAD_DIM // 2) + i * WORDS
            if KEY.byte_scales:
                part_scales = part_scales + (tl.load(words_ptr + (KEY.scale // 2 + begin) + word),)
                part_zeros = part_zeros + (tl.load(words_ptr + (KEY.zero // 2 + begin) + word),)
            else:
                part_scales = part_scales + (tl.load(pairs_ptr + word + (KEY.scale // 4 + begin)),)
                part_zeros = part_zeros + (tl.load(pairs_ptr + word + (KEY.zero // 4 + begin)),)
        scales = scales + (part_scales,)
        zeros = zeros + (part_zeros,)
    return scales, zeros


@triton.jit
def key_scales(scales, zeros, high, step: tl.constexpr, HEAD_DIM: tl.constexpr, KEY: tl.constexpr, ASM: tl.constexpr):
    """fp16 S and Z [1, DEPTH] of a step, from what `load_key_pairs` loaded."""
    SECOND: tl.constexpr = step % 8 >= 4
    scale = scales[step // 8][step % 4]
    zero = zeros[step // 8][step % 4]
    if KEY.byte_scales:
        if is_split(HEAD_DIM):
            scale = tl.where(high, scale >> 8, scale)
            zero = tl.where(high, zero >> 8, zero)
        scale = byte_scale(scale, SECOND, ASM)
        zero = byte_zero(zero, scale, SECOND, KEY, ASM)
    elif is_split(HEAD_DIM):
        scale = selected_half_of_pair(scale, high)
        zero = selected_half_of_pair(zero, high)
    else:
        scale = half_of_pair(scale, SECOND, ASM)
        zero = half_of_pair(zero, SECOND, ASM)
    return scale[None, :], zero[None, :]


@triton.jit
def packed_scores(
    parts, words_ptr, pairs_ptr, queries, column, token, scores,
    HEAD_DIM: tl.constexpr, KEY: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """fp32 [TILE, PADDED] of a tile's words, as `load_key_words` loaded them, added to `scores`; words_ptr and
    pairs_ptr: the page."""
    STEPS: tl.constexpr = num_steps(HEAD_DIM, KEY.planes)
    high = byte_of(column, HEAD_DIM) > 0
    scales, zeros = load_key_pairs(words_ptr, pairs_ptr, column, 0, HEAD_DIM, KEY)
    if KEY.group == KEY_ROW:
        later_scales, later_zeros = load_key_pairs(words_ptr, pairs_ptr, column, 1, HEAD_DIM, KEY)
    for step in tl.static_range(STEPS):
        scale, zero = key_scales(scales, zeros, high, step, HEAD_DIM, KEY, ASM)
        if KEY.group == KEY_ROW:
            is_later = (token >= KEY_ROW)[:, None]
            later_scale, later_zero = key_scales(later_scales, later_zeros, high, step, HEAD_DIM, KEY, ASM)
            scale = tl.where(is_later, later_scale, scale)
            zero = tl.where(is_later, later_zero, zero)
        # Z - 3 F S is rounded to fp16: with F of more than 2 bits that would be too coarse.
        unit = unpack_planes(parts[step // 8], step % 8, KEY.planes == 1 and shares_shift(step), ASM)
        if KEY.planes == 1 and shares_shift(step):
            zero = zero - scale * (3.0 * KEY.offset)
        key = fused_multiply_add(unit, scale, zero, ASM)
        scores = tl.dot(key, queries[step], scores)
    return scores


@triton.jit
def half_scores(halves_ptr, queries, column, token, scores, HEAD_DIM: tl.constexpr):
    """fp32 [TILE, PADDED] of fp16 keys [TILE, D], added to `scores`."""
    STEPS: tl.constexpr = num_steps(HEAD_DIM, 0)
    for step in tl.static_range(STEPS):
        key = tl.load(halves_ptr + token[:, None] * HEAD_DIM + step * DEPTH + column[None, :])
        scores = tl.dot(key, queries[step], scores)
    return scores


@triton.jit
def load_group_scales(bytes_ptr, halves_ptr, tile, token, VALUE: tl.constexpr, ASM: tl.constexpr):
    """Two tuples over value groups of fp16 [TILE]: S and Z."""
    GROUPS: tl.constexpr = VALUE.groups
    scales = ()
    zeros = ()
    for g in tl.static_range(GROUPS):
        scale, zero = load_scales(bytes_ptr, halves_ptr, (tile * GROUPS + g) * TILE + token, None, VALUE, ASM)
        scales = scales + (scale,)
        zeros = zeros + (zero,)
    return scales, zeros


@triton.jit
def summed_scales(halves_ptr, tile, token, scales, zeros, TILES: tl.constexpr, VALUE: tl.constexpr):
    """fp16 [rows, TILE]: S of every value group, then Z of every group, then zeros. scales and zeros: from
    `load_group_scales`."""
    GROUPS: tl.constexpr = VALUE.groups
    row = tl.arange(0, sum_rows(GROUPS))
    if VALUE.byte_scales:
        found = tl.zeros([sum_rows(GROUPS), TILE], tl.float16)
        for g in tl.static_range(GROUPS):
            found = tl.where((row == g)[:, None], scales[g][None, :], found)
            found = tl.where((row == GROUPS + g)[:, None], zeros[g][None, :], found)
        return found
    else:
        # Zero points follow the scales of all tiles.
        pointers = halves_ptr + VALUE.scale // 2 + tile * (GROUPS * TILE) + row[:, None] * TILE + token[None, :]
        if TILES > 1:
            pointers += tl.where(row >= GROUPS, (TILES - 1) * GROUPS * TILE, 0)[:, None]
        return tl.load(pointers, mask=(row < 2 * GROUPS)[:, None], other=0.0)


@triton.jit
def by_group(scales, channel, step: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE: tl.constexpr):
    """[DEPTH, TILE] of a step whose channels are in several value groups, from one [TILE] a group."""
    FIRST: tl.constexpr = first_group(step, HEAD_DIM, VALUE.group)
    LAST: tl.constexpr = last_group(step, HEAD_DIM, VALUE.group)
    found = scales[FIRST][None, :]
    for g in tl.static_range(FIRST + 1, LAST + 1):
        found = tl.where((channel >= g * VALUE.group)[:, None], scales[g][None, :], found)
    return found


@triton.jit(do_not_specialize=["block_units", "table_stride", "parts"])
def packed_attention_fwd_kernel(
    query_ptr,  # [B, H * GROUP, D]
    bytes_ptr,  # uint8, one layer of the pool: [block, H, BLOCK_TILES / SHAPE.tiles, page_bytes]
    words_ptr,  # int16 view of the same
    pairs_ptr,  # int32 view
    halves_ptr,  # fp16 view
    table_ptr,  # int32 [B, max_blocks]
    num_blocks_ptr,  # int32 [B]
    tail_lens_ptr,  # int32 [B]
    out_ptr,  # fp32 [B, H, parts, GROUP, D]: part 0 is the tail's
    lse_ptr,  # fp32 [B, H, parts, GROUP], base 2
    scale_log2,
    block_units,  # from one block to the next, in units of 16 bytes
    table_stride,
    parts,
    HEADS: tl.constexpr,  # KV heads
    GROUP: tl.constexpr,  # query heads a KV head
    PADDED: tl.constexpr,  # GROUP padded to what a dot takes
    SHAPE: tl.constexpr,  # `triton_page.PageShape`
    BLOCK_TILES: tl.constexpr,
    SINKS: tl.constexpr,  # tokens of page 0 that are left to the tail kernel
    WINDOW: tl.constexpr,  # 0: none
    SOFTCAP: tl.constexpr,  # 0: none
    ASM: tl.constexpr,
):
    """Attention over the packed pages of one piece. One warp; a tile is one iteration.

    Where the channels of every step are in one value group, value scales go into the weights; else values are scaled.
    A weight times a value scale is rounded to fp16: values are accurate to two parts in a thousand of their group's
    spread down to spreads of about 1e-3, below which the products become subnormal.
    """
    HEAD_DIM: tl.constexpr = SHAPE.head_dim
    TILES: tl.constexpr = SHAPE.tiles
    KEY: tl.constexpr = SHAPE.keys
    VALUE: tl.constexpr = SHAPE.values
    BOOST: tl.constexpr = SHAPE.boost
    STEPS: tl.constexpr = num_steps(HEAD_DIM, VALUE.planes)
    FOLD_SCALES: tl.constexpr = VALUE.planes > 0 and has_even_groups(HEAD_DIM, VALUE.group, VALUE.planes)

    piece = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    num_blocks = tl.load(num_blocks_ptr + row)
    num_tiles = num_blocks * BLOCK_TILES
    seen = first_seen(num_blocks, tail_lens_ptr, row, BLOCK_TILES, WINDOW)
    skipped = skipped_tiles(num_tiles, seen, WINDOW)
    size = tiles_per_piece(num_tiles - skipped)
    first = skipped + tl.program_id(0) * size
    last = tl.minimum(first + size, num_tiles)
    if first >= last:
        return

    token = tl.arange(0, TILE)
    column = tl.arange(0, DEPTH)
    member = tl.arange(0, PADDED)
    used = member < GROUP
    query_row = query_ptr + ((row * HEADS + head) * GROUP + member[None, :]) * HEAD_DIM
    queries = load_queries(query_row, column, used, HEAD_DIM, KEY.planes)
    if BOOST.channels > 0:
        boosted = no_boosted_queries(PADDED, 0, KEY, BOOST)
    acc = ()
    for _ in tl.static_range(STEPS):
        acc = acc + (tl.zeros([DEPTH, PADDED], tl.float32),)
    if FOLD_SCALES:
        acc_sums = tl.zeros([sum_rows(VALUE.groups), PADDED], tl.float32)
    peak = tl.full([PADDED], LOWEST, tl.float32)
    total = tl.zeros([PADDED], tl.float32)

    for tile in tl.range(first, last):
        page = tile // TILES
        tile_of_page = tile % TILES
        block_pages: tl.constexpr = BLOCK_TILES // TILES
        block = tl.load(table_ptr + row * table_stride + page // block_pages).to(tl.int64)
        units = block * block_units + (head * block_pages + page % block_pages) * SHAPE.units
        page_bytes = bytes_ptr + units * 16
        page_words = words_ptr + units * 8
        page_pairs = pairs_ptr + units * 4
        page_halves = halves_ptr + units * 8

        # What is loaded first is fetched ahead: value scales are used late, but from memory they come late too.
        if KEY.planes > 0:
            codes = page_words + KEY.codes // 2 + tile_of_page * (KEY.planes * HEAD_DIM // 8 * TILE)
            key_parts = load_key_words(codes, column, token, HEAD_DIM, KEY.planes, ASM)
        if BOOST.channels > 0:
            boost_words = load_boost_words(page_words, tile_of_page, column[None, :], token[:, None], BOOST, ASM)
        if VALUE.planes > 0:
            codes = page_words + VALUE.codes // 2 + tile_of_page * (VALUE.planes * HEAD_DIM // 8 * TILE)
            value_parts = load_value_words(codes, column, token, HEAD_DIM, VALUE.planes, ASM)
            scales, zeros = load_group_scales(page_bytes, page_halves, tile_of_page, token, VALUE, ASM)
            if FOLD_SCALES:
                summed = summed_scales(page_halves, tile_of_page, token, scales, zeros, TILES, VALUE)

        if BOOST.channels > 0:
            if (tile_of_page == 0) | (tile == first):
                boosted = boosted_queries(
                    query_row, used[None, :], page_bytes, page_halves, 0, HEAD_DIM, KEY, BOOST, ASM
                )
            scores = boosted_scores(boost_words, boosted, token[:, None], 0, KEY, BOOST, ASM)
        else:
            scores = tl.zeros([TILE, PADDED], tl.float32)
        if KEY.planes > 0:
            scores = packed_scores(
                key_parts, page_words, page_pairs, queries, column, token, scores, HEAD_DIM, KEY, ASM
            )
        else:
            keys = page_halves + KEY.codes // 2 + tile_of_page * (TILE * HEAD_DIM)
            scores = half_scores(keys, queries, column, token, scores, HEAD_DIM)
        if SOFTCAP > 0:
            scores = log2_scores(scores, scale_log2, SOFTCAP)
        if SINKS > 0 or WINDOW > 0:
            lowest = tl.maximum(seen, SINKS) if WINDOW > 0 else SINKS
            scores = tl.where((token + tile * TILE >= lowest)[:, None], scores, -float("inf"))

        if SOFTCAP > 0:
            new_peak = tl.maximum(peak, tl.max(scores, axis=0))
            weights = tl.exp2(scores - new_peak[None, :])
        else:
            # The scale is positive: scaled after the maximum, it costs one multiply-add with the subtraction.
            new_peak = tl.maximum(peak, tl.max(scores, axis=0) * scale_log2)
            weights = tl.exp2(scores * scale_log2 - new_peak[None, :])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(weights, axis=0)
        peak = new_peak

        # sum_t w (S u + Z) = sum_t (w S) u + sum_t w Z: the scale goes into the weights, and the zero point into a dot
        # of its own that is added at the end. That dot also sums w S, for the steps that unpack to u + 3 F.
        weights = weights.to(tl.float16)
        if FOLD_SCALES:
            acc_sums = tl.dot(summed, weights, acc_sums * decay[None, :])
        new_acc = ()
        for step in tl.static_range(STEPS):
            if FOLD_SCALES:
                scaled = weights * scales[first_group(step, HEAD_DIM, VALUE.group)][:, None]
                value = unpack_planes(value_parts[step // 8], step % 8, shares_shift(step), ASM)
            elif VALUE.planes > 0:
                scaled = weights
                channel, exists = channel_of(column, step, HEAD_DIM, VALUE.planes)
                value = fused_multiply_add(
                    unpack_planes(value_parts[step // 8], step % 8, False, ASM),
                    by_group(scales, channel, step, HEAD_DIM, VALUE),
                    by_group(zeros, channel, step, HEAD_DIM, VALUE),
                    ASM,
                )
            else:
                scaled = weights
                values = page_halves + VALUE.codes // 2 + tile_of_page * (TILE * HEAD_DIM)
                value = tl.load(values + token[None, :] * HEAD_DIM + step * DEPTH + column[:, None])
            new_acc = new_acc + (tl.dot(value, scaled, acc[step] * decay[None, :]),)
        acc = new_acc

    part = ((row * HEADS + head) * parts + 1 + piece) * GROUP + member
    inverse = 1.0 / total
    for step in tl.static_range(STEPS):
        value = acc[step]
        if FOLD_SCALES:
            sum_row = tl.arange(0, sum_rows(VALUE.groups))
            group = first_group(step, HEAD_DIM, VALUE.group)
            zero = tl.sum(tl.where((sum_row == VALUE.groups + group)[:, None], acc_sums, 0.0), axis=0)
            if shares_shift(step):
                scale = tl.sum(tl.where((sum_row == group)[:, None], acc_sums, 0.0), axis=0)
                value -= (3.0 * VALUE.offset) * scale[None, :]
            value += zero[None, :]
        channel, exists = channel_of(column, step, HEAD_DIM, VALUE.planes)
        tl.store(
            out_ptr + part[None, :] * HEAD_DIM + channel[:, None],
            value * inverse[None, :],
            mask=used[None, :] & exists[:, None],
        )
    tl.store(lse_ptr + part, peak + tl.log2(total), mask=used)
