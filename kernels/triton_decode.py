"""Decode attention straight from packed pages: no dequantized copy of K or V is ever written.

Three kernels, launched in a fixed shape whatever the data, so that a step can be captured in a CUDA graph:

    packed_attention_fwd_kernel   (piece, kv head, sequence)   packed pages of one piece of a context
    tail_attention_fwd_kernel     (kv head, sequence)          the fp16 tail and the fp16 sinks
    merge_fwd_kernel              (query head, sequence)       merges the parts by log-sum-exp

A context is cut into pieces by its own length alone (`pages_per_piece`), so a sequence's bits do not depend on what
else is in the batch. A program reads K and V once for all query heads that share them. Twin of all three:
`reference.ReferenceKernels.decode_attention`.
"""

# Triton is untyped, and the annotations of a kernel are Triton's, not Python's.
# Nor does it compile (*tuple, item).
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvferry.kernels.packed import DecodeBatch
from kvferry.kernels.triton_unpack import (
    field_channel,
    fused_multiply_add,
    half_of_pair,
    load_words,
    selected_half_of_pair,
    unpack,
    unpack_low,
)

TOKENS = tl.constexpr(32)
"""Tokens a page, `layout.PAGE`."""
DEPTH = tl.constexpr(16)
"""Depth of one tensor-core step."""
MIN_PIECE = tl.constexpr(8)
"""Pages of the smallest piece. A page is 3 KB at D = 128; a piece's partial result is 2 KB at 4 heads."""
MAX_PIECES = tl.constexpr(64)
"""Pieces of the longest context: beyond MIN_PIECE * MAX_PIECES pages (16,384 tokens) pieces grow."""
TAIL_TILE = tl.constexpr(64)
SINK_TILE = tl.constexpr(16)
MERGE_TILE = tl.constexpr(16)
LOWEST = tl.constexpr(-1e30)
"""Score below every score; finite, so that differences of two stay numbers."""
LOG2E = 1.4426950408889634
PACKED_OPTIONS = {"num_warps": 1, "num_stages": 3, "enable_fp_fusion": True}
"""One warp a program: more repeat the unpacking. Three stages: the block table is fetched ahead of the pages."""
SM_80_REGISTERS = 168
"""On sm_80 alone ptxas takes 254 registers, which is 8 warps a multiprocessor, where 168 (12 warps) do without a spill,
up to 8 query heads a KV head."""
TAIL_OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
MERGE_OPTIONS = {"num_warps": 2, "num_stages": 2, "enable_fp_fusion": True}


@triton.jit
def pages_per_piece(num_pages):
    """Pages of every piece but the last, from the context's own length."""
    return tl.maximum(MIN_PIECE, tl.cdiv(num_pages, MAX_PIECES))


