"""The packed block: where every page of every layer and KV head lies.

A *block* is `block_size` tokens of all layers and KV heads: [layer][kv_head][page], with the pages of `page.py`. A
layer's share, or a head's, is one byte slice. Layers may differ in their page format, so a pool of blocks is flat bytes
and a layer of it is a strided view. Block 0 of a sequence is preceded, inside each (layer, head) slice, by the sinks in
fp16: K [sink_tokens][D], then V [sink_tokens][D]. In its first page the sinks' codes are 0 and never read.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kvferry.kernels.page import PageFormat
from kvferry.kernels.spec import KVQuantSpec

LAYOUT_VERSION = 1


class LayerLayout(NamedTuple):
    """One layer's share of a block."""

    page: PageFormat
    offset: int
    """Of its first page in the block, in bytes."""
    head_bytes: int
    """From one KV head to the next: all pages of a head."""


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """Sizes of one model's blocks. All byte counts are exact; nothing is padded."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    spec: KVQuantSpec
    held: frozenset[int] | None = None
    """Layers whose pages a pool of this layout holds; None: all, as blocks that are stored and moved do."""

    def __post_init__(self) -> None:
        PageFormat(self.head_dim, self.spec.layer)  # refuses a head_dim
        unknown = [index for index, _ in self.spec.overrides if index >= self.num_layers]
        if unknown:
            raise ValueError(f"the quantization spec names layers {unknown} of a model of {self.num_layers}")

    @property
    def block_size(self) -> int:
        return self.spec.block_size

    @functools.cached_property
    def layers(self) -> tuple[LayerLayout, ...]:
        layers = []
        offset = 0
        for index in range(self.num_layers):
            page = PageFormat(self.head_dim, self.spec.of_layer(index))
            is_held = self.held is None or index in self.held
            head_bytes = page.num_bytes * (self.block_size // page.tokens) if is_held else 0
            layers.append(LayerLayout(page, offset, head_bytes))
            offset += self.num_kv_heads * head_bytes
        return tuple(layers)

    @functools.cached_property
    def block_bytes(self) -> int:
        """Bytes of one block in a pool."""
        last = self.layers[-1]
        return last.offset + self.num_kv_heads * last.head_bytes

    def layer_pages(self, pool: Tensor, layer: int) -> Tensor:
        """A layer of blocks uint8 [..., block_bytes]: a view [..., kv_head, page, page_bytes]."""
        page, offset, head_bytes = self.layers[layer]
        share = pool[..., offset : offset + self.num_kv_heads * head_bytes]
        return torch.unflatten(share, -1, (self.num_kv_heads, self.block_size // page.tokens, page.num_bytes))

    def holding(self, layers: Iterable[int]) -> BlockLayout:
        """The layout of a pool for some layers only."""
        return replace(self, held=frozenset(layers))

    def share(self, block: Tensor, held: BlockLayout) -> Tensor:
        """Of a block of this layout, what a pool of the layout `held` holds: uint8 [held.block_bytes]."""
        if held.block_bytes == self.block_bytes:
            return block
        sizes = [self.num_kv_heads * layer.head_bytes for layer in self.layers]
        parts = torch.split(block, sizes)
        return torch.cat([block[:0], *(p for p, layer in zip(parts, held.layers, strict=True) if layer.head_bytes)])

    @property
    def sink_shape(self) -> tuple[int, int, int, int, int]:
        """fp16 sinks of one sequence: [layer, kv_head, K|V, sink_tokens, head_dim]."""
        return (self.num_layers, self.num_kv_heads, 2, self.spec.sink_tokens, self.head_dim)

    @property
    def sink_bytes(self) -> int:
        return self.num_layers * self.num_kv_heads * self._head_sink_bytes

    @property
    def _head_sink_bytes(self) -> int:
        return 2 * self.spec.sink_tokens * self.head_dim * 2

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

    def layer_share_bytes(self, layer: int, block_index: int) -> int:
        """Bytes of one layer in the payload of a block: all KV heads, in block 0 with their sinks."""
        sinks = self._head_sink_bytes if block_index == 0 else 0
        return self.num_kv_heads * (sinks + self.layers[layer].head_bytes)

    def join_layer(self, block: Tensor, sinks: Tensor | None, layer: int) -> Tensor:
        """One layer of `join_payload`: uint8 [layer_share_bytes], a view where there are no sinks."""
        _, offset, head_bytes = self.layers[layer]
        pages = block[offset : offset + self.num_kv_heads * head_bytes]
        if sinks is None:
            return pages
        raw = sinks[layer].contiguous().view(torch.uint8).reshape(self.num_kv_heads, -1)
        return torch.cat([raw, pages.view(self.num_kv_heads, -1)], dim=-1).reshape(-1)

    def join_payload(self, block: Tensor, sinks: Tensor | None) -> Tensor:
        """Payload of a block: uint8 [payload_bytes].

        `block` is uint8 [block_bytes]; `sinks` is fp16 of `sink_shape` for block 0, else None.
        """
        if sinks is None:
            return block
        return torch.cat([self.join_layer(block, sinks, layer) for layer in range(self.num_layers)])

    def split_layer(self, share: Tensor, layer: int, block_index: int) -> tuple[Tensor, Tensor | None]:
        """Inverse of `join_layer`: pages uint8 [kv_head * head_bytes] and sinks fp16 [kv_head, K|V, sink_tokens, D], or
        None. Views or copies of `share`, which has `layer_share_bytes`.

        Raises ValueError when a scale, a zero point or a sink is not finite, or when a boosted channel does not exist:
        such a block is damaged or forged, whatever its checksum says.
        """
        page, _, head_bytes = self.layers[layer]
        pages, sinks = share, None
        if block_index == 0:
            cut = self._head_sink_bytes
            heads = share.view(self.num_kv_heads, cut + head_bytes)
            pages = heads[:, cut:].reshape(-1)
            sinks = heads[:, :cut].contiguous().view(torch.float16).reshape(self.sink_shape[1:])
        blobs = pages.view(self.num_kv_heads, -1, page.num_bytes)
        halves = (blobs[..., begin:end].contiguous().view(torch.float16) for begin, end in page.half_parts)
        if not (
            page.scales_are_finite(blobs)
            and all(bool(half.isfinite().all()) for half in halves)
            and (sinks is None or bool(sinks.isfinite().all()))
        ):
            raise ValueError(f"block {block_index} holds a scale, zero point or sink that is not finite")
        if not page.channels_are_sound(blobs):
            raise ValueError(f"block {block_index} names boosted channels that do not exist or do not ascend")
        return pages, sinks

    def split_payload(self, payload: Tensor, block_index: int) -> tuple[Tensor, Tensor | None]:
        """Inverse of `join_payload`: (block, sinks or None), views or copies of `payload` (uint8).

        Raises ValueError when the size is not `payload_bytes(block_index)`, and as `split_layer`.
        """
        if payload.numel() != self.payload_bytes(block_index):
            raise ValueError(
                f"block {block_index} has {payload.numel()} bytes, expected {self.payload_bytes(block_index)}"
            )
        shares = torch.split(payload, [self.layer_share_bytes(i, block_index) for i in range(self.num_layers)])
        layers = [self.split_layer(share, i, block_index) for i, share in enumerate(shares)]
        if block_index:
            return payload, None
        sinks = torch.stack([sinks for _, sinks in layers if sinks is not None])
        return torch.cat([pages for pages, _ in layers]), sinks
