"""Attention of a prefill chunk over packed pages: the prefix is dequantized in registers and shared memory only.

A program takes `ROW_TILE` rows, a row being one query head at one token of the chunk, of the query heads that share a
KV head. It goes through the packed prefix page by page, then the fp16 sinks, then the chunk itself, causally; the order
of these depends on a row's own context alone. Twin: `reference.ReferenceKernels.chunk_attention`.

Channels are taken in four quarters: quarter i of the words' fields is channels i D/4 .. (i + 1) D/4 in their order.
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
from kvferry.kernels.triton_decode import SINK_TILE
from kvferry.kernels.triton_pieces import TILE as TOKENS
from kvferry.kernels.triton_score import LOG2E, LOWEST
from kvferry.kernels.triton_unpack import fused_multiply_add, unpack

ROW_TILE = tl.constexpr(64)
KEY_TILE = tl.constexpr(32)
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


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
    queries,  # 4 x fp16 [ROW_TILE, D/4]
    key_ptr,  # fp16 [count, D]
    value_ptr,  # fp16 [count, D]
    start,
    count,
    row_limit,  # int32 [ROW_TILE]: a row sees key tokens below it
    scale_log2,
    state,  # peak, total, 4 x fp32 [ROW_TILE, D/4]
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attention over rows start .. start + TILE of unpacked K and V."""
    peak, total, acc = state
    QUARTER: tl.constexpr = HEAD_DIM // 4
    token = start + tl.arange(0, TILE)
    lane = tl.arange(0, QUARTER)
    exists = token < count
    scores = tl.zeros([ROW_TILE, TILE], tl.float32)
    for i in tl.static_range(4):
        key = tl.load(
            key_ptr + token[None, :] * HEAD_DIM + i * QUARTER + lane[:, None],
            mask=exists[None, :],
            other=0.0,
        )
        scores = tl.dot(queries[i], key, scores)
    visible = exists[None, :] & (token[None, :] < row_limit[:, None])
    scores = tl.where(visible, scores * scale_log2, -float("inf"))
    weights, decay, peak, total = softmax_step(scores, peak, total)
    new_acc = ()
    for i in tl.static_range(4):
        value = tl.load(
            value_ptr + token[:, None] * HEAD_DIM + i * QUARTER + lane[None, :],
            mask=exists[:, None],
            other=0.0,
        )
        new_acc = new_acc + (tl.dot(weights, value, acc[i] * decay),)
    return peak, total, new_acc


