"""The page: every offset and bit of it, in one place. docs/layout.md has the pictures.

A *page* is the unit of quantization: the tokens of one key group (32, 64 or 128) of one KV head. Its blob is

    K codes   uint16 [tile][plane][D/8 words][32 tokens]
    K boost   uint16 [tile][N/8 words][32 tokens]         the highest plane of the N boosted channels
    K scale          [K group][D]                         a group: `group_size` tokens of a channel
    K zero           [K group][D]
    K channels uint8 [N]                                  which are boosted, ascending; then 255 up to 16 bytes
    V codes   uint8  [tile][plane][32 tokens][D/4 bytes]
    V scale          [tile][V group][32 tokens]           a group: `group_size` channels of a token, the last one
    V zero           [tile][V group][32 tokens]           shorter where D is no multiple

with tiles of 32 tokens, and scales and zero points as `scales.py` stores them. Everything is little-endian, and every
part begins at a multiple of 16 bytes. A code of 4 or 8 bits is two or four *planes* of 2 bits, low bits first: every
plane is laid out as if it were alone. A boosted channel of K has two more bits than the others: a plane in a place of
its own, so that all channels are read alike and the boosted ones once more. With 16 bits there are no codes and no
scales, but fp16 [tokens][D] in their place.

Planes are *planar*: byte b of a token holds, in its four 2-bit fields i = 0..3 (low bits first), the codes of channels
i * D/4 + b. K keeps two such bytes as one 16-bit word, with words as rows and tokens as columns: a row of 16 tokens is
one AVX2 register, and a [32, D/8] tile of words is a tensor-core operand before it is unpacked.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvferry.kernels.spec import PAGE, LayerSpec, TensorSpec

HEAD_DIMS = range(16, 257, 16)
"""Head dimensions that a page can hold. Which of them a kernel takes is its own matter."""


PART_ALIGNMENT = 16
"""Bytes; only the list of boosted channels is ever filled up to it."""
NO_CHANNEL = 255


class Packed(NamedTuple):
    """K or V of pages in parts: what the fit makes and the packing takes.

    codes: uint8 [..., tokens, D]; scale and zero, as stored: K [..., K group, D], V [..., tokens, V group];
    channels: uint8 [..., N], the boosted channels of K.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    channels: Tensor | None = None


class Offsets(NamedTuple):
    """Where the parts of a page begin, in bytes. With 16 bits, codes are fp16 numbers and nothing else is there."""

    k_codes: int
    k_boost: int
    k_scale: int
    k_zero: int
    k_channels: int
    v_codes: int
    v_scale: int
    v_zero: int
    end: int


