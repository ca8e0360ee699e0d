"""The store as its users see it: one node (`StoreClient`) or many (`StoreRing`) behind the same two protocols."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from kvferry.kvstore.client import LookupResult
from kvferry.kvstore.codec import Record
from kvferry.kvstore.node_answers import NodeStats, PutManyOutcome


class ChainStore(Protocol):
    """Where one chain's records are. Every call is bounded, and may raise KVStoreError: go on without the store."""

    async def lookup(
        self, keys: Sequence[bytes], *, lease_s: float = 0.0, timeout_s: float | None = None
    ) -> LookupResult:
        """How many of `keys`, consecutive ones of the chain, are present from the first on; leases them."""
        ...

    def get(
        self, keys: Sequence[bytes], *, namespace: bytes, lease_id: int = 0, timeout_s: float | None = None
    ) -> AsyncGenerator[Record]:
        """Yields the verified record of every key, in order. Close it when leaving it early."""
        ...

    async def put(self, key: bytes, record: bytes, *, timeout_s: float | None = None) -> bool:
        """Stores one encoded record; False when it was there."""
        ...

    async def put_many(
        self, records: Sequence[tuple[bytes, bytes]], *, timeout_s: float | None = None
    ) -> list[PutManyOutcome]:
        """Stores encoded records, given as (key, record); by record, what came of it."""
        ...

    async def release(self, lease_id: int, *, timeout_s: float | None = None) -> None:
        """Ends a lease before its time; unknown ones are ignored."""
        ...


class Store(Protocol):
    """A whole store. Single blocks are reached through `of_chain`: where a block lives is decided by its chain."""

    def of_chain(self, keys: Sequence[bytes]) -> ChainStore:
        """The store for a chain, of which `keys` are all, from block 0 on. Asks nobody."""
        ...

    async def delete(self, keys: Sequence[bytes], *, timeout_s: float | None = None) -> int:
        """Removes records wherever they are; returns how many there were, copies counted."""
        ...

    async def delete_all(self, *, timeout_s: float | None = None) -> int:
        """Removes every record; returns how many there were, copies counted."""
        ...

    async def pin(self, keys: Sequence[bytes], *, timeout_s: float | None = None) -> list[bool]:
        """Keeps records from eviction; by key, whether it is pinned now."""
        ...

    async def unpin(self, keys: Sequence[bytes], *, timeout_s: float | None = None) -> list[bool]:
        """Ends pins; by key, whether there was one."""
        ...

    async def stats(self, *, timeout_s: float | None = None) -> NodeStats:
        """Counters and sizes, of all nodes together."""
        ...

    async def close(self) -> None:
        """Cancels what runs and closes the connections."""
        ...
