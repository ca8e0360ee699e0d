"""Who computes for a worker: this process alone, or a group of ranks that it leads."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Protocol

from kvferry.decode.cache import PackedCache
from kvferry.decode.executor import DecodeExecutor, LocalDecode
from kvferry.deploy.model_config import ModelConfig
from kvferry.deploy.rank_model import RankModel
from kvferry.deploy.ranks.collectives import Alone
from kvferry.deploy.ranks.decode import GroupDecode
from kvferry.deploy.ranks.leader import RankGroup
from kvferry.deploy.ranks.prefill import GroupPrefill
from kvferry.deploy.row_padding import row_padding
from kvferry.prefill.executor import LocalPrefill, PrefillExecutor


class Executors(Protocol):
    """Makes what the loops of a worker run on. Close it."""

    @property
    def rank(self) -> RankModel:
        """This process's part of the model."""
        ...

    @property
    def follower_pids(self) -> list[int]:
        """Other processes that compute for this worker, in the order of ranks."""
        ...

    def prefill(self) -> PrefillExecutor: ...

    def decode(self, *, num_blocks: int, num_slots: int) -> DecodeExecutor: ...

    def close(self) -> None: ...


class LocalExecutors:
    """Everything in this process."""

    def __init__(self, config: ModelConfig) -> None:
        self.rank = RankModel(config, Alone())
        self.follower_pids: list[int] = []

    def prefill(self) -> PrefillExecutor:
        rank = self.rank
        return LocalPrefill(rank.model, rank.selection.kernels, rank.layout, rank.loaded.device)

    def decode(self, *, num_blocks: int, num_slots: int) -> DecodeExecutor:
        rank = self.rank
        cache = PackedCache(
            rank.layout,
            num_blocks=num_blocks,
            num_slots=num_slots,
            kernels=rank.selection.kernels,
            device=rank.loaded.device,
            windows=rank.windows,
        )
        pad_rows = row_padding(rank.rows_invariant, num_slots)
        return LocalDecode(rank.model, rank.selection.kernels, cache, pad_rows=pad_rows)

    def close(self) -> None:
        """There is nothing to end."""


class GroupExecutors:
    """This process leads a group of ranks."""

    def __init__(self, config: ModelConfig, *, on_lost: Callable[[str], None]) -> None:
        """Raises as `RankGroup`."""
        self._group = RankGroup(config, on_lost=on_lost)
        self.rank = self._group.rank
        self._memories = itertools.count()

    @property
    def follower_pids(self) -> list[int]:
        return self._group.pids

    def prefill(self) -> PrefillExecutor:
        return GroupPrefill(self._group, self.rank)

    def decode(self, *, num_blocks: int, num_slots: int) -> DecodeExecutor:
        number = next(self._memories)
        return GroupDecode(self._group, self.rank, number, num_blocks=num_blocks, num_slots=num_slots)

    def close(self) -> None:
        self._group.close()


def make_executors(config: ModelConfig, *, on_lost: Callable[[str], None]) -> Executors:
    """By `config.tensor_parallel`. `on_lost(reason)`: a rank of the group ended or hangs, and this worker must end.

    Raises UnsupportedModel or ValueError for a configuration that cannot be, RanksLost when a rank does not start.
    """
    if config.tensor_parallel == 1:
        return LocalExecutors(config)
    return GroupExecutors(config, on_lost=on_lost)
