"""A request's KV in host memory while it is swapped out of the pool: packed blocks, sinks and fp16 tails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvferry.decode.memory import HeldKV

if TYPE_CHECKING:
    from kvferry.decode.cache import PackedCache


@dataclass(frozen=True)
class SwappedOut:
    """`SwappedKV` of one device; the tensors are copies and in host memory."""

    prompt_blocks: Tensor
    """uint8 [prompt block, block_bytes]; the request's sequences share them."""
    prompt_sinks: Tensor | None
    """Those of the prompt's first complete block, where it has one."""
    own_blocks: list[Tensor]
    """One for each sequence: uint8 [block, block_bytes], what decode filled."""
    sinks: list[Tensor]
    rings: list[Tensor]
    tails: list[Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in (self.prompt_blocks, *self.own_blocks, *self.sinks, *self.rings, *self.tails))


def swap_out(cache: PackedCache, held: HeldKV) -> SwappedOut:
    """Copies what the sequences, at least one, of one request hold. Their state must be at rest."""
    return SwappedOut(
        prompt_blocks=_blocks(cache, held.prompt),
        prompt_sinks=cache.sinks_of(held.prompt[0]) if held.prompt else None,
        own_blocks=[_blocks(cache, block_ids) for block_ids in held.own],
        sinks=[cache.sinks[slot].to("cpu", copy=True) for slot in held.slots],
        rings=[cache.rings[slot].to("cpu", copy=True) for slot in held.slots],
        tails=[
            cache.tails[slot, :, :, :, :tail_len].to("cpu", copy=True)
            for slot, tail_len in zip(held.slots, held.tail_lens, strict=True)
        ],
    )


def swap_in(cache: PackedCache, saved: SwappedOut, held: HeldKV, *, present: frozenset[int]) -> None:
    """Writes everything back, into the slots and blocks that `held` names.

    `present`: indices of prompt blocks that are in the pool already.
    """
    for index, block_id in enumerate(held.prompt):
        if index not in present:
            cache.pool[block_id].copy_(saved.prompt_blocks[index])
            if index == 0 and saved.prompt_sinks is not None:
                cache.keep_sinks(block_id, saved.prompt_sinks)
    for own, blocks in zip(held.own, saved.own_blocks, strict=True):
        for block_id, block in zip(own, blocks, strict=True):
            cache.pool[block_id].copy_(block)
    of_sequences = zip(held.slots, held.tail_lens, saved.sinks, saved.rings, saved.tails, strict=True)
    for slot, tail_len, sinks, ring, tail in of_sequences:
        cache.sinks[slot].copy_(sinks)
        cache.rings[slot].copy_(ring)
        cache.tails[slot, :, :, :, :tail_len].copy_(tail)


def _blocks(cache: PackedCache, block_ids: list[int]) -> Tensor:
    index = torch.tensor(block_ids, dtype=torch.long, device=cache.device)
    return cache.pool.index_select(0, index).cpu()
