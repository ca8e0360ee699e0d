"""What a node needs from the place that keeps the bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from kvferry.kvstore.lease import LeaseTable


class BackendStats(NamedTuple):
    """Sizes and counts of a backend at one moment."""

    name: str
    records: int
    bytes: int
    capacity_bytes: int  # 0: unlimited or unknown
    evictions: int


class Backend(Protocol):
    """Keeps immutable records under 32-byte keys. It never looks into them.

    Used from one event loop. Every method may raise StoreUnavailable and ends in bounded time.
    """

    @property
    def leases(self) -> LeaseTable | None:
        """The leases this backend honours; None when it evicts as it likes."""

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The record of every key, or None where there is none. Changes nothing."""

    async def put(self, key: bytes, record: bytes) -> bool:
        """Stores `record` unless the key is taken; True when this call stored it.

        Never overwrites. May evict other, unleased records. Raises StoreFull when there is no
        room; then nothing was changed.
        """

    async def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of the keys of one chain are present. Counts as a use of each of them."""

    async def delete(self, keys: Sequence[bytes] | None) -> int:
        """Removes the keys, or every record when None. Returns how many there were."""

    async def stats(self) -> BackendStats:
        """Sizes and counts now."""

    async def close(self) -> None:
        """Frees connections and memory. The backend must not be used afterwards."""
