"""A worker's own memory of records that it read or put, in front of a store: hot prefixes cross once, for all requests.

It saves transfers, and answers nothing else: look-ups always go to the store, so a record that the store lost is not
claimed to be there, and the store's own order of use stays right.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from kvferry.kvstore.client import LookupResult
from kvferry.kvstore.codec import Record, verify_record
from kvferry.kvstore.node_answers import NodeStats, PutManyOutcome
from kvferry.kvstore.store import ChainStore, Store

OVERHEAD_BYTES = 1024
"""What a record takes beside its payload, about."""
FOLLOW_S = 1.0
"""How long a get waits for a record that another one is reading; then it reads the record itself."""


@dataclass
class ReadCacheCounters:
    hits: int = 0
    """Records that were in memory."""
    joined: int = 0
    """Records that another get was reading."""
    read: int = 0
    """Records that crossed."""
    evictions: int = 0


class ReadCache:
    """A `Store` in front of another, which it owns. Keeps verified records only, `capacity_bytes` of them at most."""

    def __init__(self, inner: Store, capacity_bytes: int) -> None:
        self.counters = ReadCacheCounters()
        self.num_bytes = 0
        self._inner = inner
        self._capacity_bytes = capacity_bytes
        self._records: OrderedDict[bytes, Record] = OrderedDict()
        self._reading: dict[bytes, asyncio.Future[Record | None]] = {}

    def of_chain(self, keys: Sequence[bytes]) -> ChainStore:
        """See `Store`."""
        return _CachedChain(self, self._inner.of_chain(keys))

    async def delete(self, keys: Sequence[bytes], *, timeout_s: float | None = None) -> int:
        """See `Store`. Counts what the store had."""
        for key in keys:
            self._drop(key)
        return await self._inner.delete(keys, timeout_s=timeout_s)

    async def delete_all(self, *, timeout_s: float | None = None) -> int:
        """See `Store`. Counts what the store had."""
        self._records.clear()
        self.num_bytes = 0
        return await self._inner.delete_all(timeout_s=timeout_s)

    async def pin(self, keys: Sequence[bytes], *, timeout_s: float | None = None) -> list[bool]:
        """See `Store`. Pins nothing here."""
        return await self._inner.pin(keys, timeout_s=timeout_s)

    async def unpin(self, keys: Sequence[bytes], *, timeout_s: float | None = None) -> list[bool]:
        """See `Store`."""
        return await self._inner.unpin(keys, timeout_s=timeout_s)

    async def stats(self, *, timeout_s: float | None = None) -> NodeStats:
        """See `Store`. Of the store alone."""
        return await self._inner.stats(timeout_s=timeout_s)

    async def close(self) -> None:
        """See `Store`."""
        await self._inner.close()

    def find(self, key: bytes, namespace: bytes) -> Record | None:
        """The record as one that did not cross, and it is the newest now."""
        record = self._records.get(key)
        if record is None or record.header.namespace != namespace:
            return None
        self._records.move_to_end(key)
        self.counters.hits += 1
        return record._replace(nbytes=0)

    async def follow(self, key: bytes, namespace: bytes) -> Record | None:
        """The record from a get that is reading it now; None when there is no such get, or it does not come to it."""
        reading = self._reading.get(key)
        if reading is None:
            return None
        await asyncio.wait([reading], timeout=FOLLOW_S)
        record = reading.result() if reading.done() else None
        if record is None or record.header.namespace != namespace:
            return None
        self.counters.joined += 1
        return record._replace(nbytes=0)

    def has(self, key: bytes) -> bool:
        """Whether it is in memory."""
        return key in self._records

    def is_being_read(self, key: bytes) -> bool:
        """Whether a get is reading it now."""
        return key in self._reading

    def begin(self, keys: Sequence[bytes]) -> None:
        """The caller reads these now, those of them that nobody reads yet; it must call `end`."""
        loop = asyncio.get_running_loop()
        for key in keys:
            self._reading[key] = loop.create_future()

    def end(self, key: bytes, record: Record | None) -> None:
        """The caller has read the record of a key that it began, or gives up."""
        self._reading.pop(key).set_result(record)
        if record is not None:
            self.counters.read += 1
            self._keep(key, record)

    def keep_put(self, key: bytes, record: bytes) -> None:
        """The store has the record of this process: it need not cross back. Raises BlockCorrupt for no record."""
        header = verify_record(record, key)
        payload = memoryview(record)[-header.payload_bytes :] if header.payload_bytes else memoryview(b"")
        self._keep(key, Record(header=header, payload=payload, nbytes=len(record)))

    def _keep(self, key: bytes, record: Record) -> None:
        size = record.payload.nbytes + OVERHEAD_BYTES
        if size > self._capacity_bytes:
            return
        self._drop(key)
        self._records[key] = record
        self.num_bytes += size
        while self.num_bytes > self._capacity_bytes:
            self._drop(next(iter(self._records)))
            self.counters.evictions += 1

    def _drop(self, key: bytes) -> None:
        record = self._records.pop(key, None)
        if record is not None:
            self.num_bytes -= record.payload.nbytes + OVERHEAD_BYTES


class _CachedChain:
    """The cache for one chain; all but `get` goes to the store."""

    def __init__(self, cache: ReadCache, inner: ChainStore) -> None:
        self._cache = cache
        self._inner = inner

    async def lookup(
        self, keys: Sequence[bytes], *, lease_s: float = 0.0, timeout_s: float | None = None
    ) -> LookupResult:
        return await self._inner.lookup(keys, lease_s=lease_s, timeout_s=timeout_s)

    async def get(
        self, keys: Sequence[bytes], *, namespace: bytes, lease_id: int = 0, timeout_s: float | None = None
    ) -> AsyncGenerator[Record]:
        """A record that did not cross for this call has nbytes 0."""
        cache, position, patient = self._cache, 0, True
        while position < len(keys):
            key = keys[position]
            record = cache.find(key, namespace)
            if record is None and patient:
                record = await cache.follow(key, namespace)
                # Whom it followed stalls: one wait for it is enough.
                patient = record is not None or not cache.is_being_read(key)
            if record is not None:
                yield record
                position += 1
                continue
            end = position + 1
            while end < len(keys) and not (cache.has(keys[end]) or (patient and cache.is_being_read(keys[end]))):
                end += 1
            wanted = keys[position:end]
            async with aclosing(self._read(wanted, namespace, lease_id, timeout_s)) as records:
                async for record in records:
                    yield record
                    position += 1

    async def put(self, key: bytes, record: bytes, *, timeout_s: float | None = None) -> bool:
        stored = await self._inner.put(key, record, timeout_s=timeout_s)
        self._cache.keep_put(key, record)
        return stored

    async def put_many(
        self, records: Sequence[tuple[bytes, bytes]], *, timeout_s: float | None = None
    ) -> list[PutManyOutcome]:
        return await self._inner.put_many(records, timeout_s=timeout_s)

    async def release(self, lease_id: int, *, timeout_s: float | None = None) -> None:
        await self._inner.release(lease_id, timeout_s=timeout_s)

    async def _read(
        self, keys: Sequence[bytes], namespace: bytes, lease_id: int, timeout_s: float | None
    ) -> AsyncGenerator[Record]:
        """From the store. Who wants one of these meanwhile follows, for as long as they keep coming."""
        begun = [key for key in dict.fromkeys(keys) if not self._cache.is_being_read(key)]
        left = set(begun)
        self._cache.begin(begun)
        try:
            records = self._inner.get(keys, namespace=namespace, lease_id=lease_id, timeout_s=timeout_s)
            async with aclosing(records):
                async for record in records:
                    key = record.header.key
                    if key in left:
                        left.remove(key)
                        self._cache.end(key, record)
                    yield record
        finally:
            for key in left:
                self._cache.end(key, None)
