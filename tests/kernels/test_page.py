"""The bytes of a page, for every format."""

from __future__ import annotations

import hashlib
import itertools
import struct

import pytest
import torch
from torch import Tensor

from kvferry.kernels.page import Packed, PageFormat, planar_pack, planar_unpack
from kvferry.kernels.spec import CODE_BITS, GROUP_SIZES, SCALES, LayerSpec, TensorSpec

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
TENSORS = [TensorSpec(bits=16)] + [
    TensorSpec(bits=bits, group_size=group, scales=scales)
    for bits, group, scales in itertools.product(CODE_BITS[:-1], GROUP_SIZES, SCALES)
    if (bits, scales) != (8, "8bit")
]
BOOSTED = [TensorSpec(group_size=128, scales="8bit", boost=4), TensorSpec(boost=6), TensorSpec(group_size=16, boost=2)]
CASES = [*((tensor, is_key) for tensor in TENSORS for is_key in (True, False)), *((tensor, True) for tensor in BOOSTED)]


def page_of(head_dim: int = 64, key: TensorSpec | None = None, value: TensorSpec | None = None) -> PageFormat:
    return PageFormat(head_dim, LayerSpec(key=key or TensorSpec(), value=value or TensorSpec()))


def random_side(page: PageFormat, tensor: TensorSpec, is_key: bool, *lead: int) -> Packed | Tensor:
    if tensor.bits == 16:
        return torch.randn(*lead, page.tokens, page.head_dim).half()
    meta = (page.k_groups, page.head_dim) if is_key else (page.tokens, page.v_groups)
    codes = torch.randint(0, 2**tensor.bits, (*lead, page.tokens, page.head_dim), dtype=torch.uint8)
    channels = None
    if tensor.boost:
        order = torch.rand(*lead, page.head_dim).argsort(-1)
        channels = order[..., : page.boosted].sort(-1).values.to(torch.uint8)
        high = torch.zeros(*lead, page.head_dim, dtype=torch.uint8).scatter(-1, channels.long(), 3)
        codes |= (torch.randint(0, 4, codes.shape, dtype=torch.uint8) & high.unsqueeze(-2)) << 2
    if tensor.scales == "fp16":
        return Packed(codes, torch.randn(*lead, *meta).half(), torch.randn(*lead, *meta).half(), channels)
    scale, zero = torch.randint(0, 256, (2, *lead, *meta), dtype=torch.uint8)
    return Packed(codes, scale, zero, channels)


def random_page(page: PageFormat, *lead: int) -> tuple[Packed | Tensor, Packed | Tensor]:
    return (
        random_side(page, page.spec.key, True, *lead),
        random_side(page, page.spec.value, False, *lead),
    )


def numbers(x: Tensor) -> bytes:
    """As stored, one at a time."""
    values = x.flatten().tolist()
    return struct.pack(f"<{len(values)}e", *values) if x.dtype == torch.float16 else bytes(values)


