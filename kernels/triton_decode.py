"""Decode attention straight from packed pages: no dequantized copy of K or V is ever written.

Three kernels, launched in a fixed shape whatever the data, so that a step can be captured in a CUDA graph:

    packed_attention_fwd_kernel   (piece, kv head, sequence)   packed pages of one piece of a context: triton_packed
    tail_attention_fwd_kernel     (kv head, sequence)          the fp16 tail and the fp16 sinks
    merge_fwd_kernel              (query head, sequence)       merges the parts by log-sum-exp

A program reads K and V once for all query heads that share them. Twin of all three:
`reference.ReferenceKernels.decode_attention`. They attend to a share of each context, too; `merge_shares_fwd_kernel`
(query head of a sequence) merges what they give for all shares.
"""

# Triton is untyped, and the annotations of a kernel are Triton's, not Python's.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvferry.kernels.packed import DecodeBatch
from kvferry.kernels.triton_launch import MERGE, TAIL, Device, packed_options
from kvferry.kernels.triton_packed import packed_attention_fwd_kernel
from kvferry.kernels.triton_page import UNIT, page_shape
from kvferry.kernels.triton_pieces import TILE, first_seen, max_pieces, skipped_tiles, tiles_per_piece
from kvferry.kernels.triton_score import LOG2E, LOWEST, log2_scores

TAIL_TILE = tl.constexpr(64)
SINK_TILE = tl.constexpr(16)
MERGE_TILE = tl.constexpr(16)


@triton.constexpr_function
def padded_dim(head_dim: int) -> int:
    """Channels of a tile of unpacked K or V: a power of two."""
    return max(16, 1 << (head_dim - 1).bit_length())


