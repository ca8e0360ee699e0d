"""Which channels of K are boosted: those of the widest range in a page. Twin: `reference.widest_channels`."""

# Triton is untyped, and the annotations of a kernel are Triton's, not Python's.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from kvferry.kernels import reference
from kvferry.kernels.page import NO_CHANNEL as FILLING
from kvferry.kernels.triton_pieces import TILE

LIMIT = tl.constexpr(reference.LIMIT)
NO_CHANNEL = tl.constexpr(FILLING)


@triton.constexpr_function
def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


@triton.jit
def list_channels(page_ptr, token_stride, first_token, sink_tokens, bytes_ptr, SHAPE: tl.constexpr):
    """Writes the list of a page: page_ptr fp16 [tokens, D], its first token; bytes_ptr: where the page goes.

    A channel is boosted if fewer than N come before it, in the order of ranges; equal ones in the order of channels.
    """
    HEAD_DIM: tl.constexpr = SHAPE.head_dim
    TILES: tl.constexpr = SHAPE.tiles
    LANES: tl.constexpr = power_of_two(HEAD_DIM)
    channel = tl.arange(0, LANES)
    exists = channel < HEAD_DIM
    lowest = tl.full([LANES], float("inf"), tl.float32)
    highest = tl.full([LANES], -float("inf"), tl.float32)
    for tile in tl.range(0, TILES):
        token = tile * TILE + tl.arange(0, TILE)
        pointers = page_ptr + token[None, :] * token_stride + channel[:, None]
        x = tl.load(pointers, mask=exists[:, None], other=0.0).to(tl.float32)
        x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
        valid = (first_token + token >= sink_tokens)[None, :]
        lowest = tl.minimum(lowest, tl.min(tl.where(valid, x, float("inf")), axis=1))
        highest = tl.maximum(highest, tl.max(tl.where(valid, x, -float("inf")), axis=1))
    spread = tl.where(exists, highest - lowest, -1.0)
    wider = spread[None, :] > spread[:, None]
    before = wider | ((spread[None, :] == spread[:, None]) & (channel[None, :] < channel[:, None]))
    chosen = (tl.sum(before.to(tl.int32), axis=1) < SHAPE.boost.channels).to(tl.int32)
    rank = tl.cumsum(chosen, axis=0) - chosen
    list_ptr = bytes_ptr + SHAPE.boost.listed
    tl.store(list_ptr + rank, channel.to(tl.uint8), mask=chosen > 0)
    filling = SHAPE.boost.channels + tl.arange(0, 16)
    tl.store(list_ptr + filling, tl.full([16], NO_CHANNEL, tl.uint8), mask=filling < SHAPE.boost.room)


@triton.jit
def is_listed(bytes_ptr, channel, BOOST: tl.constexpr):
    """bool [n] for channels [n], from the list of a page."""
    rank = tl.arange(0, power_of_two(BOOST.channels))
    listed = tl.load(bytes_ptr + BOOST.listed + rank, mask=rank < BOOST.channels, other=NO_CHANNEL).to(tl.int32)
    found = (listed[None, :] == channel[:, None]) & (rank < BOOST.channels)[None, :]
    return tl.sum(found.to(tl.int32), axis=1) > 0
