"""What a node needs from the place that keeps the bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from kvferry.kvstore.lease import LeaseTable

# The first bytes of a record, enough for its header.
HEAD_BYTES = 256


class BackendStats(NamedTuple):
    """Sizes and counts of a backend at one moment; see TierStats in kvstore.proto for the counts."""

    name: str
    records: int
    bytes: int
    capacity_bytes: int  # 0: unlimited or unknown
    evictions: int
    pinned_bytes: int = 0
    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    errors: int = 0
    refused: int = 0
    dropped: int = 0
    promoted: int = 0
    available: bool = True
    tiers: tuple[BackendStats, ...] = ()


class Entry(NamedTuple):
    """One record in a listing. `head` is its first HEAD_BYTES bytes, not verified."""

    key: bytes
    record_bytes: int
    tier: str
    pinned: bool
    age_s: float | None  # None: the backend does not know
    head: bytes


class Page(NamedTuple):
    """Some entries, and where the next page begins; an empty cursor ends the listing."""

    entries: list[Entry]
    next_cursor: bytes


class Backend(Protocol):
    """Keeps immutable records under 32-byte keys. It never looks into them.

    Used from one event loop. Every method may raise StoreUnavailable and ends in bounded time.
    """

    @property
    def leases(self) -> LeaseTable | None:
        """The leases this backend honours; None when it evicts as it likes."""

    @property
    def hands_out_verified(self) -> bool:
        """Whether every record that `get` returns passed its checks since it left a disk or a network."""

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The record of every key, or None where there is none. May keep what it read in a faster tier."""

    async def put(self, key: bytes, record: bytes) -> bool:
        """Stores `record` unless the key is taken; True when this call stored it.

        Never overwrites. May evict other, unleased and unpinned records. Raises StoreFull when
        there is no room; then nothing was changed.
        """

    async def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of the keys of one chain are present. Counts as a use of each of them."""

    async def delete(self, keys: Sequence[bytes] | None) -> int:
        """Removes the keys, or every record when None. Returns how many there were."""

    async def pin(self, keys: Sequence[bytes]) -> list[bool]:
        """Keeps the keys from eviction until `unpin` or `delete`; by key, whether it is pinned now.

        False for a key that is absent, or when the pins' share of the capacity is used up. Raises
        InvalidRequest where the backend cannot pin.
        """

    async def unpin(self, keys: Sequence[bytes]) -> list[bool]:
        """Ends pins; by key, whether there was one."""

    async def page(self, cursor: bytes, limit: int) -> Page:
        """At most about `limit` entries from `cursor` on (b"": from the start).

        Records that come or go meanwhile may be left out or told twice. Raises InvalidRequest for
        a cursor that no page had.
        """

    async def stats(self) -> BackendStats:
        """Sizes and counts now."""

    async def close(self) -> None:
        """Frees connections and memory. The backend must not be used afterwards."""
