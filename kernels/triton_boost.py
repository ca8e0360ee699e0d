"""What boosted channels add to scores: the products of queries with the plane that only these channels have.

That plane is a tile [N/8 words][32 tokens] over the *ranks* of the N channels in their list, planar as every plane. It
is read as a plane of its own, u = 1 + c/4, beside the common planes, which are read as if no channel were boosted:

    fp16    Z is stored with F of the wider code, which is F + 4^planes: S u + Z lacks 4^planes S u_high.
    bytes   Z of the common planes is made with their own F and step: 4^planes S (u_high - 1 + 3/128 b) is missing.

S and what is added to u_high belong to a page, not to a token: S goes into the queries, once a page, and the rest
becomes one number a query.

A step is a dot with 16 columns. Words are few (N/8), so *slots* for them, a power of two, are repeated for other
fields: with 3 words, 4 slots, four copies and 2 steps; with 6 words, 8 slots, two copies and 4 steps.
"""

# Triton is untyped, and the annotations of a kernel are Triton's, not Python's.
# Nor does it compile (*tuple, item).
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from kvferry.kernels.triton_pieces import TILE
from kvferry.kernels.triton_unpack import biased_byte, byte_scale, move_down, unpack

DEPTH = tl.constexpr(16)
"""Columns of a step."""
KEY_ROW = tl.constexpr(16)
"""Tokens of the smallest key group."""


