"""The seam between the decode loop and whoever computes: one device, or a group of ranks that each hold a shard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvferry.decode.attention import DecodeStep
from kvferry.decode.cache import PackedCache
from kvferry.decode.memory import KVMemory
from kvferry.kernels.forward import AttentionStep, CausalModel, padded_rows
from kvferry.kernels.packed import PackedKernels


@dataclass(frozen=True, kw_only=True)
class StepInput:
    """One token of each of B sequences. Rows of `block_tables` may differ in length."""

    token_ids: list[int]
    positions: list[int]
    block_tables: list[list[int]]
    slots: list[int]
    tail_lens: list[int]
    """With the tokens of this step."""


class DecodeExecutor(Protocol):
    """Runs steps over the sequences in its memory. One at a time, all from one thread."""

    @property
    def memory(self) -> KVMemory: ...

    def pack_tail(self, slot: int, block_id: int, *, index: int) -> None:
        """Quantizes a full tail into `block_id` as the sequence's block `index`; with the first also keeps the sinks.

        Raises ValueError when K or V is not finite.
        """
        ...

    def step(self, batch: StepInput) -> Tensor:
        """fp32 logits [B or more, vocab_size]; rows past B mean nothing."""
        ...


class LocalDecode:
    """`DecodeExecutor` on one device.

    The batch is padded to a row count (`pad_rows`) at which a row's bits don't depend on the count, so a sequence's
    tokens don't depend on its company.
    """

    def __init__(
        self,
        model: CausalModel,
        kernels: PackedKernels,
        cache: PackedCache,
        *,
        pad_rows: Callable[[int], int] = padded_rows,
    ) -> None:
        self.memory = cache
        self._model = model
        self._kernels = kernels
        self._pad_rows = pad_rows

    def pack_tail(self, slot: int, block_id: int, *, index: int) -> None:
        self.memory.pack_tail(slot, block_id, index=index)

    def step(self, batch: StepInput) -> Tensor:
        cache = self.memory
        tables = cache.batch(block_tables=batch.block_tables, slots=batch.slots, tail_lens=batch.tail_lens)
        return run_step(self._model, DecodeStep(cache, tables, self._kernels), batch, self._pad_rows, cache.device)


def run_step(
    model: CausalModel, step: AttentionStep, batch: StepInput, pad_rows: Callable[[int], int], device: torch.device
) -> Tensor:
    """The model's part of a step: fp32 logits [rows, vocab_size], rows as padded."""
    num_rows = len(batch.token_ids)
    padding = [0] * (pad_rows(num_rows) - num_rows)
    hidden = model.hidden(
        torch.tensor(batch.token_ids + padding, device=device),
        torch.tensor(batch.positions + padding, device=device),
        step,
    )
    return model.logits(hidden)