def pack_by_hand(page: PageFormat, keys: Packed | Tensor, values: Packed | Tensor) -> bytes:
    """A page from the description in page.py, one value at a time."""
    d, out = page.head_dim, b""

    def planar(codes: list[int], plane: int) -> list[int]:
        fields, quarter = [code >> (2 * plane) & 3 for code in codes], len(codes) // 4
        return [sum(fields[i * quarter + b] << (2 * i) for i in range(4)) for b in range(quarter)]

    if isinstance(keys, Tensor):
        out += numbers(keys)
    else:
        codes = keys.codes.tolist()
        for tile in range(page.tiles):
            for plane in range(page.spec.key.bits // 2):
                rows = [planar(codes[32 * tile + token], plane) for token in range(32)]
                for word in range(d // 8):
                    for token in range(32):
                        out += struct.pack("<H", rows[token][2 * word] | rows[token][2 * word + 1] << 8)
        if keys.channels is not None:
            channels = keys.channels.tolist()
            for tile in range(page.tiles):
                rows = [planar([codes[32 * tile + token][c] for c in channels], 1) for token in range(32)]
                for word in range(len(channels) // 8):
                    for token in range(32):
                        out += struct.pack("<H", rows[token][2 * word] | rows[token][2 * word + 1] << 8)
        out += numbers(keys.scale) + numbers(keys.zero)
        if keys.channels is not None:
            out += numbers(keys.channels)
            out += b"\xff" * (-len(keys.channels) % 16)
    if isinstance(values, Tensor):
        return out + numbers(values)
    codes = values.codes.tolist()
    for tile in range(page.tiles):
        for plane in range(page.spec.value.bits // 2):
            for token in range(32):
                out += bytes(planar(codes[32 * tile + token], plane))
    for meta in (values.scale, values.zero):
        for tile in range(page.tiles):
            for group in range(page.v_groups):
                out += numbers(meta[32 * tile : 32 * tile + 32, group])
    return out


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("tensor", "is_key"), CASES, ids=str)
def test_join_and_split(head_dim: int, tensor: TensorSpec, is_key: bool) -> None:
    page = page_of(head_dim, key=tensor) if is_key else page_of(head_dim, value=tensor)
    keys, values = random_page(page)
    joined = page.join(keys, values)
    assert bytes(joined.tolist()) == pack_by_hand(page, keys, values)
    assert joined.shape == (page.num_bytes,)
    many = random_page(page, 3, 2)
    for expected, actual in zip(many, page.split(page.join(*many)), strict=True):
        if isinstance(expected, Tensor):
            assert isinstance(actual, Tensor) and torch.equal(expected, actual)
        else:
            assert isinstance(actual, Packed)
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@pytest.mark.parametrize(
    ("key", "value", "head_dim", "size"),
    [
        (TensorSpec(), TensorSpec(), 128, 24 * 128),
        (TensorSpec(), TensorSpec(), 80, 4 * 32 * 80 // 8 + 4 * 80 + 4 * 32 * 3),
        (TensorSpec(scales="8bit"), TensorSpec(group_size=64, scales="8bit"), 64, 2 * 512 + 2 * 64 + 2 * 32),
        (TensorSpec(bits=4, group_size=64), TensorSpec(), 64, 2048 + 4 * 64 + 1024 + 4 * 64 * 2),
        (TensorSpec(group_size=16), TensorSpec(bits=8), 64, 512 + 4 * 64 * 2 + 2048 + 4 * 32 * 2),
        (TensorSpec(bits=16), TensorSpec(bits=16), 64, 8192),
        (TensorSpec(group_size=128, boost=4), TensorSpec(), 64, 2048 + 512 + 256 + 16 + 2048 + 128 * 2 * 4),
        (TensorSpec(boost=4), TensorSpec(), 80, 640 + 192 + 320 + 32 + 640 + 4 * 32 * 3),
    ],
    ids=str,
)
def test_sizes(key: TensorSpec, value: TensorSpec, head_dim: int, size: int) -> None:
    assert page_of(head_dim, key, value).num_bytes == size


def test_golden_bytes() -> None:
    """D = 32: token t has K code t % 4 and V code 3 in channel 9 alone, everything else 0."""
    page = page_of(32)
    k, v = torch.zeros(2, 32, 32, dtype=torch.uint8)
    k[:, 9], v[:, 9] = torch.arange(32) % 4, 3
    nothing = torch.zeros(1, 32).half()
    joined = page.join(Packed(k, nothing, nothing), Packed(v, nothing.T, nothing.T)).tolist()
    # Channel 9 is field 1 of planar byte 1, so it is bits 10-11 of word 0 and bits 2-3 of byte 1.
    assert joined[:8] == [0, 0, 0, 1 << 2, 0, 2 << 2, 0, 3 << 2]
    assert sum(joined[64 : 12 * 32]) == 0
    assert joined[12 * 32 : 12 * 32 + 16] == [0, 3 << 2, 0, 0, 0, 0, 0, 0] * 2
    assert len(joined) == 24 * 32


@pytest.mark.parametrize(
    ("key", "value", "digest"),
    [
        (TensorSpec(), TensorSpec(), "0dcdefebb68e93be"),
        (
            TensorSpec(bits=4, group_size=64, scales="8bit"),
            TensorSpec(group_size=64, scales="8bit"),
            "ebb61383e8ecd437",
        ),
        (TensorSpec(group_size=16), TensorSpec(bits=4, group_size=16), "80cb51ac2b159c90"),
        (TensorSpec(group_size=128, boost=4), TensorSpec(group_size=64, scales="8bit"), "8186ca6b03037660"),
        (TensorSpec(bits=8), TensorSpec(bits=16), "4fb005f02f1d9d43"),
    ],
    ids=str,
)
def test_golden_digests(key: TensorSpec, value: TensorSpec, digest: str) -> None:
    """Pages of counting codes, for formats that are in stores already."""
    page = page_of(80, key, value)

    def side(tensor: TensorSpec, *meta: int) -> Packed | Tensor:
        counting = torch.arange(page.tokens * 80).view(page.tokens, 80)
        if tensor.bits == 16:
            return (counting % 251).half()
        numbers = torch.arange(meta[0] * meta[1]).view(meta) % 200
        stored = numbers.half() if tensor.scales == "fp16" else numbers.to(torch.uint8)
        codes = (counting % 251 % 2**tensor.bits).to(torch.uint8)
        if not tensor.boost:
            return Packed(codes, stored, stored.flip(0))
        channels = torch.arange(page.boosted) * 3
        codes[:, channels] = (counting % 16).to(torch.uint8)[:, channels]
        return Packed(codes, stored, stored.flip(0), channels.to(torch.uint8))

    joined = page.join(side(key, page.k_groups, 80), side(value, page.tokens, page.v_groups))
    assert hashlib.sha256(bytes(joined.tolist())).hexdigest()[:16] == digest


def test_planar_pack_round_trip() -> None:
    codes = torch.randint(0, 4, (5, 96), dtype=torch.uint8)
    assert torch.equal(planar_unpack(planar_pack(codes)), codes)


@pytest.mark.parametrize("head_dim", [0, 31, 40, 272])
def test_head_dim_outside_the_format_is_refused(head_dim: int) -> None:
    with pytest.raises(ValueError, match="head_dim"):
        page_of(head_dim)
