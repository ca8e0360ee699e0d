"""A request's KV in host memory while it is swapped out of the pool: packed blocks, sinks and fp16 tails."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from kvferry.decode.cache import PackedCache
from kvferry.decode.sequence import Sequence


@dataclass(frozen=True)
class SwappedOut:
    """Byte for byte what the pool held; the tensors are copies and in host memory."""

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


def swap_out(cache: PackedCache, sequences: SequenceOf[Sequence], *, num_prompt_blocks: int) -> SwappedOut:
    """Copies what `sequences`, at least one, of one request hold. Their state must be at rest."""
    prompt = sequences[0].block_ids[:num_prompt_blocks]
    return SwappedOut(
        prompt_blocks=_blocks(cache, prompt),
        prompt_sinks=cache.sinks_of(prompt[0]) if prompt else None,
        own_blocks=[_blocks(cache, s.block_ids[num_prompt_blocks : s.num_blocks]) for s in sequences],
        sinks=[cache.sinks[s.slot].to("cpu", copy=True) for s in sequences],
        rings=[cache.rings[s.slot].to("cpu", copy=True) for s in sequences],
        tails=[cache.tails[s.slot, :, :, :, : s.tail_len].to("cpu", copy=True) for s in sequences],
    )


def swap_in(
    cache: PackedCache,
    saved: SwappedOut,
    sequences: SequenceOf[Sequence],
    *,
    num_prompt_blocks: int,
    present: frozenset[int],
) -> None:
    """Writes everything back, into the slots and blocks that `sequences` name now.

    `present`: indices of prompt blocks that are in the pool already.
    """
    for index, block_id in enumerate(sequences[0].block_ids[:num_prompt_blocks]):
        if index not in present:
            cache.pool[block_id].copy_(saved.prompt_blocks[index])
            if index == 0 and saved.prompt_sinks is not None:
                cache.keep_sinks(block_id, saved.prompt_sinks)
    of_sequences = zip(sequences, saved.own_blocks, saved.sinks, saved.rings, saved.tails, strict=True)
    for s, blocks, sinks, ring, tail in of_sequences:
        own = s.block_ids[num_prompt_blocks : s.num_blocks]
        for block_id, block in zip(own, blocks, strict=True):
            cache.pool[block_id].copy_(block)
        cache.sinks[s.slot].copy_(sinks)
        cache.rings[s.slot].copy_(ring)
        cache.tails[s.slot, :, :, :, : s.tail_len].copy_(tail)


def _blocks(cache: PackedCache, block_ids: list[int]) -> Tensor:
    index = torch.tensor(block_ids, dtype=torch.long, device=cache.device)
    return cache.pool.index_select(0, index).cpu()
