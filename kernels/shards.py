"""Which bytes of a packed block belong to which KV heads: tensor-parallel ranks exchange blocks as byte ranges.

In a payload each (layer, KV head) is one slice, so the heads of a rank are one range a layer, and a rank's shard is
these ranges one after the other. That is a payload of the same layout with fewer heads: kernels run on it as it is.
Between a group of P ranks and one of D ranks bytes are copied, never repacked. Only numbers here, no bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from kvferry.kernels.layout import BlockLayout


class ByteRange(NamedTuple):
    """Bytes `offset` to `offset + length` of a payload or a tail."""

    offset: int
    length: int


class Piece(NamedTuple):
    """A copy: `length` bytes at `source_offset` of the shard of rank `source`, to `target_offset` of another shard."""

    source: int
    source_offset: int
    target_offset: int
    length: int


@dataclass(frozen=True)
class TensorParallel:
    """A group of ranks that share the KV heads of a model.

    `size` divides the number of KV heads, or is a multiple of it: then `copies` neighbouring ranks hold the same head.
    Raises ValueError for another size.
    """

    num_kv_heads: int
    size: int

    def __post_init__(self) -> None:
        heads, size = self.num_kv_heads, self.size
        if heads < 1 or size < 1 or (heads % size and size % heads):
            raise ValueError(
                f"{size} ranks cannot share {heads} KV heads evenly; take a divisor or a multiple of {heads}"
            )

    @property
    def copies(self) -> int:
        """How many ranks hold the same heads."""
        return max(1, self.size // self.num_kv_heads)

    def heads(self, rank: int) -> range:
        """The KV heads of a rank. Raises ValueError for a rank that does not exist."""
        if not 0 <= rank < self.size:
            raise ValueError(f"there is no rank {rank} among {self.size}")
        count = self.num_kv_heads * self.copies // self.size
        first = rank // self.copies * count
        return range(first, first + count)

    def stores(self, rank: int) -> bool:
        """Whether this rank hands its heads to the store: of the ranks with the same heads, one does."""
        self.heads(rank)
        return rank % self.copies == 0

    def holder(self, head: int, reader: int) -> int:
        """A rank that holds `head`. Where several do, readers of different numbers get different ones."""
        first = head * self.size // self.num_kv_heads
        return first + reader % self.copies


def shard_layout(layout: BlockLayout, heads: range) -> BlockLayout:
    """The layout of a shard: pools, kernels and `split_payload` take it like any other."""
    _check_heads(layout, heads)
    return replace(layout, num_kv_heads=len(heads))


def shard_ranges(layout: BlockLayout, block_index: int, heads: range) -> tuple[ByteRange, ...]:
    """Where the shard of these heads lies in a whole payload, in the order of the shard; adjacent ranges are one.

    Together they have `shard_layout(layout, heads).payload_bytes(block_index)` bytes. Block 0 has its sinks in them.
    """
    return _merged(layer_ranges(layout, min(block_index, 1), heads))


@functools.lru_cache(maxsize=64)
def layer_ranges(layout: BlockLayout, block_index: int, heads: range) -> tuple[ByteRange, ...]:
    """The same by layer: one range each, which no two layers share."""
    _check_heads(layout, heads)
    ranges = []
    start = 0
    for slice_bytes in _slice_sizes(layout, block_index):
        ranges.append(ByteRange(start + heads.start * slice_bytes, len(heads) * slice_bytes))
        start += layout.num_kv_heads * slice_bytes
    return tuple(ranges)


def tail_ranges(layout: BlockLayout, num_tokens: int, heads: range) -> tuple[ByteRange, ...]:
    """Where these heads lie in the fp16 tail [layer][K|V][kv_head][token][D] of `num_tokens` tokens."""
    _check_heads(layout, heads)
    head_bytes = num_tokens * layout.head_dim * 2
    row = layout.num_kv_heads * head_bytes
    return _merged(
        ByteRange(index * row + heads.start * head_bytes, len(heads) * head_bytes)
        for index in range(2 * layout.num_layers)
    )


def resharding(
    layout: BlockLayout, block_index: int, source: TensorParallel, target: TensorParallel, rank: int
) -> tuple[Piece, ...]:
    """The copies that make up the payload of `rank` of the target group out of the source ranks' payloads.

    In the order of the target's bytes, each of which is written once. `layout` is the whole model's.
    """
    for group in (source, target):
        if group.num_kv_heads != layout.num_kv_heads:
            raise ValueError(f"a group over {group.num_kv_heads} KV heads, a layout with {layout.num_kv_heads}")
    sizes = _slice_sizes(layout, block_index)
    held = {holder: source.heads(holder) for holder in {source.holder(head, rank) for head in target.heads(rank)}}
    pieces: list[Piece] = []
    starts = dict.fromkeys(held, 0)  # of the layer in each source shard
    end = 0
    for slice_bytes in sizes:
        for head in target.heads(rank):
            holder = source.holder(head, rank)
            offset = starts[holder] + (head - held[holder].start) * slice_bytes
            last = pieces[-1] if pieces else None
            if last and last.source == holder and last.source_offset + last.length == offset:
                pieces[-1] = last._replace(length=last.length + slice_bytes)
            elif slice_bytes:
                pieces.append(Piece(holder, offset, end, slice_bytes))
            end += slice_bytes
        for holder, heads in held.items():
            starts[holder] += len(heads) * slice_bytes
    return tuple(pieces)


def _slice_sizes(layout: BlockLayout, block_index: int) -> list[int]:
    """By layer, the bytes of one KV head in a payload."""
    sinks = layout.sink_bytes // (layout.num_layers * layout.num_kv_heads) if block_index == 0 else 0
    return [sinks + layer.head_bytes for layer in layout.layers]


def _check_heads(layout: BlockLayout, heads: range) -> None:
    if heads.step != 1 or not 0 <= heads.start < heads.stop <= layout.num_kv_heads:
        raise ValueError(f"{heads} is no run of KV heads of a layout that has {layout.num_kv_heads}")


def _merged(ranges: Iterable[ByteRange]) -> tuple[ByteRange, ...]:
    merged: list[ByteRange] = []
    for one in ranges:
        if merged and merged[-1].offset + merged[-1].length == one.offset:
            merged[-1] = merged[-1]._replace(length=merged[-1].length + one.length)
        elif one.length:
            merged.append(one)
    return tuple(merged)