@triton.jit(do_not_specialize=["table_stride", "parts"])
def packed_attention_fwd_kernel(
    query_ptr,  # [B, H * GROUP, D]
    words_ptr,  # int16 view of one layer of the pool: [block, H, BLOCK_PAGES, 12 D]
    pairs_ptr,  # int32 view of the same
    halves_ptr,  # fp16 view of the same
    table_ptr,  # int32 [B, max_blocks]
    num_blocks_ptr,  # int32 [B]
    out_ptr,  # fp32 [B, H, parts, GROUP, D]: part 0 is the tail's
    lse_ptr,  # fp32 [B, H, parts, GROUP], base 2
    scale_log2,
    block_stride,  # of words_ptr
    table_stride,
    parts,
    HEADS: tl.constexpr,  # KV heads
    GROUP: tl.constexpr,  # query heads a KV head
    PADDED: tl.constexpr,  # GROUP padded to what a dot takes
    HEAD_DIM: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    SINKS: tl.constexpr,  # tokens of page 0 that are left to the tail kernel
    ASM: tl.constexpr,
):
    """Attention over the packed pages of one piece. One warp; a page is one iteration.

    The product is transposed, S^T = K q^T and O^T = V^T P^T: words are a tensor-core operand before they are unpacked
    (unpacked values need not pass through shared memory), and query heads sit on the narrow side of the instruction.

    A dot is 16 deep. 128 channels have 16 words, taken in 8 steps, one a field. 64 channels have 8 words, that is 16
    bytes, taken in 4 steps, one a field of a byte: word j stands in columns j and j + 8, once for either byte. There
    the select of a key scale keeps the compiler from unpacking keys in place: they do pass through shared memory.

    A weight times a value scale is rounded to fp16: values are accurate to two parts in a thousand of their group's
    spread down to spreads of about 1e-3, below which the products become subnormal.
    """
    piece = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    WORDS: tl.constexpr = HEAD_DIM // 8
    STEPS: tl.constexpr = HEAD_DIM // DEPTH
    SPLIT: tl.constexpr = WORDS < DEPTH
    GROUPS: tl.constexpr = HEAD_DIM // 32  # value groups of a token

    num_pages = tl.load(num_blocks_ptr + row) * BLOCK_PAGES
    size = pages_per_piece(num_pages)
    first = tl.program_id(0) * size
    last = tl.minimum(first + size, num_pages)
    if first >= last:
        return

    token = tl.arange(0, TOKENS)
    column = tl.arange(0, DEPTH)
    word = column % WORDS
    byte = column // WORDS
    member = tl.arange(0, PADDED)
    used = member < GROUP
    group_row = tl.arange(0, 16)  # value groups, padded to the rows of a dot

    query_row = query_ptr + ((row * HEADS + head) * GROUP + member[None, :]) * HEAD_DIM
    queries = ()
    acc = ()
    for f in tl.static_range(STEPS):
        channel = field_channel(word, f, HEAD_DIM) + byte
        q = tl.load(query_row + channel[:, None], mask=used[None, :], other=0.0)
        queries = queries + (q.to(tl.float16),)
        acc = acc + (tl.zeros([DEPTH, PADDED], tl.float32),)
    acc_sums = tl.zeros([16, PADDED], tl.float32)
    peak = tl.full([PADDED], LOWEST, tl.float32)
    total = tl.zeros([PADDED], tl.float32)

    for page in tl.range(first, last):
        block = tl.load(table_ptr + row * table_stride + page // BLOCK_PAGES).to(tl.int64)
        base = block * block_stride + (head * BLOCK_PAGES + page % BLOCK_PAGES) * (12 * HEAD_DIM)
        # Within the page, in 16-bit units: K codes 0, scale 4 D, zero 5 D; V codes 6 D, scale 10 D, zero 11 D.
        keys = words_ptr + base + word[None, :] * TOKENS + token[:, None]
        key_words = load_words(keys, (byte > 0)[None, :], SPLIT, ASM)
        values = words_ptr + base + 6 * HEAD_DIM + token[None, :] * WORDS + word[:, None]
        value_words = load_words(values, (byte > 0)[:, None], SPLIT, ASM)
        value_scales = ()
        for g in tl.static_range(GROUPS):
            scale = tl.load(halves_ptr + base + 10 * HEAD_DIM + g * TOKENS + token)
            value_scales = value_scales + (scale,)
        value_sums = tl.load(
            halves_ptr + base + 10 * HEAD_DIM + group_row[:, None] * TOKENS + token[None, :],
            mask=group_row[:, None] < 2 * GROUPS,
            other=0.0,
        )
        key_pairs = pairs_ptr + base // 2 + 2 * HEAD_DIM + word
        key_scales = ()
        key_zeros = ()
        for i in tl.static_range(4):
            key_scales = key_scales + (tl.load(key_pairs + i * WORDS),)
            key_zeros = key_zeros + (tl.load(key_pairs + HEAD_DIM // 2 + i * WORDS),)

        scores = tl.zeros([TOKENS, PADDED], tl.float32)
        for f in tl.static_range(STEPS):
            if SPLIT:
                scale = selected_half_of_pair(key_scales[f], byte > 0)
                zero = selected_half_of_pair(key_zeros[f], byte > 0)
            else:
                scale = half_of_pair(key_scales[f % 4], f >= 4, ASM)
                zero = half_of_pair(key_zeros[f % 4], f >= 4, ASM)
            unit = unpack(key_words, f, ASM)
            key = fused_multiply_add(unit, scale[None, :], zero[None, :], ASM)
            scores = tl.dot(key, queries[f], scores)
        if SINKS > 0:
            scores = tl.where((token + page * TOKENS >= SINKS)[:, None], scores, -float("inf"))

        # The scale is positive: scaled after the maximum, it costs one multiply-add with the subtraction.
        new_peak = tl.maximum(peak, tl.max(scores, axis=0) * scale_log2)
        decay = tl.exp2(peak - new_peak)
        weights = tl.exp2(scores * scale_log2 - new_peak[None, :])
        total = total * decay + tl.sum(weights, axis=0)
        peak = new_peak

        # sum_t w (S u + Z) = sum_t (w S) u + sum_t w Z: the scale goes into the weights, and the zero point into a dot
        # of its own that is added at the end. The rows of that dot that would be padding sum w S: odd fields, unpacked
        # to u' = 1 + code/16 = (u + 3) / 4 because they then share a shift with the next field, need it.
        weights = weights.to(tl.float16)
        acc_sums = tl.dot(value_sums, weights, acc_sums * decay[None, :])
        new_acc = ()
        for f in tl.static_range(STEPS):
            scaled = weights * value_scales[(f % 4) * GROUPS // 4][:, None]
            unit = unpack_low(value_words, f, ASM) if f % 2 else unpack(value_words, f, ASM)
            new_acc = new_acc + (tl.dot(unit, scaled, acc[f] * decay[None, :]),)
        acc = new_acc

    part = ((row * HEADS + head) * parts + 1 + piece) * GROUP + member
    inverse = 1.0 / total
    for f in tl.static_range(STEPS):
        group = (f % 4) * GROUPS // 4
        zero = tl.sum(tl.where((group_row == GROUPS + group)[:, None], acc_sums, 0.0), axis=0)
        value = acc[f]
        if f % 2:
            scale = tl.sum(tl.where((group_row == group)[:, None], acc_sums, 0.0), axis=0)
            value = 4.0 * value - 3.0 * scale[None, :]
        channel = field_channel(word, f, HEAD_DIM) + byte
        tl.store(
            out_ptr + part[None, :] * HEAD_DIM + channel[:, None],
            (value + zero[None, :]) * inverse[None, :],
            mask=used[None, :],
        )
    tl.store(lse_ptr + part, peak + tl.log2(total), mask=used)


@triton.jit
def attend_rows(
    queries,  # fp16 [D, PADDED]
    key_ptr,  # fp16 [count, D]
    value_ptr,  # fp16 [count, D]
    start,
    count,
    scale_log2,
    peak,
    total,
    acc,  # fp32 [D, PADDED]
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Online softmax over rows start .. start + TILE of unpacked K and V; rows from `count` on do not exist."""
    token = start + tl.arange(0, TILE)
    channel = tl.arange(0, HEAD_DIM)
    exists = token < count
    keys = tl.load(key_ptr + token[:, None] * HEAD_DIM + channel[None, :], mask=exists[:, None], other=0.0)
    values = tl.load(value_ptr + token[None, :] * HEAD_DIM + channel[:, None], mask=exists[None, :], other=0.0)
    scores = tl.where(exists[:, None], tl.dot(keys, queries) * scale_log2, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=0))
    decay = tl.exp2(peak - new_peak)
    weights = tl.exp2(scores - new_peak[None, :])
    total = total * decay + tl.sum(weights, axis=0)
    acc = tl.dot(values, weights.to(tl.float16), acc * decay[None, :])
    return new_peak, total, acc


@triton.jit(do_not_specialize=["parts"])
def tail_attention_fwd_kernel(
    query_ptr,  # [B, H * GROUP, D]
    tail_ptr,  # fp16 [slot, K|V, H, TAIL_ROWS, D], one layer
    sink_ptr,  # fp16 [slot, H, K|V, SINKS, D], one layer
    slots_ptr,  # int32 [B]
    tail_lens_ptr,  # int32 [B]
    num_blocks_ptr,  # int32 [B]
    out_ptr,  # fp32 [B, H, parts, GROUP, D]
    lse_ptr,  # fp32 [B, H, parts, GROUP], base 2
    scale_log2,
    tail_stride,
    sink_stride,
    parts,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TAIL_ROWS: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Attention over a sequence's fp16 tail and, once it has packed blocks, over its fp16 sinks: part 0."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    member = tl.arange(0, PADDED)
    used = member < GROUP
    channel = tl.arange(0, HEAD_DIM)
    query_row = query_ptr + ((row * HEADS + head) * GROUP + member[None, :]) * HEAD_DIM
    queries = tl.load(query_row + channel[:, None], mask=used[None, :], other=0.0).to(tl.float16)

    slot = tl.load(slots_ptr + row).to(tl.int64)
    keys = tail_ptr + slot * tail_stride + head * (TAIL_ROWS * HEAD_DIM)
    values = keys + HEADS * TAIL_ROWS * HEAD_DIM
    count = tl.load(tail_lens_ptr + row)
    peak = tl.full([PADDED], LOWEST, tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    acc = tl.zeros([HEAD_DIM, PADDED], tl.float32)
    for start in tl.range(0, count, TAIL_TILE):
        peak, total, acc = attend_rows(
            queries, keys, values, start, count, scale_log2, peak, total, acc, HEAD_DIM, TAIL_TILE
        )
    if SINKS > 0:
        keys = sink_ptr + slot * sink_stride + head * (2 * SINKS * HEAD_DIM)
        count = tl.where(tl.load(num_blocks_ptr + row) > 0, SINKS, 0)
        for start in tl.range(0, count, SINK_TILE):
            peak, total, acc = attend_rows(
                queries, keys, keys + SINKS * HEAD_DIM, start, count, scale_log2,
                peak, total, acc, HEAD_DIM, SINK_TILE,
            )  # fmt: skip

    part = (row * HEADS + head) * parts * GROUP + member
    tl.store(
        out_ptr + part[None, :] * HEAD_DIM + channel[:, None],
        acc / total[None, :],
        mask=used[None, :],
    )
    tl.store(lse_ptr + part, peak + tl.log2(total), mask=used)


@triton.jit(do_not_specialize=["parts"])
def merge_fwd_kernel(
    part_ptr,  # fp32 [B, H, parts, GROUP, D]
    lse_ptr,  # fp32 [B, H, parts, GROUP], base 2
    num_blocks_ptr,  # int32 [B]
    out_ptr,  # [B, H * GROUP, D]
    parts,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
):
    """Merges the parts of one query head. Twin: `reference.merge`."""
    query_head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    num_pages = tl.load(num_blocks_ptr + row) * BLOCK_PAGES
    count = 1 + tl.cdiv(num_pages, pages_per_piece(num_pages))
    first = (row * HEADS + query_head // GROUP) * parts * GROUP + query_head % GROUP
    channel = tl.arange(0, HEAD_DIM)
    peak = LOWEST
    total = 0.0
    acc = tl.zeros([HEAD_DIM], tl.float32)
    for start in tl.range(0, count, MERGE_TILE):
        index = start + tl.arange(0, MERGE_TILE)
        part = first + index * GROUP
        lse = tl.load(lse_ptr + part, mask=index < count, other=-float("inf"))
        outs = tl.load(
            part_ptr + part[:, None] * HEAD_DIM + channel[None, :],
            mask=(index < count)[:, None],
            other=0.0,
        )
        new_peak = tl.maximum(peak, tl.max(lse, axis=0))
        weights = tl.exp2(lse - new_peak)
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(weights, axis=0)
        acc = acc * decay + tl.sum(outs * weights[:, None], axis=0)
        peak = new_peak
    tl.store(out_ptr + (row * HEADS * GROUP + query_head) * HEAD_DIM + channel, acc / total)


def packed_options(padded: int, capability: int) -> dict[str, Any]:
    """Launch options of `packed_attention_fwd_kernel`; `capability` is 80 for sm_80, 0 for what is not CUDA."""
    if capability == 80 and padded <= 8:
        return PACKED_OPTIONS | {"maxnreg": SM_80_REGISTERS}
    return PACKED_OPTIONS


def decode_attention(
    query: Tensor,
    batch: DecodeBatch,
    *,
    layer: int,
    scale: float,
    asm: bool,
    narrow: int,
    capability: int,
) -> Tensor:
    """`PackedKernels.decode_attention`. Never synchronizes; every launch has a shape fixed by the arguments' shapes.

    `narrow` is the least number of query columns a dot takes on this device: 8 on CUDA, 16 on HIP.
    """
    rows, query_heads, head_dim = query.shape
    pool = batch.layout.layer_pages(batch.pool, layer)
    _, heads, block_pages, _ = pool.shape
    max_blocks = batch.block_tables.shape[1]
    sinks = batch.sinks.shape[-2]
    group = query_heads // heads
    padded = max(narrow, triton.next_power_of_2(group))
    pieces = min(MAX_PIECES.value, triton.cdiv(max_blocks * block_pages, MIN_PIECE.value))
    query = query.contiguous()
    out = torch.empty_like(query)
    partial = query.new_empty(rows, heads, 1 + pieces, group, head_dim, dtype=torch.float32)
    lse = query.new_empty(rows, heads, 1 + pieces, group, dtype=torch.float32)
    scale_log2 = scale * LOG2E
    if pieces:
        words = pool.view(torch.int16)
        packed_attention_fwd_kernel[(pieces, heads, rows)](
            query,
            words,
            pool.view(torch.int32),
            pool.view(torch.float16),
            batch.block_tables,
            batch.num_blocks,
            partial,
            lse,
            scale_log2,
            words.stride(0),
            batch.block_tables.stride(0),
            1 + pieces,
            HEADS=heads,
            GROUP=group,
            PADDED=padded,
            HEAD_DIM=head_dim,
            BLOCK_PAGES=block_pages,
            SINKS=sinks,
            ASM=asm,
            **packed_options(padded, capability),
        )
    tails = batch.tails[:, layer]
    sink_rows = batch.sinks[:, layer]
    tail_attention_fwd_kernel[(heads, rows)](
        query,
        tails,
        sink_rows,
        batch.slots,
        batch.tail_lens,
        batch.num_blocks,
        partial,
        lse,
        scale_log2,
        tails.stride(0),
        sink_rows.stride(0),
        1 + pieces,
        HEADS=heads,
        GROUP=group,
        PADDED=padded,
        HEAD_DIM=head_dim,
        TAIL_ROWS=tails.shape[-2],
        SINKS=sinks,
        **TAIL_OPTIONS,
    )
    merge_fwd_kernel[(query_heads, rows)](
        partial,
        lse,
        batch.num_blocks,
        out,
        1 + pieces,
        HEADS=heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_PAGES=block_pages,
        **MERGE_OPTIONS,
    )
    return out
