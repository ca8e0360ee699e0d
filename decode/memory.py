"""What a decode worker asks of the memory that holds its blocks, wherever that is: on one device, or in shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvferry.kernels.layout import BlockLayout


@dataclass(frozen=True, kw_only=True)
class HeldKV:
    """What the sequences of one request hold, at rest between steps."""

    prompt: list[int]
    """Block ids of the prompt's complete blocks; the sequences share them."""
    own: list[list[int]]
    """Of each sequence: the blocks that decode filled."""
    slots: list[int]
    tail_lens: list[int]


class SwappedKV(Protocol):
    """A request's KV in host memory, byte for byte what the pool held. It is freed with the last reference."""

    @property
    def num_bytes(self) -> int: ...


class KVMemory(Protocol):
    """A block pool, and for each running sequence a slot with sinks, rings and tail.

    Who owns which block or slot is decided by `BlockPool` and the engine. Payloads are whole blocks, of all KV heads.
    """

    @property
    def layout(self) -> BlockLayout:
        """Of whole blocks, as they are stored and moved."""
        ...

    @property
    def num_blocks(self) -> int: ...

    def in_ring(self, block_index: int, num_blocks: int) -> bool:
        """Whether a sequence of `num_blocks` complete blocks still needs this one in its ring."""
        ...

    def load_block(self, payload: Tensor, block_index: int, *, block_id: int | None, slot: int | None) -> None:
        """Copies a stored payload (uint8) into a block of the pool, with its sinks, and into a sequence's ring, each
        where it is not None.

        Raises ValueError for a wrong size, or numbers that no block has.
        """
        ...

    def load_layer(
        self, share: Tensor, layer: int, block_index: int, *, block_id: int | None, slot: int | None
    ) -> Tensor | None:
        """One layer of `load_block`; returns the layer's sinks of block 0, for `keep_sinks`. Raises as `load_block`."""
        ...

    def keep_sinks(self, block_id: int, sinks: Tensor) -> None:
        """The sinks of a first block that was written into the pool: fp16 [layer, kv_head, K|V, sink_tokens, D]."""
        ...

    def forget(self, block_id: int) -> None:
        """The block's content is given up."""
        ...

    def use_sinks(self, slot: int, block_id: int) -> None:
        """Gives a sequence the sinks that came with its first block."""
        ...

    def copy_slot(self, source: int, target: int, *, tail_len: int) -> None:
        """Gives a sequence the sinks, rings and tail of another one of the same request."""
        ...

    def load_tail(self, slot: int, tail: bytes) -> int:
        """Takes a handed-over tail, fp16 [layer][K|V][kv_head][token][D]; returns its tokens.

        Raises ValueError when the bytes are not a whole number of tokens of this model, or not fewer than a block.
        """
        ...

    def swap_out(self, held: HeldKV) -> SwappedKV:
        """Copies what a request holds to host memory."""
        ...

    def swap_in(self, saved: SwappedKV, held: HeldKV, *, present: frozenset[int]) -> None:
        """Writes everything back, to where the request is now. `present`: indices of prompt blocks that are in the
        pool already."""
        ...
