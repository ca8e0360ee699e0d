"""Shards of packed blocks: byte ranges, and nothing but byte ranges, between groups of different sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.kernels.cpu import NativeKernels
from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.presets import PRESETS, preset
from kvferry.kernels.reference import quantize_pages
from kvferry.kernels.shards import (
    ByteRange,
    Piece,
    TensorParallel,
    resharding,
    shard_layout,
    shard_ranges,
    tail_ranges,
)
from kvferry.kernels.spec import KVQuantSpec, LayerSpec, TensorSpec

LAYERS = [
    LayerSpec(),
    LayerSpec(key=TensorSpec(bits=4, group_size=64, scales="8bit", boost=1), value=TensorSpec(bits=16)),
    LayerSpec(key=TensorSpec(boost=6), value=TensorSpec(group_size=64, scales="8bit")),
    LayerSpec(key=TensorSpec(bits=16), value=TensorSpec(bits=8)),
]


def group_sizes(heads: int) -> list[int]:
    """Divisors of the heads, and groups in which two and three ranks hold the same head."""
    return [size for size in range(1, heads + 1) if heads % size == 0] + [2 * heads, 3 * heads]


@st.composite
def layouts(draw: st.DrawFn) -> BlockLayout:
    num_layers = draw(st.integers(1, 4))
    if draw(st.booleans()):
        spec = preset(draw(st.sampled_from(sorted(PRESETS))))
    else:
        places = draw(st.sets(st.integers(0, num_layers - 1)))
        overrides = tuple((place, draw(st.sampled_from(LAYERS))) for place in sorted(places))
        spec = KVQuantSpec(block_size=draw(st.sampled_from((64, 128))), overrides=overrides)
    spec = dataclasses.replace(spec, sink_tokens=draw(st.integers(0, 5)))
    heads, head_dim = draw(st.sampled_from((1, 2, 3, 4, 6, 8))), draw(st.sampled_from((16, 64, 80)))
    return BlockLayout(num_layers=num_layers, num_kv_heads=heads, head_dim=head_dim, spec=spec)


def cut(payload: bytes, ranges: Sequence[ByteRange]) -> bytes:
    return b"".join(payload[offset : offset + length] for offset, length in ranges)


def written(ranges: Sequence[ByteRange], shard: bytes, into: bytearray) -> int:
    position = 0
    for offset, length in ranges:
        into[offset : offset + length] = shard[position : position + length]
        position += length
    return position


def payload_of(layout: BlockLayout, block_index: int, seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return bytes(
        torch.randint(0, 256, (layout.payload_bytes(block_index),), dtype=torch.uint8, generator=generator).numpy()
    )


@settings(deadline=None, max_examples=150)
@given(layout=layouts(), block_index=st.integers(0, 2), data=st.data())
def test_shards_are_slices_and_go_from_any_group_to_any(
    layout: BlockLayout, block_index: int, data: st.DataObject
) -> None:
    heads = layout.num_kv_heads
    sizes = st.sampled_from(group_sizes(heads))
    source, target = (TensorParallel(heads, data.draw(sizes)) for _ in range(2))
    payload = payload_of(layout, block_index, data.draw(st.integers(0, 2**31)))
    shards = {}
    for group in (source, target):
        shards[group] = [
            cut(payload, shard_ranges(layout, block_index, group.heads(rank))) for rank in range(group.size)
        ]
        for rank, shard in enumerate(shards[group]):
            assert len(shard) == shard_layout(layout, group.heads(rank)).payload_bytes(block_index)

    whole = bytearray(len(payload))
    stored = 0
    for rank in range(source.size):
        if source.stores(rank):
            stored += written(shard_ranges(layout, block_index, source.heads(rank)), shards[source][rank], into=whole)
    assert bytes(whole) == payload
    assert stored == len(payload), "heads that several ranks hold are stored once"

    for rank in range(target.size):
        pieces = resharding(layout, block_index, source, target, rank)
        built = bytearray(len(shards[target][rank]))
        end = 0
        for piece in pieces:
            assert piece.target_offset == end, "each byte is written once, in order"
            end += piece.length
            part = shards[source][piece.source][piece.source_offset :][: piece.length]
            assert len(part) == piece.length > 0
            built[piece.target_offset : end] = part
        assert bytes(built) == shards[target][rank]
        assert sum(piece.length for piece in pieces) == len(shards[target][rank]), "and none is moved beside them"


@settings(deadline=None, max_examples=25)
@given(layout=layouts(), seed=st.integers(0, 2**31), data=st.data())
def test_a_shard_holds_the_sinks_and_pages_of_its_heads(layout: BlockLayout, seed: int, data: st.DataObject) -> None:
    """The ranges against the tensors: what `join_payload` puts where, and what `split_payload` of the shard gives."""
    group = TensorParallel(layout.num_kv_heads, data.draw(st.sampled_from(group_sizes(layout.num_kv_heads))))
    heads = group.heads(data.draw(st.integers(0, group.size - 1)))
    torch.manual_seed(seed)
    block = torch.zeros(layout.block_bytes, dtype=torch.uint8)
    for index, layer in enumerate(layout.layers):
        keys, values = torch.randn(2, layout.num_kv_heads, layout.block_size, layout.head_dim).half()
        layout.layer_pages(block, index).copy_(quantize_pages(keys, values, layer.page))
    sinks = torch.randn(layout.sink_shape).half()
    payload = bytes(layout.join_payload(block, sinks).numpy())
    shard = bytearray(cut(payload, shard_ranges(layout, 0, heads)))
    own = shard_layout(layout, heads)
    own_block, own_sinks = own.split_payload(torch.frombuffer(shard, dtype=torch.uint8), 0)
    assert own_sinks is not None and torch.equal(own_sinks, sinks[:, heads.start : heads.stop])
    for index in range(layout.num_layers):
        expected = layout.layer_pages(block, index)[heads.start : heads.stop]
        assert torch.equal(own.layer_pages(own_block, index), expected)


@settings(deadline=None, max_examples=60)
@given(layout=layouts(), tokens=st.integers(0, 31), data=st.data())
def test_tails(layout: BlockLayout, tokens: int, data: st.DataObject) -> None:
    group = TensorParallel(layout.num_kv_heads, data.draw(st.sampled_from(group_sizes(layout.num_kv_heads))))
    heads = group.heads(data.draw(st.integers(0, group.size - 1)))
    layers, two, num_heads, _, dim = layout.tail_shape
    tail = torch.randn(layers, two, num_heads, tokens, dim).half()
    expected = tail[:, :, heads.start : heads.stop].contiguous().numpy().tobytes()
    assert cut(tail.numpy().tobytes(), tail_ranges(layout, tokens, heads)) == expected


def test_ranges_are_as_few_as_can_be() -> None:
    layout = BlockLayout(num_layers=30, num_kv_heads=6, head_dim=64, spec=preset("kv2"))
    whole = (ByteRange(0, layout.payload_bytes(1)),)
    assert shard_ranges(layout, 1, range(6)) == whole
    assert len(shard_ranges(layout, 1, range(2, 4))) == 30, "one a layer"
    one, three = TensorParallel(6, 1), TensorParallel(6, 3)
    assert resharding(layout, 1, three, three, 1) == (Piece(1, 0, 0, layout.payload_bytes(1) // 3),)
    assert len(resharding(layout, 1, one, three, 1)) == 30
    assert len(resharding(layout, 1, three, one, 0)) == 90


def test_readers_of_a_head_are_spread_over_its_holders() -> None:
    source, target = TensorParallel(2, 4), TensorParallel(2, 4)
    layout = BlockLayout(num_layers=2, num_kv_heads=2, head_dim=64, spec=preset("kv2"))
    used = [{piece.source for piece in resharding(layout, 1, source, target, rank)} for rank in range(4)]
    assert used == [{0}, {1}, {2}, {3}]
    assert [source.stores(rank) for rank in range(4)] == [True, False, True, False]


def test_groups_that_cannot_be_are_refused() -> None:
    layout = BlockLayout(num_layers=1, num_kv_heads=6, head_dim=64, spec=preset("kv2"))
    for size in (0, 4, 5, 9, -6):
        with pytest.raises(ValueError, match="divisor or a multiple of 6"):
            TensorParallel(6, size)
    for rank in (-1, 3):
        with pytest.raises(ValueError, match=f"no rank {rank} among 3"):
            TensorParallel(6, 3).heads(rank)
    for heads in (range(0), range(5, 7), range(0, 4, 2), range(-1, 2)):
        with pytest.raises(ValueError, match="no run of KV heads"):
            shard_ranges(layout, 0, heads)
    with pytest.raises(ValueError, match="4 KV heads, a layout with 6"):
        resharding(layout, 0, TensorParallel(4, 2), TensorParallel(6, 2), 0)


@pytest.mark.parametrize("name", ["kv2", "kv4", "kv16", "mixed"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_attention_on_a_shard_has_the_bits_of_the_whole_model(
    native: NativeKernels, make_cache: Callable[..., Any], name: str, size: int
) -> None:
    """Every rank's blocks are cut out of whole payloads, block 0 with its sinks, and read by the C kernels."""
    if name == "mixed":
        options: dict[str, Any] = {"overrides": ((1, LAYERS[2]), (2, LAYERS[1])), "sink_tokens": 4}
    else:
        spec = preset(name)
        options = {"layer": spec.layer, "sink_tokens": spec.sink_tokens}
    cache = make_cache(num_layers=3, kv_heads=4, blocks=5, slots=2, **options)
    layout, tables, tails, pairs = cache.layout, [[0, 3, 1], [2, 4]], [37, 128], 3
    query = cache.query(pairs, 2)
    group = TensorParallel(4, size)
    firsts = {table[0]: row for row, table in enumerate(tables)}
    for rank in range(group.size):
        heads = group.heads(rank)
        own = shard_layout(layout, heads)
        pool = torch.empty(5, own.block_bytes, dtype=torch.uint8)
        sinks = torch.empty(2, *own.sink_shape, dtype=torch.float16)
        for block in range(5):
            row = firsts.get(block)
            index = 1 if row is None else 0
            payload = layout.join_payload(cache.pool[block], None if row is None else cache.sinks[row])
            shard = bytearray(cut(bytes(payload.numpy()), shard_ranges(layout, index, heads)))
            pool[block], own_sinks = own.split_payload(torch.frombuffer(shard, dtype=torch.uint8), index)
            if row is not None:
                sinks[row] = own_sinks
        own_tails = cache.tails[:, :, :, heads.start : heads.stop].contiguous()
        mine = dataclasses.replace(cache, layout=own, pool=pool, sinks=sinks, tails=own_tails)
        asked = slice(heads.start * pairs, heads.stop * pairs)
        for layer in range(3):
            expected = native.decode_attention(query, cache.batch(tables, tails), layer=layer, scale=cache.scale)
            actual = native.decode_attention(
                query[:, asked].contiguous(), mine.batch(tables, tails), layer=layer, scale=cache.scale
            )
            assert torch.equal(actual, expected[:, asked])
