"""Where the blocks of divided contexts lie: every rank of a decode worker has a pool of its own.

Block i of a sequence is held by rank i mod R, block b of the worker's pool is block b // R of rank b mod R. Sinks,
tails and rings are the leader's, which is rank 0.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

from torch import Tensor

from kvferry.decode.cache import PackedCache
from kvferry.decode.memory import HeldKV, SwappedKV
from kvferry.deploy.ranks.context_group import ContextGroup
from kvferry.kernels.layout import BlockLayout


class _Saved:
    """`SwappedKV` of all ranks; this is the leader's part."""

    def __init__(self, number: int, own: SwappedKV, *, others_bytes: int) -> None:
        self.number = number
        self.own = own
        self.num_bytes = own.num_bytes + others_bytes


class ContextMemory:
    """`KVMemory` on the leader. A block goes to the one rank that holds it, in the stream of commands: in order with
    the steps that read it."""

    def __init__(self, group: ContextGroup, own: PackedCache, *, num_blocks: int) -> None:
        """`num_blocks`: of each rank; `own`, of the leader, has one more, in which it packs the others'."""
        assert own.num_blocks == num_blocks + 1
        self.layout: BlockLayout = own.layout
        self.num_shares = group.size
        self.num_blocks = group.size * num_blocks
        self.own = own
        self._group = group
        self._packing = num_blocks
        self._saved_numbers = itertools.count()

    def tables_of(self, rank: int, block_tables: list[list[int]]) -> list[list[int]]:
        """A rank's share of these block tables, as block ids of its own pool."""
        return [self._on(rank, row) for row in block_tables]

    def in_ring(self, block_index: int, num_blocks: int) -> bool:
        return self.own.in_ring(block_index, num_blocks)

    def load_block(self, payload: Tensor, block_index: int, *, block_id: int | None, slot: int | None) -> None:
        rank, block = self._place(block_id)
        self.own.load_block(payload, block_index, block_id=None if rank else block, slot=slot)  # refuses damage
        if rank and block is not None:  # no sinks: those of block 0 are the leader's
            self._write(rank, block, 0, self.layout.share(payload, self.own.pool_layout))

    def load_layer(
        self, share: Tensor, layer: int, block_index: int, *, block_id: int | None, slot: int | None
    ) -> Tensor | None:
        rank, block = self._place(block_id)
        own_block = None if rank else block
        sinks = self.own.load_layer(share, layer, block_index, block_id=own_block, slot=slot)  # refuses damage
        _, offset, head_bytes = self.own.pool_layout.layers[layer]
        if rank and block is not None and head_bytes:  # no sinks: the first block is the leader's
            self._write(rank, block, offset, share)
        return sinks

    def keep_sinks(self, block_id: int, sinks: Tensor) -> None:
        self.own.keep_sinks(self._own_block(block_id), sinks)

    def forget(self, block_id: int) -> None:
        rank, block = self._place(block_id)
        if not rank and block is not None:
            self.own.forget(block)

    def use_sinks(self, slot: int, block_id: int) -> None:
        self.own.use_sinks(slot, self._own_block(block_id))

    def copy_slot(self, source: int, target: int, *, tail_len: int) -> None:
        self.own.copy_slot(source, target, tail_len=tail_len)

    def load_tail(self, slot: int, tail: bytes) -> int:
        return self.own.load_tail(slot, tail)

    def pack_tail(self, slot: int, block_id: int, *, index: int) -> None:
        """`DecodeExecutor.pack_tail`: the leader packs, and another rank's block goes there."""
        rank, block = self._place(block_id)
        assert block is not None
        self.own.pack_tail(slot, self._packing if rank else block, index=index)
        if rank:
            self._write(rank, block, 0, self.own.pool[self._packing])

    def swap_out(self, held: HeldKV) -> _Saved:
        number = next(self._saved_numbers)
        self._group.send_each(lambda rank: {"op": "swap_out", "saved": number, **self._held_on(rank, held)})
        kept_elsewhere = sum(block_id % self.num_shares > 0 for block_id in itertools.chain(held.prompt, *held.own))
        own = self.own.swap_out(self._own_part(held))
        saved = _Saved(number, own, others_bytes=kept_elsewhere * self.own.pool_layout.block_bytes)
        drop = {"op": "drop_saved", "saved": number}
        weakref.finalize(saved, self._group.send_each, lambda rank: drop).atexit = False
        return saved

    def swap_in(self, saved: SwappedKV, held: HeldKV, *, present: frozenset[int]) -> None:
        assert isinstance(saved, _Saved)

        def places(rank: int) -> list[int]:
            return [index // self.num_shares for index in sorted(present) if index % self.num_shares == rank]

        self._group.send_each(
            lambda rank: {
                "op": "swap_in",
                "saved": saved.number,
                "present": places(rank),
                **self._held_on(rank, held),
            }
        )
        self.own.swap_in(saved.own, self._own_part(held), present=frozenset(places(0)))

    def _place(self, block_id: int | None) -> tuple[int, int | None]:
        """A block's rank and its id there; without a block the leader's rank, and None."""
        return (0, None) if block_id is None else (block_id % self.num_shares, block_id // self.num_shares)

    def _own_block(self, block_id: int) -> int:
        """Of a sequence's first block, which has the sinks."""
        rank, block = self._place(block_id)
        assert rank == 0 and block is not None
        return block

    def _on(self, rank: int, block_ids: list[int]) -> list[int]:
        return [block_id // self.num_shares for block_id in block_ids if block_id % self.num_shares == rank]

    def _held_on(self, rank: int, held: HeldKV) -> dict[str, Any]:
        return {"prompt": self._on(rank, held.prompt), "own": [self._on(rank, blocks) for blocks in held.own]}

    def _own_part(self, held: HeldKV) -> HeldKV:
        return HeldKV(slots=held.slots, tail_lens=held.tail_lens, **self._held_on(0, held))

    def _write(self, rank: int, block: int, offset: int, data: Tensor) -> None:
        if not data.numel():  # every layer has a window
            return
        raw = data.cpu().numpy().tobytes()
        self._group.send_to(rank, {"op": "write", "block": block, "offset": offset, "data": raw})
