"""Split-context decode: the leader runs the model and attends to its share of every context, followers to theirs.

In each layer that sees everything the leader's queries go to all ranks, and their partial results come back and are
merged by log-sum-exp, in the order of ranks. Layers with a window keep it on the leader, who needs nobody for them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvferry.decode.cache import PackedCache
from kvferry.decode.executor import StepInput, run_step
from kvferry.deploy.ranks.context_group import ContextGroup
from kvferry.deploy.ranks.context_memory import ContextMemory
from kvferry.deploy.ranks.context_share import WHAT, Exchange, empty_part
from kvferry.deploy.ranks.guarded_step import FirstError, agree
from kvferry.kernels.forward import CausalModel
from kvferry.kernels.packed import DecodeBatch, PackedKernels


class ContextStep:
    """`AttentionStep` of the leader. Rows past the batch are padding: they attend to nothing and give zeros."""

    def __init__(
        self,
        cache: PackedCache,
        share: DecodeBatch,
        windowed: DecodeBatch | None,
        kernels: PackedKernels,
        exchange: Exchange | None,
    ) -> None:
        """share: the leader's, of layers that see everything; windowed: whole contexts of the others, where there are
        any; exchange: None when no other rank has a block of any sequence.

        What fails between the exchanges is kept in `first.error`, and the step goes on without its result.
        """
        self.first = FirstError()
        self._cache = cache
        self._share = share
        self._windowed = windowed
        self._kernels = kernels
        self._exchange = exchange
        self._slots = share.slots.long()
        self._positions = share.tail_lens.long() - 1

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        n = self._slots.shape[0]
        tails = self._cache.tails
        tails[self._slots, layer, 0, :, self._positions] = key[:n].to(torch.float16)
        tails[self._slots, layer, 1, :, self._positions] = value[:n].to(torch.float16)
        own = query[:n].contiguous()
        windowed = self._windowed
        if windowed is not None and windowed.layout.layers[layer].head_bytes:
            out = self.first.guard(
                lambda: self._kernels.decode_attention(
                    own, windowed, layer=layer, scale=scale, window=window, softcap=softcap
                ),
                lambda: torch.zeros_like(own),
            )
        else:  # a window is wider than any context here
            out = self._merged(layer, own, scale=scale, softcap=softcap).to(query.dtype)
        return out if n == query.shape[0] else pad(out, (0, 0, 0, 0, 0, query.shape[0] - n))

    def _merged(self, layer: int, query: Tensor, *, scale: float, softcap: float | None) -> Tensor:
        if self._exchange is not None:
            self._exchange.broadcast(query)
        part = self.first.guard(
            lambda: self._kernels.share_attention(query, self._share, layer=layer, scale=scale, softcap=softcap),
            lambda: empty_part(query),
        )
        parts = part.unsqueeze(0) if self._exchange is None else self._exchange.gather(part)
        return self.first.guard(lambda: self._kernels.merge_shares(parts), lambda: torch.zeros_like(part[..., :-1]))


class ContextDecode:
    """`DecodeExecutor` on the leader."""

    def __init__(
        self,
        model: CausalModel,
        kernels: PackedKernels,
        group: ContextGroup,
        cache: PackedCache,
        *,
        num_blocks: int,
        pad_rows: Callable[[int], int],
    ) -> None:
        """cache, num_blocks: as of `ContextMemory`."""
        self.memory = ContextMemory(group, cache, num_blocks=num_blocks)
        self._model = model
        self._kernels = kernels
        self._group = group
        self._pad_rows = pad_rows

    def pack_tail(self, slot: int, block_id: int, *, index: int) -> None:
        self.memory.pack_tail(slot, block_id, index=index)

    def step(self, batch: StepInput) -> Tensor:
        """Alone, where no other rank has anything: a sequence's first block is the leader's."""
        memory = self.memory
        if not memory.own.pool_layout.block_bytes or all(len(row) < 2 for row in batch.block_tables):
            logits, error = self._run(batch, None)
        else:

            def command(rank: int) -> dict[str, object]:
                return {"op": "step", "block_tables": memory.tables_of(rank, batch.block_tables)}

            with self._group.together(command):
                logits, error = self._run(batch, self._group.team)
                error = agree(self._group.team, error, WHAT)
        if error is not None:
            raise error
        return logits

    def _run(self, batch: StepInput, exchange: Exchange | None) -> tuple[Tensor, Exception | None]:
        cache = self.memory.own
        rest = {"slots": batch.slots, "tail_lens": batch.tail_lens}
        share = cache.batch(block_tables=self.memory.tables_of(0, batch.block_tables), **rest).whole
        windowed = None
        if cache.ring_blocks:  # rings are found by slot and index: the ids do not matter, but how many there are does
            windowed = cache.batch(block_tables=batch.block_tables, **rest).windowed
        step = ContextStep(cache, share, windowed, self._kernels, exchange)
        return run_step(self._model, step, batch, self._pad_rows, cache.device), step.first.error
