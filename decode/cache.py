"""The decode worker's KV memory: packed blocks, and an fp16 tail and sinks for each running sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.packed import DecodeBatch, PackedKernels


class PackedCache:
    """Tensors only; who owns which block or slot is decided by `BlockPool` and the engine.

    pool: uint8 [num_blocks, block_bytes]
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
    ) -> None:
        self.layout = layout
        self.device = device
        self._kernels = kernels
        self._sinks_of_block: dict[int, Tensor] = {}
        self.pool = torch.empty((num_blocks, layout.block_bytes), dtype=torch.uint8, device=device)
        self.sinks = torch.zeros((num_slots, *layout.sink_shape), dtype=torch.float16, device=device)
        self.tails = torch.zeros((num_slots, *layout.tail_shape), dtype=torch.float16, device=device)

    def load_block(self, block_id: int, payload: Tensor, block_index: int) -> None:
        """Copies a stored payload (uint8) into the pool. Raises ValueError for a wrong size."""
        block, sinks = self.layout.split_payload(payload, block_index)
        self.pool[block_id].copy_(block)
        if sinks is not None:
            self.keep_sinks(block_id, sinks)

    def sinks_of(self, block_id: int) -> Tensor:
        """The sinks that came with a first block."""
        return self._sinks_of_block[block_id]

    def keep_sinks(self, block_id: int, sinks: Tensor) -> None:
        """The sinks of a first block that was written into the pool."""
        self._sinks_of_block[block_id] = sinks.to(self.device)

    def forget(self, block_id: int) -> None:
        """The block's content is given up."""
        self._sinks_of_block.pop(block_id, None)

    def use_sinks(self, slot: int, block_id: int) -> None:
        """Gives a sequence the sinks that came with its first block."""
        self.sinks[slot].copy_(self._sinks_of_block[block_id])

    def copy_slot(self, source: int, target: int, *, tail_len: int) -> None:
        """Gives a sequence the sinks and the tail of another one of the same request."""
        self.sinks[target].copy_(self.sinks[source])
        self.tails[target, :, :, :, :tail_len].copy_(self.tails[source, :, :, :, :tail_len])

    def load_tail(self, slot: int, tail: bytes) -> int:
        """Takes a handed-over tail, fp16 [layer][K|V][kv_head][token][D]; returns its tokens.

        Raises ValueError when the bytes are not a whole number of tokens of this model, or not fewer than a block.
        """
        layers, two, heads, block_size, dim = self.layout.tail_shape
        tokens, rest = divmod(len(tail), self.layout.bytes_per_token_bf16)
        if rest or tokens >= block_size:
            raise ValueError(f"a tail of {len(tail)} bytes does not fit this model")
        if tokens:
            values = torch.frombuffer(bytearray(tail), dtype=torch.float16)
            self.tails[slot, :, :, :, :tokens].copy_(values.view(layers, two, heads, tokens, dim))
        return tokens

    def pack_tail(self, slot: int, block_id: int, *, first: bool) -> None:
        """Quantizes a full tail into `block_id`; for the first block of a sequence also keeps the sinks.

        Raises ValueError when K or V is not finite.
        """
        sink_tokens = self.layout.spec.sink_tokens if first else 0
        block = self.pool[block_id]
        for index, layer in enumerate(self.layout.layers):
            keys, values = self.tails[slot, index]
            out = self.layout.layer_pages(block, index)
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
    ) -> DecodeBatch:
        """The batch as the kernels take it; rows of `block_tables` may differ in length."""
        width = max(1, *(len(row) for row in block_tables))
        table = torch.zeros((len(slots), width), dtype=torch.int32)
        for row, block_ids in enumerate(block_tables):
            table[row, : len(block_ids)] = torch.tensor(block_ids, dtype=torch.int32)

        def ints(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32).to(self.device)

        return DecodeBatch(
            layout=self.layout,
            pool=self.pool,
            sinks=self.sinks,
            tails=self.tails,
            block_tables=table.to(self.device),
            num_blocks=ints([len(row) for row in block_tables]),
            slots=ints(slots),
            tail_lens=ints(tail_lens),
        )
