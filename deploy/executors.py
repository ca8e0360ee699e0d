"""Who computes for a worker: this process alone, or a group of ranks that it leads."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Protocol

from kvferry.decode.cache import PackedCache
from kvferry.decode.executor import DecodeExecutor, LocalDecode
from kvferry.deploy.layer_windows import layer_rules
from kvferry.deploy.model_config import ModelConfig
from kvferry.deploy.rank_model import RankModel
from kvferry.deploy.ranks.collectives import Alone
from kvferry.deploy.ranks.context_decode import ContextDecode
from kvferry.deploy.ranks.context_group import ContextGroup
from kvferry.deploy.ranks.context_share import ShareConfig
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

    def share_of(self, kv_memory: int | float) -> int | float:
        """One rank's part of a worker's KV memory, in bytes or as a share of what is free."""
        ...

    def prefill(self) -> PrefillExecutor: ...

    def decode(self, *, num_blocks: int, num_slots: int) -> DecodeExecutor:
        """`num_blocks`: of each rank."""
        ...

    def close(self) -> None: ...


class LocalExecutors:
    """Everything in this process."""

    def __init__(self, config: ModelConfig) -> None:
        self.rank = RankModel(config, Alone())
        self.follower_pids: list[int] = []

    def share_of(self, kv_memory: int | float) -> int | float:
        return kv_memory

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


class ContextExecutors:
    """This process runs the model and divides the contexts between itself and followers."""

    def __init__(self, config: ModelConfig, *, on_lost: Callable[[str], None]) -> None:
        self.rank = RankModel(config, Alone())
        self._config = config
        self._on_lost = on_lost
        self._groups: list[ContextGroup] = []

    @property
    def follower_pids(self) -> list[int]:
        return [pid for group in self._groups for pid in group.pids]

    def share_of(self, kv_memory: int | float) -> int | float:
        size = self._config.context_parallel
        if isinstance(kv_memory, int):
            return kv_memory // size
        return kv_memory if self.rank.loaded.device.type == "cuda" else kv_memory / size

    def prefill(self) -> PrefillExecutor:
        rank = self.rank
        return LocalPrefill(rank.model, rank.selection.kernels, rank.layout, rank.loaded.device)

    def decode(self, *, num_blocks: int, num_slots: int) -> DecodeExecutor:
        """Raises as `ContextGroup`."""
        rank, device, kernels = self.rank, self.rank.loaded.device, self.rank.selection.kernels
        group = ContextGroup(
            ShareConfig(
                layout=rank.layout,
                windows=rank.windows,
                rules=layer_rules(rank.model, device=device),
                num_blocks=num_blocks,
            ),
            size=self._config.context_parallel,
            device=device,
            kernels=self._config.kernels,
            kernels_name=kernels.name,
            on_lost=self._on_lost,
        )
        self._groups.append(group)
        cache = PackedCache(
            rank.layout,
            num_blocks=num_blocks + 1,
            num_slots=num_slots,
            kernels=kernels,
            device=device,
            windows=rank.windows,
        )
        pad_rows = row_padding(rank.rows_invariant, num_slots)
        return ContextDecode(rank.model, kernels, group, cache, num_blocks=num_blocks, pad_rows=pad_rows)

    def close(self) -> None:
        for group in self._groups:
            group.close()


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

    def share_of(self, kv_memory: int | float) -> int | float:
        return self.rank.share_of(kv_memory)

    def prefill(self) -> PrefillExecutor:
        return GroupPrefill(self._group, self.rank)

    def decode(self, *, num_blocks: int, num_slots: int) -> DecodeExecutor:
        number = next(self._memories)
        return GroupDecode(self._group, self.rank, number, num_blocks=num_blocks, num_slots=num_slots)

    def close(self) -> None:
        self._group.close()


def make_executors(config: ModelConfig, *, on_lost: Callable[[str], None]) -> Executors:
    """By `config.tensor_parallel` and `config.context_parallel`. `on_lost(reason)`: a rank of the group ended or hangs,
    and this worker must end.

    Raises UnsupportedModel or ValueError for a configuration that cannot be, RanksLost when a rank does not start.
    """
    if config.context_parallel > 1:
        return ContextExecutors(config, on_lost=on_lost)
    if config.tensor_parallel == 1:
        return LocalExecutors(config)
    return GroupExecutors(config, on_lost=on_lost)