@triton.jit(do_not_specialize=["n", "num_blocks"])
def chunk_attention_fwd_kernel(
    query_ptr,  # [H * GROUP, n, D]
    key_ptr,  # fp16 [H, n, D]
    value_ptr,  # fp16 [H, n, D]
    words_ptr,  # int16 view of one layer of the pool: [block, H, BLOCK_PAGES, 12 D]
    halves_ptr,  # fp16 view of the same
    table_ptr,  # int32 [prefix blocks]
    sink_ptr,  # fp16 [H, K|V, SINKS, D], one layer
    out_ptr,  # [H * GROUP, n, D]
    scale_log2,
    n,
    num_blocks,
    block_stride,  # of words_ptr
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    SINKS: tl.constexpr,
    ASM: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    WORDS: tl.constexpr = HEAD_DIM // 8
    QUARTER: tl.constexpr = HEAD_DIM // 4
    GROUPS: tl.constexpr = HEAD_DIM // 32

    row = tile * ROW_TILE + tl.arange(0, ROW_TILE)
    position = row // GROUP  # in the chunk
    used = position < n
    offset = ((head * GROUP + row % GROUP) * n + position)[:, None] * HEAD_DIM
    lane = tl.arange(0, QUARTER)
    queries = ()
    acc = ()
    for i in tl.static_range(4):
        q = tl.load(query_ptr + offset + i * QUARTER + lane[None, :], mask=used[:, None], other=0.0)
        queries = queries + (q.to(tl.float16),)
        acc = acc + (tl.zeros([ROW_TILE, QUARTER], tl.float32),)
    peak = tl.full([ROW_TILE], LOWEST, tl.float32)
    total = tl.zeros([ROW_TILE], tl.float32)

    token = tl.arange(0, TOKENS)
    word = tl.arange(0, WORDS)
    for page in tl.range(0, num_blocks * BLOCK_PAGES):
        block = tl.load(table_ptr + page // BLOCK_PAGES).to(tl.int64)
        base = block * block_stride + (head * BLOCK_PAGES + page % BLOCK_PAGES) * (12 * HEAD_DIM)
        # Within the page, in 16-bit units: K codes 0, scale 4 D, zero 5 D; V codes 6 D, scale 10 D, zero 11 D.
        key_words = tl.load(words_ptr + base + word[:, None] * TOKENS + token[None, :])
        value_words = tl.load(words_ptr + base + 6 * HEAD_DIM + token[:, None] * WORDS + word[None, :])
        scores = tl.zeros([ROW_TILE, TOKENS], tl.float32)
        for i in tl.static_range(4):
            pairs = tl.join(unpack(key_words, i, ASM), unpack(key_words, i + 4, ASM))
            unit = tl.reshape(tl.permute(pairs, (0, 2, 1)), [QUARTER, TOKENS])
            scale = tl.load(halves_ptr + base + 4 * HEAD_DIM + i * QUARTER + lane)
            zero = tl.load(halves_ptr + base + 5 * HEAD_DIM + i * QUARTER + lane)
            key = fused_multiply_add(unit, scale[:, None], zero[:, None], ASM)
            scores = tl.dot(queries[i], key, scores)
        scores = scores * scale_log2
        if SINKS > 0:
            scores = tl.where((token + page * TOKENS >= SINKS)[None, :], scores, -float("inf"))
        weights, decay, peak, total = softmax_step(scores, peak, total)
        new_acc = ()
        for i in tl.static_range(4):
            pairs = tl.join(unpack(value_words, i, ASM), unpack(value_words, i + 4, ASM))
            unit = tl.reshape(pairs, [TOKENS, QUARTER])
            scale = tl.load(halves_ptr + base + 10 * HEAD_DIM + (i * GROUPS // 4) * TOKENS + token)
            zero = tl.load(halves_ptr + base + 11 * HEAD_DIM + (i * GROUPS // 4) * TOKENS + token)
            value = fused_multiply_add(unit, scale[:, None], zero[:, None], ASM)
            new_acc = new_acc + (tl.dot(weights, value, acc[i] * decay),)
        acc = new_acc

    state = (peak, total, acc)
    every = tl.full([ROW_TILE], 1 << 30, tl.int32)
    if SINKS > 0:
        keys = sink_ptr + head * (2 * SINKS * HEAD_DIM)
        count = tl.where(num_blocks > 0, SINKS, 0)
        for start in tl.range(0, count, SINK_TILE):
            state = attend_plain(
                queries, keys, keys + SINKS * HEAD_DIM, start, count, every, scale_log2, state,
                HEAD_DIM, SINK_TILE,
            )  # fmt: skip
    chunk = head * n * HEAD_DIM
    last = tl.minimum(n, (tile * ROW_TILE + ROW_TILE - 1) // GROUP + 1)
    for start in tl.range(0, last, KEY_TILE):
        state = attend_plain(
            queries, key_ptr + chunk, value_ptr + chunk, start, n, position + 1, scale_log2, state,
            HEAD_DIM, KEY_TILE,
        )  # fmt: skip

    peak, total, acc = state
    for i in tl.static_range(4):
        tl.store(
            out_ptr + offset + i * QUARTER + lane[None, :],
            acc[i] / total[:, None],
            mask=used[:, None],
        )


def chunk_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix: PackedPrefix,
    *,
    layer: int,
    scale: float,
    asm: bool,
) -> Tensor:
    """`PackedKernels.chunk_attention`. Never synchronizes."""
    heads, n, head_dim = keys.shape
    group = query.shape[0] // heads
    query, keys, values = query.contiguous(), keys.contiguous(), values.contiguous()
    out = torch.empty_like(query)
    pool = prefix.layout.layer_pages(prefix.pool, layer)
    words = pool.view(torch.int16)
    chunk_attention_fwd_kernel[(triton.cdiv(group * n, ROW_TILE.value), heads)](
        query,
        keys,
        values,
        words,
        pool.view(torch.float16),
        prefix.table,
        prefix.sinks[layer],
        out,
        scale * LOG2E,
        n,
        prefix.table.numel(),
        words.stride(0),
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_PAGES=pool.shape[2],
        SINKS=prefix.sinks.shape[-2],
        ASM=asm,
        **OPTIONS,
    )
    return out
