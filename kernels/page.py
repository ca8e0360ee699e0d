"""The page: every offset and bit of it, in one place. docs/layout.md has the pictures.

A *page* is the unit of quantization: the tokens of one key group (32, or 64) of one KV head. Its blob is

    K codes   uint16 [tile][plane][D/8 words][32 tokens]
    K scale          [K group][D]                         a group: `group_size` tokens of a channel
    K zero           [K group][D]
    V codes   uint8  [tile][plane][32 tokens][D/4 bytes]
    V scale          [tile][V group][32 tokens]           a group: `group_size` channels of a token, the last one
    V zero           [tile][V group][32 tokens]           shorter where D is no multiple

with tiles of 32 tokens, and scales and zero points as `scales.py` stores them. Everything is little-endian, nothing is
padded. A code of 4 or 8 bits is two or four *planes* of 2 bits, low bits first: every plane is laid out as if it were
alone. With 16 bits there are no codes and no scales, but fp16 [tokens][D] in their place.

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


class Packed(NamedTuple):
    """K or V of pages in parts: what the fit makes and the packing takes.

    codes: uint8 [..., tokens, D]; scale and zero, as stored: K [..., K group, D], V [..., tokens, V group].
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


class Offsets(NamedTuple):
    """Where the parts of a page begin, in bytes. With 16 bits, codes are fp16 numbers and nothing else is there."""

    k_codes: int
    k_scale: int
    k_zero: int
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

    @functools.cached_property
    def offsets(self) -> Offsets:
        sizes = []
        for tensor, groups in (
            (self.spec.key, self.k_groups * self.head_dim),
            (self.spec.value, self.v_groups * self.tokens),
        ):
            if tensor.bits == 16:
                sizes += [self.tokens * self.head_dim * 2, 0, 0]
            else:
                meta = groups * (2 if tensor.scales == "fp16" else 1)
                sizes += [self.tokens * self.head_dim * tensor.bits // 8, meta, meta]
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
            (self.spec.key, 0, o.k_scale, o.v_codes),
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

    def join(self, keys: Packed | Tensor, values: Packed | Tensor) -> Tensor:
        """Page blobs uint8 [..., num_bytes]; with 16 bits, keys or values are fp16 [..., tokens, D]."""
        parts = []
        for x, is_key in ((keys, True), (values, False)):
            if isinstance(x, Tensor):
                parts.append(x)
                continue
            tensor = self.spec.key if is_key else self.spec.value
            tiles = torch.unflatten(x.codes, -2, (self.tiles, PAGE))
            planes = torch.stack([(tiles >> (2 * p)) & 3 for p in range(tensor.bits // 2)], dim=-3)
            packed = planar_pack(planes)
            if is_key:
                parts += [packed.view(torch.int16).transpose(-1, -2), x.scale, x.zero]
            else:
                meta = [torch.unflatten(m, -2, (self.tiles, PAGE)).transpose(-1, -2) for m in (x.scale, x.zero)]
                parts += [packed, *meta]
        lead = (keys if isinstance(keys, Tensor) else keys.codes).shape[:-2]
        return torch.cat([p.contiguous().view(torch.uint8).reshape(*lead, -1) for p in parts], dim=-1)

    def split(self, pages: Tensor) -> tuple[Packed | Tensor, Packed | Tensor]:
        """Inverse of `join`."""
        o = self.offsets
        keys = self._split_side(pages, self.spec.key, o.k_codes, o.k_scale, o.k_zero, o.v_codes, is_key=True)
        values = self._split_side(pages, self.spec.value, o.v_codes, o.v_scale, o.v_zero, o.end, is_key=False)
        return keys, values

    def _split_side(
        self, pages: Tensor, tensor: TensorSpec, codes: int, scale: int, zero: int, end: int, *, is_key: bool
    ) -> Packed | Tensor:
        lead, d = pages.shape[:-1], self.head_dim
        if tensor.bits == 16:
            return pages[..., codes:end].contiguous().view(torch.float16).reshape(*lead, self.tokens, d)
        raw = pages[..., codes:scale].contiguous()
        planes = tensor.bits // 2
        if is_key:
            words = raw.view(torch.int16).reshape(*lead, self.tiles, planes, d // 8, PAGE)
            packed = words.transpose(-1, -2).contiguous().view(torch.uint8)
        else:
            packed = raw.reshape(*lead, self.tiles, planes, PAGE, d // 4)
        unpacked = planar_unpack(packed)
        total = unpacked[..., 0, :, :]
        for p in range(1, planes):
            total = total | (unpacked[..., p, :, :] << (2 * p))
        dtype = torch.float16 if tensor.scales == "fp16" else torch.uint8
        meta = []
        for begin, stop in ((scale, zero), (zero, end)):
            m = pages[..., begin:stop].contiguous().view(dtype)
            if is_key:
                meta.append(m.reshape(*lead, self.k_groups, d))
            else:
                meta.append(m.reshape(*lead, self.tiles, self.v_groups, PAGE).transpose(-1, -2).flatten(-3, -2))
        return Packed(total.flatten(-3, -2), *meta)


def planar_pack(codes: Tensor) -> Tensor:
    """2-bit codes uint8 [..., D] -> uint8 [..., D/4]; byte b, field i = channel i * D/4 + b."""
    planes = codes.reshape(*codes.shape[:-1], 4, codes.shape[-1] // 4)
    return planes[..., 0, :] | (planes[..., 1, :] << 2) | (planes[..., 2, :] << 4) | (planes[..., 3, :] << 6)


def planar_unpack(packed: Tensor) -> Tensor:
    """Inverse of `planar_pack`: uint8 [..., D/4] -> codes uint8 [..., D]."""
    return torch.cat([(packed >> (2 * i)) & 3 for i in range(4)], dim=-1)