@triton.constexpr_function
def num_slots(channels: int) -> int:
    """At least 2: neighbouring columns then have the same field, and share a register and a shift."""
    return max(2, min(16, 1 << (channels // 8 - 1).bit_length()))


@triton.constexpr_function
def fields_a_copy(channels: int) -> int:
    """Fields of a word that a copy of it goes through, one a step."""
    return int(num_slots(channels)) // 2


@triton.constexpr_function
def boost_parts(channels: int) -> int:
    return -(-channels // 8 // 16)


@triton.constexpr_function
def boost_steps(channels: int) -> int:
    return int(boost_parts(channels)) * int(fields_a_copy(channels))


@triton.constexpr_function
def boost_rows(key_group: int) -> int:
    """Key groups of a tile."""
    return 2 if key_group == 16 else 1


@triton.jit
def boost_word(column, part: tl.constexpr, CHANNELS: tl.constexpr):
    """The word that stands in a column, or the last one, and whether there is one."""
    SLOTS: tl.constexpr = num_slots(CHANNELS)
    word = column % SLOTS + part * DEPTH
    return tl.minimum(word, CHANNELS // 8 - 1), word < CHANNELS // 8


@triton.jit
def boost_rank(column, step: tl.constexpr, CHANNELS: tl.constexpr):
    """The rank of the channel in a column, and whether there is one."""
    SLOTS: tl.constexpr = num_slots(CHANNELS)
    FIELDS: tl.constexpr = fields_a_copy(CHANNELS)
    word, exists = boost_word(column, step // FIELDS, CHANNELS)
    field = column // SLOTS * FIELDS + step % FIELDS
    return field % 4 * (CHANNELS // 4) + 2 * word + field // 4, exists


@triton.jit
def load_boost_words(words_ptr, tile, column, token, BOOST: tl.constexpr, ASM: tl.constexpr):
    """A tuple over parts of int16, shaped as column and token together, with each copy's fields moved down."""
    SLOTS: tl.constexpr = num_slots(BOOST.channels)
    PARTS: tl.constexpr = boost_parts(BOOST.channels)
    begin = words_ptr + BOOST.codes // 2 + tile * (BOOST.channels // 8 * TILE)
    parts = ()
    for part in tl.static_range(PARTS):
        word, _ = boost_word(column, part, BOOST.channels)
        words = tl.load(begin + word * TILE + token)
        if SLOTS < DEPTH:
            words = move_down(words, column // SLOTS * SLOTS, ASM)
        parts = parts + (words,)
    return parts


@triton.jit
def no_boosted_queries(QUERIES: tl.constexpr, AXIS: tl.constexpr, KEY: tl.constexpr, BOOST: tl.constexpr):
    """Zeros of the shapes of `boosted_queries`."""
    ROWS: tl.constexpr = boost_rows(KEY.group)
    STEPS: tl.constexpr = boost_steps(BOOST.channels)
    rows = ()
    for _ in tl.static_range(ROWS):
        queries = ()
        for _ in tl.static_range(STEPS):
            if AXIS == 0:
                queries = queries + (tl.zeros([DEPTH, QUERIES], tl.float16),)
            else:
                queries = queries + (tl.zeros([QUERIES, DEPTH], tl.float16),)
        rows = rows + ((queries, tl.zeros([QUERIES], tl.float32)),)
    return rows


@triton.jit
def boosted_queries(
    query_rows,  # pointers [1, queries] or [queries, 1]
    used,  # bool of the same shape
    bytes_ptr,  # the page
    halves_ptr,
    AXIS: tl.constexpr,  # of columns: 0 or 1
    HEAD_DIM: tl.constexpr,
    KEY: tl.constexpr,
    BOOST: tl.constexpr,
    ASM: tl.constexpr,
):
    """A tuple over key groups of a tile: (a tuple over steps of fp16 q S, [DEPTH, queries] or [queries, DEPTH]; fp32
    [queries], what is to be added to their products with u_high)."""
    ROWS: tl.constexpr = boost_rows(KEY.group)
    STEPS: tl.constexpr = boost_steps(BOOST.channels)
    column = tl.arange(0, DEPTH)
    rows = ()
    for row in tl.static_range(ROWS):
        queries = ()
        added = tl.zeros([used.shape[1 - AXIS]], tl.float32)
        for step in tl.static_range(STEPS):
            rank, exists = boost_rank(column, step, BOOST.channels)
            channel = tl.load(bytes_ptr + BOOST.listed + rank).to(tl.int32)
            place = row * HEAD_DIM + channel
            query = tl.load(
                query_rows + tl.expand_dims(channel, 1 - AXIS),
                mask=used & tl.expand_dims(exists, 1 - AXIS),
                other=0.0,
            ).to(tl.float32)
            if KEY.byte_scales:
                scale = byte_scale(tl.load(bytes_ptr + KEY.scale + place).to(tl.int16), False, ASM)
            else:
                scale = tl.load(halves_ptr + KEY.scale // 2 + place)
            folded = (query * tl.expand_dims(scale.to(tl.float32), 1 - AXIS)).to(tl.float16)
            if KEY.byte_scales:
                zero = biased_byte(tl.load(bytes_ptr + KEY.zero + place).to(tl.int16), False, ASM).to(tl.float32)
                more = tl.expand_dims((zero - 1152.0) * BOOST.extra_step - 1.0, 1 - AXIS)
                added += tl.sum(folded.to(tl.float32) * more, axis=AXIS)
            queries = queries + (folded,)
        rows = rows + ((queries, added),)
    return rows


@triton.jit
def boosted_products(parts, queries, AXIS: tl.constexpr, BOOST: tl.constexpr, ASM: tl.constexpr):
    """fp32 [TILE, queries] or [queries, TILE] of one key group: u_high times `boosted_queries`."""
    STEPS: tl.constexpr = boost_steps(BOOST.channels)
    FIELDS: tl.constexpr = fields_a_copy(BOOST.channels)
    folded, added = queries
    if AXIS == 0:
        products = added[None, :].broadcast_to([TILE, added.shape[0]])
    else:
        products = added[:, None].broadcast_to([added.shape[0], TILE])
    for step in tl.static_range(STEPS):
        unit = unpack(parts[step // FIELDS], step % FIELDS, ASM)
        products = tl.dot(unit, folded[step], products) if AXIS == 0 else tl.dot(folded[step], unit, products)
    return products


@triton.jit
def boosted_scores(
    parts, rows, token, AXIS: tl.constexpr, KEY: tl.constexpr, BOOST: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """fp32 [TILE, queries] or [queries, TILE]: what a tile's keys lack without the plane. token: shaped to be broadcast
    to it."""
    products = boosted_products(parts, rows[0], AXIS, BOOST, ASM)
    if KEY.group == KEY_ROW:
        later = boosted_products(parts, rows[1], AXIS, BOOST, ASM)
        products = tl.where(token >= KEY_ROW, later, products)
    return products * BOOST.weight