@dataclass(frozen=True)
class PageFormat:
    """The page of one layer."""

    head_dim: int
    spec: LayerSpec

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim {self.head_dim} is not supported: it must be a multiple of 16 up to 256")

    @property
    def tokens(self) -> int:
        return self.spec.page_tokens

    @property
    def tiles(self) -> int:
        return self.tokens // PAGE

    @property
    def k_groups(self) -> int:
        """Key groups of a channel."""
        return self.tokens // self.spec.key.group_size

    @property
    def v_groups(self) -> int:
        """Value groups of a token."""
        return -(-self.head_dim // self.spec.value.group_size)

    @property
    def boosted(self) -> int:
        """Channels of K with two more bits."""
        return self.spec.key.boosted_channels(self.head_dim)

    @functools.cached_property
    def offsets(self) -> Offsets:
        key, value = self.spec.key, self.spec.value
        boost = self.tokens * self.boosted * 2 // 8
        k_meta = _meta_bytes(key, self.k_groups * self.head_dim)
        v_meta = _meta_bytes(value, self.v_groups * self.tokens)
        k_codes, v_codes = (self.tokens * self.head_dim * tensor.bits // 8 for tensor in (key, value))
        channels = -(-self.boosted // PART_ALIGNMENT) * PART_ALIGNMENT
        sizes = [k_codes, boost, k_meta, k_meta, channels, v_codes, v_meta, v_meta]
        return Offsets(*(sum(sizes[:i]) for i in range(len(sizes) + 1)))

    @property
    def num_bytes(self) -> int:
        return self.offsets.end

    @property
    def half_parts(self) -> tuple[tuple[int, int], ...]:
        """(begin, end) of the parts that hold fp16 numbers."""
        o = self.offsets
        parts = []
        for tensor, codes, scale, end in (
            (self.spec.key, o.k_codes, o.k_scale, o.k_channels),
            (self.spec.value, o.v_codes, o.v_scale, o.end),
        ):
            if tensor.bits == 16:
                parts.append((codes, end))
            elif tensor.scales == "fp16":
                parts.append((scale, end))
        return tuple(parts)

    def scales_are_finite(self, pages: Tensor) -> bool:
        """Whether the 8-bit scales of pages [..., num_bytes] stand for finite numbers: 248 and above do not."""
        o = self.offsets
        for tensor, begin, end in ((self.spec.key, o.k_scale, o.k_zero), (self.spec.value, o.v_scale, o.v_zero)):
            if tensor.bits < 16 and tensor.scales == "8bit" and bool((pages[..., begin:end] >= 248).any()):
                return False
        return True

    def channels_are_sound(self, pages: Tensor) -> bool:
        """Whether the boosted channels of pages [..., num_bytes] ascend and exist: kernels use them as indices."""
        if not self.boosted:
            return True
        listed = pages[..., self.offsets.k_channels : self.offsets.v_codes].int()
        channels, rest = listed[..., : self.boosted], listed[..., self.boosted :]
        ascend = (channels[..., -1] < self.head_dim).all() and (channels.diff(dim=-1) > 0).all()
        return bool(ascend and (rest == NO_CHANNEL).all())

    def join(self, keys: Packed | Tensor, values: Packed | Tensor) -> Tensor:
        """Page blobs uint8 [..., num_bytes]; with 16 bits, keys or values are fp16 [..., tokens, D]."""
        parts = [keys] if isinstance(keys, Tensor) else self._key_parts(keys)
        parts += [values] if isinstance(values, Tensor) else self._value_parts(values)
        lead = (keys if isinstance(keys, Tensor) else keys.codes).shape[:-2]
        return torch.cat([p.contiguous().view(torch.uint8).reshape(*lead, -1) for p in parts], dim=-1)

    def _key_parts(self, keys: Packed) -> list[Tensor]:
        tiles = torch.unflatten(keys.codes, -2, (self.tiles, PAGE))
        parts = [_words(_planes(tiles, self.spec.key.bits))]
        if keys.channels is None:
            return [*parts, keys.scale, keys.zero]
        index = keys.channels.long()[..., None, None, :].expand(*tiles.shape[:-1], -1)
        high = tiles.gather(-1, index) >> self.spec.key.bits
        room = self.offsets.v_codes - self.offsets.k_channels
        listed = torch.nn.functional.pad(keys.channels, (0, room - self.boosted), value=NO_CHANNEL)
        return [*parts, _words(high), keys.scale, keys.zero, listed]

    def _value_parts(self, values: Packed) -> list[Tensor]:
        codes, scale, zero = (
            torch.unflatten(x, -2, (self.tiles, PAGE)) for x in (values.codes, values.scale, values.zero)
        )
        planes = planar_pack(_planes(codes, self.spec.value.bits))
        return [planes, scale.transpose(-1, -2), zero.transpose(-1, -2)]

    def split(self, pages: Tensor) -> tuple[Packed | Tensor, Packed | Tensor]:
        """Inverse of `join`."""
        return self._split_keys(pages), self._split_values(pages)

    def _split_keys(self, pages: Tensor) -> Packed | Tensor:
        lead, d, o, key = pages.shape[:-1], self.head_dim, self.offsets, self.spec.key
        if key.bits == 16:
            return _cut(pages, o.k_codes, o.k_boost, torch.float16).reshape(*lead, self.tokens, d)
        planes = _cut(pages, o.k_codes, o.k_boost, torch.int16).reshape(*lead, self.tiles, key.bits // 2, d // 8, PAGE)
        codes = _from_planes(_unpack_words(planes))
        dtype = torch.float16 if key.scales == "fp16" else torch.uint8
        scale = _cut(pages, o.k_scale, o.k_zero, dtype).reshape(*lead, self.k_groups, d)
        zero = _cut(pages, o.k_zero, o.k_channels, dtype).reshape(*lead, self.k_groups, d)
        channels = None
        if self.boosted:
            channels = pages[..., o.k_channels : o.k_channels + self.boosted]
            words = _cut(pages, o.k_boost, o.k_scale, torch.int16).reshape(*lead, self.tiles, self.boosted // 8, PAGE)
            index = channels.long()[..., None, None, :].expand(*codes.shape[:-1], -1)
            codes.scatter_add_(-1, index, _unpack_words(words) << key.bits)
        return Packed(codes.flatten(-3, -2), scale, zero, channels)

    def _split_values(self, pages: Tensor) -> Packed | Tensor:
        lead, d, o, value = pages.shape[:-1], self.head_dim, self.offsets, self.spec.value
        if value.bits == 16:
            return _cut(pages, o.v_codes, o.v_scale, torch.float16).reshape(*lead, self.tokens, d)
        packed = _cut(pages, o.v_codes, o.v_scale, torch.uint8)
        codes = _from_planes(planar_unpack(packed.reshape(*lead, self.tiles, value.bits // 2, PAGE, d // 4)))
        dtype = torch.float16 if value.scales == "fp16" else torch.uint8
        scale, zero = (
            _cut(pages, begin, end, dtype).reshape(*lead, self.tiles, self.v_groups, PAGE).transpose(-1, -2)
            for begin, end in ((o.v_scale, o.v_zero), (o.v_zero, o.end))
        )
        return Packed(codes.flatten(-3, -2), scale.flatten(-3, -2), zero.flatten(-3, -2))


def _meta_bytes(tensor: TensorSpec, groups: int) -> int:
    """Bytes of the scales, or of the zero points, of so many groups."""
    return 0 if tensor.bits == 16 else groups * (2 if tensor.scales == "fp16" else 1)


def _cut(pages: Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    return pages[..., begin:end].contiguous().view(dtype)


def _planes(codes: Tensor, bits: int) -> Tensor:
    """[..., 32, D] -> [..., plane, 32, D], low bits first."""
    return torch.stack([(codes >> (2 * plane)) & 3 for plane in range(bits // 2)], dim=-3)


def _from_planes(planes: Tensor) -> Tensor:
    """Inverse of `_planes`."""
    total = planes[..., 0, :, :].clone()
    for plane in range(1, planes.shape[-3]):
        total |= planes[..., plane, :, :] << (2 * plane)
    return total


def _words(codes: Tensor) -> Tensor:
    """2-bit codes [..., 32, N] -> int16 [..., N/8, 32]."""
    return planar_pack(codes).view(torch.int16).transpose(-1, -2)


def _unpack_words(words: Tensor) -> Tensor:
    """Inverse of `_words`."""
    rows = words.transpose(-1, -2)
    # Flat first: a single word a token has no stride to view.
    return planar_unpack(torch.unflatten(rows.flatten(-2).view(torch.uint8), -1, (PAGE, -1)))


def planar_pack(codes: Tensor) -> Tensor:
    """2-bit codes uint8 [..., D] -> uint8 [..., D/4]; byte b, field i = channel i * D/4 + b."""
    planes = codes.reshape(*codes.shape[:-1], 4, codes.shape[-1] // 4)
    return planes[..., 0, :] | (planes[..., 1, :] << 2) | (planes[..., 2, :] << 4) | (planes[..., 3, :] << 6)


def planar_unpack(packed: Tensor) -> Tensor:
    """Inverse of `planar_pack`: uint8 [..., D/4] -> codes uint8 [..., D]."""
    return torch.cat([(packed >> (2 * i)) & 3 for i in range(4)], dim=-1)
