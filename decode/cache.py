"""The decode worker's KV memory: packed blocks, and for each running sequence an fp16 tail, sinks and rings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvferry.decode.memory import HeldKV, SwappedKV
from kvferry.decode.swap import SwappedOut, swap_in, swap_out
from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.packed import DecodeBatch, PackedKernels


class StepBatch:
    """One decode step's batch: layers that see everything, and layers that see a window of it."""

    def __init__(self, whole: DecodeBatch, windowed: DecodeBatch | None) -> None:
        self.whole = whole
        self._windowed = windowed

    def of_layer(self, layer: int) -> DecodeBatch:
        """The caches of one layer as the kernels take them."""
        windowed = self._windowed
        if windowed is not None and windowed.layout.layers[layer].head_bytes:
            return windowed
        return self.whole


class PackedCache:
    """`KVMemory` on one device. Tensors only; who owns which block or slot is decided by `BlockPool` and the engine.

    pool: uint8 [num_blocks, block_bytes of the layers that see everything]
    rings: uint8 [slot, ring block, block_bytes of the layers with a window]: block i of a sequence is ring block
        i mod ring_blocks, so that what no query sees any more is overwritten
    sinks: fp16 [slot, layer, kv_head, K|V, sink_tokens, D]
    tails: fp16 [slot, layer, K|V, kv_head, block_size, D]
    """

    def __init__(
        self,
        layout: BlockLayout,
        *,
        num_blocks: int,
        num_slots: int,
        kernels: PackedKernels,
        device: torch.device,
        windows: Sequence[int | None] | None = None,
    ) -> None:
        """`windows`: of each layer, in tokens; None: all see everything."""
        self.layout = layout
        self.device = device
        self._kernels = kernels
        self._sinks_of_block: dict[int, Tensor] = {}
        self.rings_layout, self.pool_layout, self.ring_blocks = split_layers(layout, windows)
        self.pool = torch.empty((num_blocks, self.pool_layout.block_bytes), dtype=torch.uint8, device=device)
        ring_shape = (num_slots, self.ring_blocks, self.rings_layout.block_bytes)
        self.rings = torch.empty(ring_shape, dtype=torch.uint8, device=device)
        self.sinks = torch.zeros((num_slots, *layout.sink_shape), dtype=torch.float16, device=device)
        self.tails = torch.zeros((num_slots, *layout.tail_shape), dtype=torch.float16, device=device)

    @property
    def num_blocks(self) -> int:
        return self.pool.shape[0]

    def load_block(self, payload: Tensor, block_index: int, *, block_id: int | None, slot: int | None) -> None:
        block, sinks = self.layout.split_payload(payload, block_index)
        if block_id is not None:
            self.pool[block_id].copy_(self.layout.share(block, self.pool_layout))
            if sinks is not None:
                self.keep_sinks(block_id, sinks)
        if slot is not None and self.ring_blocks:
            ring = self.rings[slot, block_index % self.ring_blocks]
            ring.copy_(self.layout.share(block, self.rings_layout))

    def load_layer(
        self, share: Tensor, layer: int, block_index: int, *, block_id: int | None, slot: int | None
    ) -> Tensor | None:
        pages, sinks = self.layout.split_layer(share, layer, block_index)
        if block_id is not None:
            _put_layer(self.pool[block_id], self.pool_layout, layer, pages)
        if slot is not None and self.ring_blocks:
            _put_layer(self.rings[slot, block_index % self.ring_blocks], self.rings_layout, layer, pages)
        return sinks

    def in_ring(self, block_index: int, num_blocks: int) -> bool:
        return block_index >= num_blocks - self.ring_blocks

    def sinks_of(self, block_id: int) -> Tensor:
        """The sinks that came with a first block."""
        return self._sinks_of_block[block_id]

    def keep_sinks(self, block_id: int, sinks: Tensor) -> None:
        self._sinks_of_block[block_id] = sinks.to(self.device)

    def forget(self, block_id: int) -> None:
        self._sinks_of_block.pop(block_id, None)

    def use_sinks(self, slot: int, block_id: int) -> None:
        self.sinks[slot].copy_(self._sinks_of_block[block_id])

    def copy_slot(self, source: int, target: int, *, tail_len: int) -> None:
        self.sinks[target].copy_(self.sinks[source])
        self.rings[target].copy_(self.rings[source])
        self.tails[target, :, :, :, :tail_len].copy_(self.tails[source, :, :, :, :tail_len])

    def swap_out(self, held: HeldKV) -> SwappedOut:
        return swap_out(self, held)

    def swap_in(self, saved: SwappedKV, held: HeldKV, *, present: frozenset[int]) -> None:
        assert isinstance(saved, SwappedOut)
        swap_in(self, saved, held, present=present)

    def load_tail(self, slot: int, tail: bytes) -> int:
        layers, two, heads, block_size, dim = self.layout.tail_shape
        tokens, rest = divmod(len(tail), self.layout.bytes_per_token_bf16)
        if rest or tokens >= block_size:
            raise ValueError(f"a tail of {len(tail)} bytes does not fit this model")
        if tokens:
            values = torch.frombuffer(bytearray(tail), dtype=torch.float16)
            self.tails[slot, :, :, :, :tokens].copy_(values.view(layers, two, heads, tokens, dim))
        return tokens

    def pack_tail(self, slot: int, block_id: int, *, index: int) -> None:
        """Quantizes a full tail into `block_id` as the sequence's block `index`; with the first also keeps the sinks.

        Raises ValueError when K or V is not finite.
        """
        sink_tokens = self.layout.spec.sink_tokens if index == 0 else 0
        whole = self.pool[block_id]
        ring = self.rings[slot, index % self.ring_blocks] if self.ring_blocks else None
        for i, layer in enumerate(self.layout.layers):
            keys, values = self.tails[slot, i]
            if ring is not None and self.rings_layout.layers[i].head_bytes:
                out = self.rings_layout.layer_pages(ring, i)
            else:
                out = self.pool_layout.layer_pages(whole, i)
            self._kernels.quantize_block(keys, values, layer.page, sink_tokens=sink_tokens, out=out)
        if sink_tokens:
            self.sinks[slot].copy_(
                self.tails[slot, :, :, :, :sink_tokens].transpose(1, 2)
            )  # [layer, K|V, head, ...] -> [layer, head, K|V, ...]

    def batch(
        self,
        *,
        block_tables: list[list[int]],
        slots: list[int],
        tail_lens: list[int],
    ) -> StepBatch:
        """The batch as the kernels take it; rows of `block_tables` may differ in length."""
        width = max(1, *(len(row) for row in block_tables))
        table = torch.zeros((len(slots), width), dtype=torch.int32)
        for row, block_ids in enumerate(block_tables):
            table[row, : len(block_ids)] = torch.tensor(block_ids, dtype=torch.int32)

        def ints(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32).to(self.device)

        whole = DecodeBatch(
            layout=self.pool_layout,
            pool=self.pool,
            sinks=self.sinks,
            tails=self.tails,
            block_tables=table.to(self.device),
            num_blocks=ints([len(row) for row in block_tables]),
            slots=ints(slots),
            tail_lens=ints(tail_lens),
        )
        if not self.ring_blocks:
            return StepBatch(whole, None)
        # Entries of blocks outside the window name blocks of the window; no query reads them there.
        places = torch.arange(width, dtype=torch.int32, device=self.device) % self.ring_blocks
        rings = self.rings.view(-1, self.rings_layout.block_bytes)
        table = (whole.slots.view(-1, 1) * self.ring_blocks + places).contiguous()
        return StepBatch(whole, replace(whole, layout=self.rings_layout, pool=rings, block_tables=table))


def _put_layer(target: Tensor, layout: BlockLayout, layer: int, pages: Tensor) -> None:
    """Copies a layer's pages to their place in a block of `layout`, which may not hold the layer."""
    _, offset, head_bytes = layout.layers[layer]
    if head_bytes:
        target[offset : offset + pages.numel()].copy_(pages)


def split_layers(layout: BlockLayout, windows: Sequence[int | None] | None) -> tuple[BlockLayout, BlockLayout, int]:
    """Layouts of the layers with a window and of the others, and the blocks of a ring.

    With n complete blocks a query sees none before block n - ceil((window - 1) / block_size).
    Raises ValueError for another number of windows than layers.
    """
    sizes = list(windows) if windows is not None else [None] * layout.num_layers
    if len(sizes) != layout.num_layers:
        raise ValueError(f"{len(sizes)} windows for {layout.num_layers} layers")
    widest = max((size for size in sizes if size is not None), default=0)
    windowed = [layer for layer, size in enumerate(sizes) if size is not None]
    if not windowed:
        return layout.holding(()), layout, 0
    others = [layer for layer, size in enumerate(sizes) if size is None]
    return layout.holding(windowed), layout.holding(others), -(-widest // layout.block_size)
