"""The blocks of one prompt while it is being prefilled."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.packed import PackedPrefix


class PromptBlocks(Protocol):
    """Packed blocks, sinks and fp16 tail of one prompt, wherever they are. Owned by one request.

    Blocks [0, num_ready) are complete and never change again.
    """

    num_ready: int

    @property
    def layout(self) -> BlockLayout:
        """Of whole blocks."""
        ...

    @property
    def num_blocks(self) -> int:
        """Complete ones, when all is computed."""
        ...

    @property
    def tail_len(self) -> int: ...

    @property
    def tail_size(self) -> int:
        """Bytes of `tail_bytes`."""
        ...

    def load(self, index: int, payload: Tensor) -> None:
        """Takes block `index` from its stored payload (uint8). Raises ValueError for a wrong size."""
        ...

    def copy(self, index: int, other: PromptBlocks) -> None:
        """Takes block `index`, the next one, from another prompt of the same executor that has the same tokens up to
        its end."""
        ...

    def payload(self, index: int) -> memoryview:
        """Payload of block `index` in host memory."""
        ...

    def layer_share(self, index: int, layer: int) -> memoryview:
        """One layer of `payload(index)`, or with `index` = num_blocks of the tail, in host memory."""
        ...

    def tail_bytes(self) -> bytes:
        """fp16 [layer][K|V][kv_head][token][head_dim] of the incomplete block; empty if there is none."""
        ...


class LocalPromptBlocks:
    """`PromptBlocks` on one device.

    Block i of the prompt is row i of `pool`; blocks [0, num_ready) are complete and never change again.
    """

    def __init__(self, layout: BlockLayout, num_tokens: int, device: torch.device) -> None:
        self.layout = layout
        self.num_blocks, self.tail_len = divmod(num_tokens, layout.block_size)
        self.num_ready = 0
        self.pool = torch.empty((self.num_blocks, layout.block_bytes), dtype=torch.uint8, device=device)
        self.sinks = torch.zeros(layout.sink_shape, dtype=torch.float16, device=device)
        layers, two, heads, _, dim = layout.tail_shape
        self.tail = torch.empty((layers, two, heads, self.tail_len, dim), dtype=torch.float16, device=device)
        self._table = torch.arange(self.num_blocks, dtype=torch.int32, device=device)

    def prefix(self, num_blocks: int) -> PackedPrefix:
        """The first `num_blocks` blocks, as the chunk after them sees them."""
        return PackedPrefix(layout=self.layout, pool=self.pool, table=self._table[:num_blocks], sinks=self.sinks)

    @property
    def tail_size(self) -> int:
        return self.tail.nbytes

    def load(self, index: int, payload: Tensor) -> None:
        block, sinks = self.layout.split_payload(payload, index)
        self.pool[index].copy_(block)
        if sinks is not None:
            self.sinks.copy_(sinks)
        self.num_ready = index + 1

    def copy(self, index: int, other: PromptBlocks) -> None:
        assert isinstance(other, LocalPromptBlocks)
        self.pool[index].copy_(other.pool[index])
        if index == 0:
            self.sinks.copy_(other.sinks)
        self.num_ready = index + 1

    def payload(self, index: int) -> memoryview:
        sinks = self.sinks if index == 0 else None
        joined = self.layout.join_payload(self.pool[index], sinks)
        return joined.cpu().numpy().data

    def layer_share(self, index: int, layer: int) -> memoryview:
        if index == self.num_blocks:
            share = self.tail[layer].view(torch.uint8).flatten()
        else:
            share = self.layout.join_layer(self.pool[index], self.sinks if index == 0 else None, layer)
        return share.cpu().numpy().data

    def tail_bytes(self) -> bytes:
        return self.tail.cpu().numpy().tobytes()
