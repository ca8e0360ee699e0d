"""The packed block: every shape, stride and bit of it, in one place.

A *page* is the unit of quantization: 32 tokens of one KV head. Its blob holds, for head_dim D,

    offset   bytes   content
    0        8 D     K codes   uint16 [D/8 words][32 tokens]
    8 D      2 D     K scale   fp16   [D]              one group = 32 tokens of a channel
    10 D     2 D     K zero    fp16   [D]
    12 D     8 D     V codes   uint8  [32 tokens][D/4 bytes]
    20 D     2 D     V scale   fp16   [D/32][32 tokens] one group = 32 channels of a token
    22 D     2 D     V zero    fp16   [D/32][32 tokens]

so a page is 24 D bytes: 3 bits a value, scales and zero points included. Everything is little-endian.

Codes are *planar*: byte b of a token holds, in its four 2-bit fields i = 0..3 (low bits first), the codes of
channels i * D/4 + b. K keeps two such bytes as one 16-bit word, with words as rows and tokens as columns: a row of
16 tokens is one AVX2 register, and a [32, D/8] tile of words is a tensor-core operand before it is unpacked.

Scale and zero point are stored *folded*, because the cheapest unpacking of a code c on a GPU is the fp16 number
u = 1 + c/4 (one bit operation, no conversion):

    S = 4 * scale        Z = zero_point - S        value = S * u + Z = c * scale + zero_point

The quantizer chooses codes against the rounded S and Z, so folding costs no accuracy.

A *block* is `block_size` tokens of all layers and KV heads: [layer][kv_head][page]. A layer's share, or a head's,
is one byte slice. Block 0 of a sequence is preceded, inside each (layer, head) slice, by the sinks in fp16:
K [sink_tokens][D], then V [sink_tokens][D]. In its first page the sinks' codes are 0 and never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvferry.kernels.spec import KVQuantSpec

LAYOUT_VERSION = 1
PAGE = 32
"""Tokens a page; the key group size."""
GROUP = 32
"""Channels of one value group."""
FOLD = 4.0
"""Stored scale over scale."""


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """Sizes of one model's blocks. All byte counts are exact; nothing is padded."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    spec: KVQuantSpec

    def __post_init__(self) -> None:
        if self.head_dim % GROUP or not GROUP <= self.head_dim <= 256:
            raise ValueError(f"head_dim {self.head_dim} is not supported: it must be a multiple of {GROUP} up to 256")

    @property
    def block_size(self) -> int:
        return self.spec.block_size

    @property
    def pages(self) -> int:
        """Pages a block has for each layer and KV head."""
        return self.spec.block_size // PAGE

    @property
    def page_bytes(self) -> int:
        return page_bytes(self.head_dim)

    @property
    def pool_shape(self) -> tuple[int, int, int, int]:
        """Shape of one block in a pool: [layer, kv_head, page, page_bytes]."""
        return (self.num_layers, self.num_kv_heads, self.pages, self.page_bytes)

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.num_kv_heads * self.pages * self.page_bytes

    @property
    def sink_shape(self) -> tuple[int, int, int, int, int]:
        """fp16 sinks of one sequence: [layer, kv_head, K|V, sink_tokens, head_dim]."""
        return (self.num_layers, self.num_kv_heads, 2, self.spec.sink_tokens, self.head_dim)

    @property
    def sink_bytes(self) -> int:
        return self.num_layers * self.num_kv_heads * 2 * self.spec.sink_tokens * self.head_dim * 2

    @property
    def tail_shape(self) -> tuple[int, int, int, int, int]:
        """fp16 tail of one sequence: [layer, K|V, kv_head, block_size, head_dim]."""
        return (self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    def payload_bytes(self, block_index: int) -> int:
        """Bytes of a block as stored and moved: block 0 carries the sinks."""
        return self.block_bytes + (self.sink_bytes if block_index == 0 else 0)

    @property
    def bytes_per_token_bf16(self) -> int:
        """What one token's K and V take at 16 bits, all layers."""
        return self.num_layers * self.num_kv_heads * self.head_dim * 2 * 2

    def effective_bits(self, num_tokens: int) -> float:
        """Bits a value of a cached sequence: codes, scales, zero points, sinks and the fp16 tail."""
        blocks, tail = divmod(num_tokens, self.block_size)
        used = blocks * self.block_bytes + (self.sink_bytes if blocks else 0)
        used += tail * self.bytes_per_token_bf16
        return 16.0 * used / (num_tokens * self.bytes_per_token_bf16)

    def mean_effective_bits(self, num_tokens: int) -> float:
        """`effective_bits` averaged over the lengths of one block around `num_tokens`: over every tail length."""
        first = num_tokens - self.block_size // 2
        return sum(self.effective_bits(first + i) for i in range(self.block_size)) / self.block_size

    def join_payload(self, block: Tensor, sinks: Tensor | None) -> Tensor:
        """Payload of a block: uint8 [payload_bytes].

        `block` is uint8 [layer, kv_head, page, page_bytes]; `sinks` is fp16 of `sink_shape` for block 0, else None.
        """
        flat = block.reshape(self.num_layers, self.num_kv_heads, -1)
        if sinks is None:
            return flat.reshape(-1)
        raw = sinks.contiguous().view(torch.uint8).reshape(self.num_layers, self.num_kv_heads, -1)
        return torch.cat([raw, flat], dim=-1).reshape(-1)

    def split_payload(self, payload: Tensor, block_index: int) -> tuple[Tensor, Tensor | None]:
        """Inverse of `join_payload`: (block, sinks or None), views or copies of `payload` (uint8).

        Raises ValueError when the size is not `payload_bytes(block_index)`, or when a scale, a zero point or a sink
        is not finite: such a block is damaged or forged, whatever its checksum says.
        """
        if payload.numel() != self.payload_bytes(block_index):
            raise ValueError(
                f"block {block_index} has {payload.numel()} bytes, expected {self.payload_bytes(block_index)}"
            )
        runs = payload.reshape(self.num_layers, self.num_kv_heads, -1)
        cut = self.sink_bytes // (self.num_layers * self.num_kv_heads) if block_index == 0 else 0
        block = runs[..., cut:].reshape(self.pool_shape)
        d = self.head_dim
        floats = [block[..., 8 * d : 12 * d], block[..., 20 * d : 24 * d], runs[..., :cut]]
        if not all(bool(part.contiguous().view(torch.float16).isfinite().all()) for part in floats):
            raise ValueError(f"block {block_index} holds a scale, zero point or sink that is not finite")
        if block_index != 0:
            return block, None
        return block, runs[..., :cut].contiguous().view(torch.float16).reshape(self.sink_shape)


def page_bytes(head_dim: int) -> int:
    """Bytes of one page of one KV head."""
    return 24 * head_dim


def planar_pack(codes: Tensor) -> Tensor:
    """2-bit codes uint8 [..., D] -> uint8 [..., D/4]; byte b, field i = channel i * D/4 + b."""
    planes = codes.reshape(*codes.shape[:-1], 4, codes.shape[-1] // 4)
    return planes[..., 0, :] | (planes[..., 1, :] << 2) | (planes[..., 2, :] << 4) | (planes[..., 3, :] << 6)


def planar_unpack(packed: Tensor) -> Tensor:
    """Inverse of `planar_pack`: uint8 [..., D/4] -> codes uint8 [..., D]."""
    return torch.cat([(packed >> (2 * i)) & 3 for i in range(4)], dim=-1)


def join_page(
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
) -> Tensor:
    """Page blobs uint8 [..., page_bytes].

    k_codes, v_codes: uint8 [..., 32, D]; k_scale, k_zero: fp16 [..., D] (folded);
    v_scale, v_zero: fp16 [..., 32, D/32] (folded).
    """
    k_words = planar_pack(k_codes).view(torch.int16).transpose(-1, -2).contiguous()
    parts = [
        k_words,
        k_scale,
        k_zero,
        planar_pack(v_codes),
        v_scale.transpose(-1, -2).contiguous(),
        v_zero.transpose(-1, -2).contiguous(),
    ]
    lead = k_codes.shape[:-2]
    return torch.cat([p.contiguous().view(torch.uint8).reshape(*lead, -1) for p in parts], dim=-1)


def split_page(pages: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inverse of `join_page`: (k_codes, k_scale, k_zero, v_codes, v_scale, v_zero)."""
    d = head_dim
    lead = pages.shape[:-1]

    def cut(start: int, size: int) -> Tensor:
        return pages[..., start : start + size].contiguous()

    k_words = cut(0, 8 * d).view(torch.int16).reshape(*lead, d // 8, PAGE)
    k_codes = planar_unpack(k_words.transpose(-1, -2).contiguous().view(torch.uint8))
    v_codes = planar_unpack(cut(12 * d, 8 * d).reshape(*lead, PAGE, d // 4))
    v_scale = cut(20 * d, 2 * d).view(torch.float16).reshape(*lead, d // GROUP, PAGE)
    v_zero = cut(22 * d, 2 * d).view(torch.float16).reshape(*lead, d // GROUP, PAGE)
    return (
        k_codes,
        cut(8 * d, 2 * d).view(torch.float16),
        cut(10 * d, 2 * d).view(torch.float16),
        v_codes,
        v_scale.transpose(-1, -2),
        v_zero.transpose(-1, -2),
    )
