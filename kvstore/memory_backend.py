"""The default backend: a dict with least-recently-used eviction by bytes."""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvferry.kvstore.backend import HEAD_BYTES, BackendStats, Entry, Page
from kvferry.kvstore.errors import StoreFull
from kvferry.kvstore.lease import LeaseTable
from kvferry.kvstore.pins import DEFAULT_PINNED_SHARE, PinTable

# What a record costs beside its bytes: the key, two object headers and the dict entry.
ENTRY_OVERHEAD_BYTES = 256


class _Kept(NamedTuple):
    record: bytes
    since: float  # on the backend's clock


class MemoryBackend:
    """Keeps records in this process; a get hands out the stored object, it copies nothing.

    `capacity_bytes` bounds the records plus ENTRY_OVERHEAD_BYTES for each. Records that are leased
    or pinned are not evicted; `on_evict` gets every other record as it goes, and must not suspend.
    Every method but `close` runs without suspending, so each is atomic on its event loop.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int,
        leases: LeaseTable | None = None,
        max_pinned_share: float = DEFAULT_PINNED_SHARE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if capacity_bytes < 1:
            raise ValueError("capacity_bytes must be positive")
        self._capacity_bytes = capacity_bytes
        self._leases = leases if leases is not None else LeaseTable()
        self._pins = PinTable(capacity_bytes=capacity_bytes, max_share=max_pinned_share)
        self.on_evict: Callable[[bytes, bytes], None] | None = None
        self._clock = clock
        self._records: OrderedDict[bytes, _Kept] = OrderedDict()  # oldest use first
        self._bytes = 0
        self._evictions = 0
        self._hits = 0
        self._misses = 0

    @property
    def leases(self) -> LeaseTable:
        """The leases that keep records from eviction."""
        return self._leases

    @property
    def hands_out_verified(self) -> bool:
        """True: records are verified before they are put, and do not leave the process."""
        return True

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See Backend.get."""
        kept = [self._records.get(key) for key in keys]
        num_misses = kept.count(None)
        self._misses += num_misses
        self._hits += len(kept) - num_misses
        return [one.record if one is not None else None for one in kept]

    async def put(self, key: bytes, record: bytes) -> bool:
        """See Backend.put."""
        if key in self._records:
            return False
        self._make_room(_cost(record))
        self._records[key] = _Kept(record, self._clock())
        self._bytes += _cost(record)
        return True

    async def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """See Backend.contains. The first key becomes the most recently used one."""
        # A chain is only as good as its beginning: evicting its first block makes the others
        # worthless, so they must go before it.
        for key in reversed(keys):
            if key in self._records:
                self._records.move_to_end(key)
        return [key in self._records for key in keys]

    async def delete(self, keys: Sequence[bytes] | None) -> int:
        """See Backend.delete. Removes leased and pinned records, too."""
        if keys is None:
            count = len(self._records)
            self._records.clear()
            self._pins.clear()
            self._bytes = 0
            return count
        return sum(self._remove(key) for key in keys)

    async def pin(self, keys: Sequence[bytes]) -> list[bool]:
        """See Backend.pin."""
        kept = [self._records.get(key) for key in keys]
        return [one is not None and self._pins.pin(key, _cost(one.record)) for key, one in zip(keys, kept, strict=True)]

    async def unpin(self, keys: Sequence[bytes]) -> list[bool]:
        """See Backend.unpin."""
        return [self._pins.unpin(key) for key in keys]

    async def page(self, cursor: bytes, limit: int) -> Page:
        """See Backend.page. In the order of the keys."""
        now = self._clock()
        keys = heapq.nsmallest(limit + 1, (key for key in self._records if key > cursor))
        entries = []
        for key in keys[:limit]:
            record, since = self._records[key]
            entries.append(Entry(key, len(record), "memory", key in self._pins, now - since, record[:HEAD_BYTES]))
        return Page(entries, keys[limit - 1] if len(keys) > limit else b"")

    async def stats(self) -> BackendStats:
        """See Backend.stats. `bytes` includes the overhead of the entries."""
        return BackendStats(
            name="memory",
            records=len(self._records),
            bytes=self._bytes,
            capacity_bytes=self._capacity_bytes,
            evictions=self._evictions,
            pinned_bytes=self._pins.pinned_bytes,
            hits=self._hits,
            misses=self._misses,
        )

    async def close(self) -> None:
        """See Backend.close."""
        await self.delete(None)

    def keys(self) -> set[bytes]:
        """The keys that are present now."""
        return set(self._records)

    def holds(self, key: bytes) -> bool:
        """Whether the key is present. Does not count as a use."""
        return key in self._records

    def _remove(self, key: bytes) -> bool:
        kept = self._records.pop(key, None)
        if kept is None:
            return False
        self._pins.unpin(key)
        self._bytes -= _cost(kept.record)
        return True

    def _make_room(self, cost: int) -> None:
        missing = self._bytes + cost - self._capacity_bytes
        if missing <= 0:
            return
        if cost > self._capacity_bytes:
            raise StoreFull(
                f"a record of {cost} bytes can never fit the node's {self._capacity_bytes} bytes; "
                "start the node with more memory"
            )
        victims: list[tuple[bytes, bytes]] = []
        for key, kept in self._records.items():
            if self._leases.is_pinned(key) or key in self._pins:
                continue
            victims.append((key, kept.record))
            missing -= _cost(kept.record)
            if missing <= 0:
                break
        if missing > 0:
            raise StoreFull(
                "every record that could make room is leased or pinned; put again later, use shorter "
                "leases, unpin records or start the node with more memory"
            )
        for key, record in victims:
            self._remove(key)
            if self.on_evict is not None:
                self.on_evict(key, record)
        self._evictions += len(victims)


def _cost(record: bytes) -> int:
    return len(record) + ENTRY_OVERHEAD_BYTES
