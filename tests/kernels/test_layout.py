"""The bytes of a page and of a payload."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from kvferry.kernels.layout import (
    BlockLayout,
    join_page,
    page_bytes,
    planar_pack,
    planar_unpack,
    split_page,
)
from kvferry.kernels.spec import KVQuantSpec

HEAD_DIMS = (32, 64, 96, 128, 256)


def parts(head_dim: int, *lead: int) -> tuple[torch.Tensor, ...]:
    d = head_dim
    return (
        torch.randint(0, 4, (*lead, 32, d), dtype=torch.uint8),
        torch.randn(*lead, d).half(),
        torch.randn(*lead, d).half(),
        torch.randint(0, 4, (*lead, 32, d), dtype=torch.uint8),
        torch.randn(*lead, 32, d // 32).half(),
        torch.randn(*lead, 32, d // 32).half(),
    )


def pack_by_hand(
    k: list[list[int]],
    k_scale: list[float],
    k_zero: list[float],
    v: list[list[int]],
    v_scale: list[list[float]],
    v_zero: list[list[float]],
) -> bytes:
    """A page from the table in layout.py, one value at a time."""
    d = len(k_scale)

    def planar(codes: list[int]) -> list[int]:
        quarter = d // 4
        return [sum(codes[i * quarter + b] << (2 * i) for i in range(4)) for b in range(quarter)]

    rows = [planar(token) for token in k]
    out = b""
    for word in range(d // 8):
        for token in range(32):
            out += struct.pack("<H", rows[token][2 * word] | rows[token][2 * word + 1] << 8)
    out += struct.pack(f"<{d}e", *k_scale) + struct.pack(f"<{d}e", *k_zero)
    out += b"".join(bytes(planar(token)) for token in v)
    for numbers in (v_scale, v_zero):
        for group in range(d // 32):
            out += struct.pack("<32e", *(numbers[token][group] for token in range(32)))
    return out


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_join_page_bytes(head_dim: int) -> None:
    page = parts(head_dim)
    assert bytes(join_page(*page).tolist()) == pack_by_hand(*(p.tolist() for p in page))


def test_join_page_golden() -> None:
    """D = 32: token t has K code t % 4 and V code 3 in channel 9 alone, everything else 0."""
    k, v = torch.zeros(2, 32, 32, dtype=torch.uint8)
    k[:, 9], v[:, 9] = torch.arange(32) % 4, 3
    zero = torch.zeros(32).half()
    page = join_page(k, zero, zero, v, zero[:, None], zero[:, None]).tolist()
    # Channel 9 is field 1 of planar byte 1, so it is bits 10-11 of word 0 and bits 2-3 of byte 1.
    assert page[:8] == [0, 0, 0, 1 << 2, 0, 2 << 2, 0, 3 << 2]
    assert sum(page[64 : 12 * 32]) == 0
    assert page[12 * 32 : 12 * 32 + 16] == [0, 3 << 2, 0, 0, 0, 0, 0, 0] * 2
    assert len(page) == 24 * 32


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_split_page_inverts_join_page(head_dim: int) -> None:
    page = parts(head_dim, 3, 2)
    joined = join_page(*page)
    assert joined.shape == (3, 2, page_bytes(head_dim)) == (3, 2, 24 * head_dim)
    for expected, actual in zip(page, split_page(joined, head_dim), strict=True):
        assert torch.equal(expected, actual)


def test_planar_pack_round_trip() -> None:
    codes = torch.randint(0, 4, (5, 96), dtype=torch.uint8)
    assert torch.equal(planar_unpack(planar_pack(codes)), codes)


def layout(**options: int) -> BlockLayout:
    return BlockLayout(num_layers=3, num_kv_heads=2, head_dim=64, spec=KVQuantSpec(**options))


def test_sizes() -> None:
    small = layout(block_size=96)
    assert small.pages == 3
    assert small.pool_shape == (3, 2, 3, 24 * 64)
    assert small.block_bytes == 3 * 2 * 3 * 24 * 64
    assert small.payload_bytes(1) == small.block_bytes
    assert small.payload_bytes(0) == small.block_bytes + 3 * 2 * 2 * 4 * 64 * 2


@pytest.mark.parametrize("sink_tokens", [0, 4, 16])
def test_payload_round_trip(sink_tokens: int) -> None:
    shape = layout(sink_tokens=sink_tokens)
    block = torch.randint(0, 256, shape.pool_shape, dtype=torch.uint8) & 0xBF  # no fp16 in it is Inf or NaN
    sinks = torch.randn(shape.sink_shape).half()
    first = shape.join_payload(block, sinks)
    assert first.shape == (shape.payload_bytes(0),)
    back, back_sinks = shape.split_payload(first, 0)
    assert torch.equal(back, block)
    assert back_sinks is not None and torch.equal(back_sinks, sinks)

    later = shape.join_payload(block, None)
    assert bytes(later.tolist()) == bytes(block.flatten().tolist())
    back, back_sinks = shape.split_payload(later, 7)
    assert torch.equal(back, block) and back_sinks is None


@pytest.mark.parametrize("block_index", [0, 3])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_floats_that_are_not_finite_are_refused(block_index: int, number: float) -> None:
    """Every fp16 of a payload in turn; the codes may be any bytes."""
    shape = layout()
    d = shape.head_dim
    block = torch.zeros(shape.pool_shape, dtype=torch.uint8)
    block[..., : 8 * d] = block[..., 12 * d : 20 * d] = 255
    sinks = torch.zeros(shape.sink_shape).half() if block_index == 0 else None
    payload = shape.join_payload(block, sinks)
    shape.split_payload(payload, block_index)
    bad = torch.tensor([number]).half().view(torch.uint8)
    floats = [*range(8 * d, 12 * d, 2), *range(20 * d, 24 * d, 2)]
    start = shape.sink_bytes // (shape.num_layers * shape.num_kv_heads) if block_index == 0 else 0
    for offset in [*range(0, start, 2), *(start + f for f in floats)]:
        damaged = payload.clone()
        damaged[offset : offset + 2] = bad
        with pytest.raises(ValueError, match="not finite"):
            shape.split_payload(damaged, block_index)


def test_payload_of_block_0_is_one_slice_a_head() -> None:
    shape = layout()
    block = torch.randint(0, 256, shape.pool_shape, dtype=torch.uint8)
    sinks = torch.randn(shape.sink_shape).half()
    slices = shape.join_payload(block, sinks).view(3, 2, -1)
    raw = sinks[1, 0].view(torch.uint8).flatten()
    assert torch.equal(slices[1, 0], torch.cat([raw, block[1, 0].flatten()]))


@pytest.mark.parametrize("block_index", [0, 1])
def test_payload_of_wrong_size_is_refused(block_index: int) -> None:
    shape = layout()
    with pytest.raises(ValueError, match=f"block {block_index} has"):
        shape.split_payload(torch.zeros(shape.payload_bytes(block_index) - 1, dtype=torch.uint8), block_index)


def test_effective_bits() -> None:
    shape = layout(sink_tokens=0)
    assert shape.effective_bits(100) == 16.0  # all in the tail
    assert shape.effective_bits(128) == 3.0
    assert shape.effective_bits(256) == 3.0
    assert shape.effective_bits(192) == pytest.approx((128 * 3 + 64 * 16) / 192)
    assert layout().effective_bits(128) == pytest.approx(3.0 + 4 * 16 / 128)


@pytest.mark.parametrize("head_dim", [0, 31, 48, 288])
def test_head_dim_outside_the_layout_is_refused(head_dim: int) -> None:
    with pytest.raises(ValueError, match="head_dim"):
        BlockLayout(num_layers=1, num_kv_heads=1, head_dim=head_dim, spec=KVQuantSpec())


@pytest.mark.parametrize("options", [{"bits": 4}, {"group_size": 64}, {"block_size": 40}, {"sink_tokens": 17}], ids=str)
def test_spec_outside_this_release_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        KVQuantSpec(**options)