@triton.jit
def attend_rows(
    queries,  # fp16 [padded D, PADDED]
    key_ptr,  # fp16 [count, D]
    value_ptr,  # fp16 [count, D]
    start,
    first,
    count,
    scale_log2,
    peak,
    total,
    acc,  # fp32 [padded D, PADDED]
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Online softmax over rows start .. start + ROWS of unpacked K and V; rows from `count` on do not exist, and with a
    window rows before `first` are not seen."""
    token = start + tl.arange(0, ROWS)
    channel = tl.arange(0, padded_dim(HEAD_DIM))
    exists = token < count
    keys = tl.load(
        key_ptr + token[:, None] * HEAD_DIM + channel[None, :],
        mask=exists[:, None] & (channel < HEAD_DIM)[None, :],
        other=0.0,
    )
    values = tl.load(
        value_ptr + token[None, :] * HEAD_DIM + channel[:, None],
        mask=exists[None, :] & (channel < HEAD_DIM)[:, None],
        other=0.0,
    )
    if WINDOW > 0:
        exists &= token >= first
    scores = log2_scores(tl.dot(keys, queries), scale_log2, SOFTCAP)
    scores = tl.where(exists[:, None], scores, -float("inf"))
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
    TAIL_ROWS: tl.constexpr,  # tokens of a block
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Attention over a sequence's fp16 tail and, once it has packed blocks, over its fp16 sinks: part 0."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    member = tl.arange(0, PADDED)
    used = member < GROUP
    channel = tl.arange(0, padded_dim(HEAD_DIM))
    stored = used[None, :] & (channel < HEAD_DIM)[:, None]
    query_row = query_ptr + ((row * HEADS + head) * GROUP + member[None, :]) * HEAD_DIM
    queries = tl.load(query_row + channel[:, None], mask=stored, other=0.0).to(tl.float16)

    slot = tl.load(slots_ptr + row).to(tl.int64)
    keys = tail_ptr + slot * tail_stride + head * (TAIL_ROWS * HEAD_DIM)
    values = keys + HEADS * TAIL_ROWS * HEAD_DIM
    count = tl.load(tail_lens_ptr + row)
    num_blocks = tl.load(num_blocks_ptr + row)
    seen = first_seen(num_blocks, tail_lens_ptr, row, TAIL_ROWS // TILE, WINDOW)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(seen - num_blocks * TAIL_ROWS, 0)
    peak = tl.full([PADDED], LOWEST, tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    acc = tl.zeros([padded_dim(HEAD_DIM), PADDED], tl.float32)
    for start in tl.range(first // TAIL_TILE * TAIL_TILE, count, TAIL_TILE):
        peak, total, acc = attend_rows(
            queries, keys, values, start, first, count, scale_log2,
            peak, total, acc, HEAD_DIM, TAIL_TILE, WINDOW, SOFTCAP,
        )  # fmt: skip
    if SINKS > 0:
        keys = sink_ptr + slot * sink_stride + head * (2 * SINKS * HEAD_DIM)
        count = tl.where((num_blocks > 0) & (seen < SINKS), SINKS, 0)
        for start in tl.range(0, count, SINK_TILE):
            peak, total, acc = attend_rows(
                queries, keys, keys + SINKS * HEAD_DIM, start, seen, count, scale_log2,
                peak, total, acc, HEAD_DIM, SINK_TILE, WINDOW, SOFTCAP,
            )  # fmt: skip

    part = (row * HEADS + head) * parts * GROUP + member
    divisor = tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + part[None, :] * HEAD_DIM + channel[:, None], acc / divisor[None, :], mask=stored)
    tl.store(lse_ptr + part, tl.where(total == 0.0, -float("inf"), peak + tl.log2(divisor)), mask=used)


@triton.jit(do_not_specialize=["parts"])
def merge_fwd_kernel(
    part_ptr,  # fp32 [B, H, parts, GROUP, D]
    lse_ptr,  # fp32 [B, H, parts, GROUP], base 2
    num_blocks_ptr,  # int32 [B]
    tail_lens_ptr,  # int32 [B]
    out_ptr,  # [B, H * GROUP, D]; of a share of a context [B, H * GROUP, D + 1], the last: as lse_ptr
    parts,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    WINDOW: tl.constexpr,
    SHARE: tl.constexpr,  # whether the context is a share
):
    """Merges the parts of one query head. Twin: `reference.merge`."""
    query_head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    num_blocks = tl.load(num_blocks_ptr + row)
    num_tiles = num_blocks * BLOCK_TILES
    seen = first_seen(num_blocks, tail_lens_ptr, row, BLOCK_TILES, WINDOW)
    num_tiles -= skipped_tiles(num_tiles, seen, WINDOW)
    count = 1 + tl.cdiv(num_tiles, tiles_per_piece(num_tiles))
    first = (row * HEADS + query_head // GROUP) * parts * GROUP + query_head % GROUP
    channel = tl.arange(0, padded_dim(HEAD_DIM))
    exists = channel < HEAD_DIM
    peak = LOWEST
    total = 0.0
    acc = tl.zeros([padded_dim(HEAD_DIM)], tl.float32)
    for start in tl.range(0, count, MERGE_TILE):
        index = start + tl.arange(0, MERGE_TILE)
        part = first + index * GROUP
        lse = tl.load(lse_ptr + part, mask=index < count, other=-float("inf"))
        outs = tl.load(
            part_ptr + part[:, None] * HEAD_DIM + channel[None, :],
            mask=(index < count)[:, None] & exists[None, :],
            other=0.0,
        )
        new_peak = tl.maximum(peak, tl.max(lse, axis=0))
        weights = tl.exp2(lse - new_peak)
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(weights, axis=0)
        acc = acc * decay + tl.sum(outs * weights[:, None], axis=0)
        peak = new_peak
    out_row = out_ptr + (row * HEADS * GROUP + query_head) * (HEAD_DIM + SHARE)
    if SHARE:
        is_empty = total == 0.0
        total = tl.where(is_empty, 1.0, total)
        tl.store(out_row + HEAD_DIM, tl.where(is_empty, -float("inf"), peak + tl.log2(total)))
    tl.store(out_row + channel, acc / total, mask=exists)


@triton.jit(do_not_specialize=["num_shares", "share_length"])
def merge_shares_fwd_kernel(
    shares_ptr,  # fp32 [R, rows, D + 1]
    out_ptr,  # fp32 [rows, D]
    num_shares,
    share_length,
    HEAD_DIM: tl.constexpr,
):
    """Merges the shares of one query head, in their order. Twin: `reference.ReferenceKernels.merge_shares`."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, padded_dim(HEAD_DIM))
    exists = channel < HEAD_DIM
    peak = LOWEST
    for share in tl.range(0, num_shares):
        lse = tl.load(shares_ptr + share * share_length + row * (HEAD_DIM + 1) + HEAD_DIM)
        peak = tl.maximum(peak, lse)
    total = 0.0
    acc = tl.zeros([padded_dim(HEAD_DIM)], tl.float32)
    for share in tl.range(0, num_shares):
        part = shares_ptr + share * share_length + row * (HEAD_DIM + 1)
        weight = tl.exp2(tl.load(part + HEAD_DIM) - peak)
        total += weight
        acc += weight * tl.load(part + channel, mask=exists, other=0.0)
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * HEAD_DIM + channel, acc / total, mask=exists)


