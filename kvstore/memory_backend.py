"""The default backend: a dict with least-recently-used eviction by bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kvferry.kvstore.backend import BackendStats
from kvferry.kvstore.errors import StoreFull
from kvferry.kvstore.lease import LeaseTable

# What a record costs beside its bytes: the key, two object headers and the dict entry.
ENTRY_OVERHEAD_BYTES = 256


class MemoryBackend:
    """Keeps records in this process; a get hands out the stored object, it copies nothing.

    `capacity_bytes` bounds the records plus ENTRY_OVERHEAD_BYTES for each. Records pinned by
    `leases` are not evicted. No method suspends, so each is atomic on its event loop.
    """

    def __init__(self, *, capacity_bytes: int, leases: LeaseTable | None = None) -> None:
        if capacity_bytes < 1:
            raise ValueError("capacity_bytes must be positive")
        self._capacity_bytes = capacity_bytes
        self._leases = leases if leases is not None else LeaseTable()
        self._records: OrderedDict[bytes, bytes] = OrderedDict()  # oldest use first
        self._bytes = 0
        self._evictions = 0

    @property
    def leases(self) -> LeaseTable:
        """The leases that pin records against eviction."""
        return self._leases

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See Backend.get."""
        return [self._records.get(key) for key in keys]

    async def put(self, key: bytes, record: bytes) -> bool:
        """See Backend.put."""
        if key in self._records:
            return False
        self._make_room(_cost(record))
        self._records[key] = record
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
        """See Backend.delete. Removes leased records, too."""
        if keys is None:
            count = len(self._records)
            self._records.clear()
            self._bytes = 0
            return count
        return sum(self._remove(key) for key in keys)

    async def stats(self) -> BackendStats:
        """See Backend.stats. `bytes` includes the overhead of the entries."""
        return BackendStats(
            name="memory",
            records=len(self._records),
            bytes=self._bytes,
            capacity_bytes=self._capacity_bytes,
            evictions=self._evictions,
        )

    async def close(self) -> None:
        """See Backend.close."""
        await self.delete(None)

    def _remove(self, key: bytes) -> bool:
        record = self._records.pop(key, None)
        if record is None:
            return False
        self._bytes -= _cost(record)
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
        victims: list[bytes] = []
        for key, record in self._records.items():
            if self._leases.is_pinned(key):
                continue
            victims.append(key)
            missing -= _cost(record)
            if missing <= 0:
                break
        if missing > 0:
            raise StoreFull(
                "every record that could make room is leased; put again later, use shorter "
                "leases or start the node with more memory"
            )
        for key in victims:
            self._remove(key)
        self._evictions += len(victims)


def _cost(record: bytes) -> int:
    return len(record) + ENTRY_OVERHEAD_BYTES
