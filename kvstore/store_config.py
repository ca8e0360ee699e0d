"""Which tiers a node has, and the backend that they make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvferry.kvstore.backend import Backend
from kvferry.kvstore.config import DEFAULT_MAX_RECORD_BYTES
from kvferry.kvstore.disk_backend import DiskBackend
from kvferry.kvstore.guarded_tier import GuardedTier, TierLimits
from kvferry.kvstore.lease import LeaseTable
from kvferry.kvstore.memory_backend import MemoryBackend
from kvferry.kvstore.redis_place import RedisPlace
from kvferry.kvstore.tiered_backend import TieredBackend
from kvferry.kvstore.verifier import Verifier

# A disk that writes behind a full page cache may take seconds for a record; nobody waits for it unless he puts.
DISK_LIMITS = TierLimits(put_timeout_s=4.0)
REDIS_LIMITS = TierLimits()


@dataclass(frozen=True, kw_only=True)
class DiskConfig:
    """A folder for records, and how many bytes they may take there."""

    folder: Path
    capacity_bytes: int


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """The tiers of one node, from the fastest to the slowest; None: without that tier."""

    memory_bytes: int | None = 1 << 30
    disk: DiskConfig | None = None
    redis: RedisPlace | None = None
    write: Literal["through", "back"] = "through"
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES

    @property
    def tier_names(self) -> str:
        """For messages: memory+disk+redis."""
        tiers = (("memory", self.memory_bytes), ("disk", self.disk), ("redis", self.redis))
        return "+".join(name for name, tier in tiers if tier is not None)


def make_backend(config: StoreConfig) -> Backend:
    """The backend of these tiers. Blocks while a disk's records are found.

    Raises ValueError for tiers that do not go together, OSError when the disk cannot be used. Redis is not
    asked yet: it may come up later.
    """
    leases = LeaseTable()
    if config.write == "back" and config.memory_bytes is None:
        raise ValueError("write: back needs a memory tier")
    memory = None
    if config.memory_bytes is not None:
        memory = MemoryBackend(capacity_bytes=config.memory_bytes, leases=leases)
        if config.disk is None and config.redis is None:
            return memory
    redis = None if config.redis is None else _redis_backend(config.redis, config)
    if redis is not None and memory is None and config.disk is None:
        return redis
    verifier = Verifier()
    lower: list[GuardedTier] = []
    if config.disk is not None:
        disk = DiskBackend(config.disk.folder, capacity_bytes=config.disk.capacity_bytes, leases=leases)
        lower.append(_guarded("disk", disk, DISK_LIMITS, verifier, config))
    if redis is not None:
        lower.append(_guarded("redis", redis, REDIS_LIMITS, verifier, config))
    return TieredBackend(memory=memory, lower=lower, leases=leases, verifier=verifier, write=config.write)


def _guarded(name: str, backend: Backend, limits: TierLimits, verifier: Verifier, config: StoreConfig) -> GuardedTier:
    return GuardedTier(name, backend, limits=limits, verifier=verifier, max_record_bytes=config.max_record_bytes)


def _redis_backend(place: RedisPlace, config: StoreConfig) -> Backend:
    # Imported here so that a node without Redis does not pay for it.
    if place.cluster:
        from kvferry.kvstore.redis_cluster_backend import RedisClusterBackend

        return RedisClusterBackend(place, max_record_bytes=config.max_record_bytes)
    from kvferry.kvstore.redis_backend import RedisBackend

    return RedisBackend(place, max_record_bytes=config.max_record_bytes)