def decode_attention(
    query: Tensor,
    batch: DecodeBatch,
    *,
    layer: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    device: Device,
) -> Tensor:
    """`PackedKernels.decode_attention`. Never synchronizes; every launch has a shape fixed by the arguments' shapes."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _attend(query, batch, out, layer=layer, scale=scale, window=window, softcap=softcap, device=device)
    return out


def share_attention(
    query: Tensor, share: DecodeBatch, *, layer: int, scale: float, softcap: float | None, device: Device
) -> Tensor:
    """`PackedKernels.share_attention`; launches as `decode_attention`."""
    rows, query_heads, head_dim = query.shape
    out = query.new_empty(rows, query_heads, head_dim + 1, dtype=torch.float32)
    _attend(query, share, out, layer=layer, scale=scale, window=None, softcap=softcap, device=device)
    return out


def merge_shares(shares: Tensor) -> Tensor:
    """`PackedKernels.merge_shares`: one launch."""
    num_shares, rows, query_heads, width = shares.shape
    shares = shares.contiguous()
    out = shares.new_empty(rows, query_heads, width - 1)
    if out.numel():
        merge_shares_fwd_kernel[(rows * query_heads,)](
            shares, out, num_shares, shares.stride(0), HEAD_DIM=width - 1, **MERGE
        )
    return out


def _attend(
    query: Tensor,
    batch: DecodeBatch,
    out: Tensor,
    *,
    layer: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    device: Device,
) -> None:
    """The three kernels. `out` [B, Hq, D], or fp32 [B, Hq, D + 1] of a share of each context."""
    rows, query_heads, head_dim = query.shape
    pool = batch.layout.layer_pages(batch.pool, layer)
    heads = pool.shape[1]
    shape = page_shape(batch.layout.layers[layer].page)
    block_tiles = batch.layout.block_size // TILE.value
    sinks = batch.sinks.shape[-2]
    group = query_heads // heads
    padded = max(device.narrow, triton.next_power_of_2(group))
    window = window or 0
    rule = {"WINDOW": window, "SOFTCAP": softcap or 0.0}
    pieces = max_pieces(batch.block_tables.shape[1] * block_tiles, window)
    query = query.contiguous()
    partial = query.new_empty(rows, heads, 1 + pieces, group, head_dim, dtype=torch.float32)
    lse = query.new_empty(rows, heads, 1 + pieces, group, dtype=torch.float32)
    scale_log2 = scale * LOG2E
    if pieces:
        packed_attention_fwd_kernel[(pieces, heads, rows)](
            query,
            pool,
            pool.view(torch.int16),
            pool.view(torch.int32),
            pool.view(torch.float16),
            batch.block_tables,
            batch.num_blocks,
            batch.tail_lens,
            partial,
            lse,
            scale_log2,
            pool.stride(0) // UNIT,
            batch.block_tables.stride(0),
            1 + pieces,
            HEADS=heads,
            GROUP=group,
            PADDED=padded,
            SHAPE=shape,
            BLOCK_TILES=block_tiles,
            SINKS=sinks,
            **rule,
            ASM=device.asm,
            **packed_options(device, shape, padded),
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
        **rule,
        **TAIL,
    )
    merge_fwd_kernel[(query_heads, rows)](
        partial,
        lse,
        batch.num_blocks,
        batch.tail_lens,
        out,
        1 + pieces,
        HEADS=heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_TILES=block_tiles,
        WINDOW=window,
        SHARE=int(out.shape[-1] > head_dim),
        **MERGE,
    )
