"""Memory, disk and Redis as one backend. Each of them is optional; the first to have a record answers.

    put      memory ──▶ disk, Redis       through: before the put ends; back: behind it
    get      memory ─miss▶ disk ─miss▶ Redis, and what is found comes up to memory (and to disk on eviction)
    evict    memory ──▶ disk              a record that the disk does not have goes down as it leaves memory

The lower tiers are guarded: a look-up waits for a dead one once, and then not at all until it answers.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from typing import Literal

from kvferry.kvstore.backend import BackendStats, Page
from kvferry.kvstore.disk_backend import DiskBackend
from kvferry.kvstore.errors import InvalidRequest, StoreFull, StoreUnavailable
from kvferry.kvstore.guarded_tier import GuardedTier, PutOutcome
from kvferry.kvstore.lease import LeaseTable
from kvferry.kvstore.memory_backend import MemoryBackend
from kvferry.kvstore.verifier import Verifier
from kvferry.kvstore.write_behind import WriteBehind

_log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0


class TieredBackend:
    """Composes the tiers. Owns them: `close` closes them all.

    Leases hold in memory and on disk; a record that only Redis has may go at any time. Pins are kept
    by memory and disk, each within its share; pinning a record that only Redis has brings it up first.

    With `write` "back" a put ends once memory has the record, and `max_behind_bytes` of records wait
    to be written down. A record that finds no room there is counted as dropped by the tiers, stays in
    memory, and is offered again when it is evicted. Without memory every write is through.
    """

    def __init__(
        self,
        *,
        memory: MemoryBackend | None,
        lower: Sequence[GuardedTier],
        leases: LeaseTable,
        verifier: Verifier,
        write: Literal["through", "back"] = "through",
        max_behind_bytes: int = 256 << 20,
    ) -> None:
        if memory is None and not lower:
            raise ValueError("a store needs at least one tier: memory, disk or Redis")
        if memory is None and write == "back":
            raise ValueError("write: back needs a memory tier")
        self._memory = memory
        self._lower = tuple(lower)
        self._leases = leases
        self._verifier = verifier
        self._write = write
        self._behind = WriteBehind(self._write_down, max_bytes=max_behind_bytes)
        self._unwritten: set[bytes] = set()  # in memory, and some lower tier did not get it
        self._deletes = 0  # a read that began before a delete must not bring its records back
        self._promoted = 0
        if memory is not None:
            memory.on_evict = self._evicted

    @property
    def leases(self) -> LeaseTable | None:
        """The leases of memory and disk; None with Redis alone."""
        return self._leases if self._memory is not None or self._disk is not None else None

    @property
    def hands_out_verified(self) -> bool:
        """True: what comes from disk or Redis is checked on its way up."""
        return True

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See Backend.get."""
        records: list[bytes | None] = [None] * len(keys)
        if self._memory is not None:
            records = await self._memory.get(keys)
        deletes = self._deletes
        for tier in self._lower:
            missing = [index for index, record in enumerate(records) if record is None]
            if not missing:
                break
            found = await tier.get([keys[index] for index in missing])
            for index, record in zip(missing, found, strict=True):
                records[index] = record
                if record is not None and deletes == self._deletes:
                    await self._promote(keys[index], record)
        return records

    async def put(self, key: bytes, record: bytes) -> bool:
        """See Backend.put. Stored when any tier has it now; a tier that is lost or full is passed over."""
        outcomes: list[PutOutcome] = []
        if self._memory is not None:
            outcomes.append(await self._put_in_memory(key, record))
            if outcomes[0] is PutOutcome.STORED and self._write == "back":
                self._offer(key, record)
                return True
        outcomes += await self._put_below(key, record)
        for outcome in outcomes:
            if outcome in (PutOutcome.STORED, PutOutcome.EXISTED):
                return outcome is PutOutcome.STORED
        if PutOutcome.FULL in outcomes:
            raise StoreFull("no tier of the store has room for the record; put again later, or give a tier more bytes")
        raise StoreUnavailable("no tier of the store could take the record")

    async def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """See Backend.contains. A tier is asked only about what those above it do not have."""
        present = [False] * len(keys)
        if self._memory is not None:
            present = await self._memory.contains(keys)
        for tier in self._lower:
            if tier.backend is self._disk:
                # No I/O, and all keys, so that the order of use on disk follows that of memory.
                found = await tier.contains(keys)
                present = [had or has for had, has in zip(present, found, strict=True)]
                continue
            missing = [index for index, had in enumerate(present) if not had]
            if missing:
                found = await tier.contains([keys[index] for index in missing])
                for index, has in zip(missing, found, strict=True):
                    present[index] = has
        return present

    async def delete(self, keys: Sequence[bytes] | None) -> int:
        """See Backend.delete. Raises StoreUnavailable, after deleting elsewhere, when a tier cannot be asked."""
        self._deletes += 1
        count = sum(await self.contains(keys)) if keys is not None else len(self._local_keys())
        if self._memory is not None:
            await self._memory.delete(keys)
        self._unwritten.difference_update(self._unwritten.copy() if keys is None else keys)
        await self._behind.discard(keys)
        results = await asyncio.gather(*(tier.delete(keys) for tier in self._lower), return_exceptions=True)
        self._deletes += 1
        for result in results:
            if isinstance(result, BaseException):
                raise result
            if keys is None:
                count = max(count, result)
        return count

    async def pin(self, keys: Sequence[bytes]) -> list[bool]:
        """See Backend.pin. True when memory or disk keeps the record now."""
        self._need_pins()
        for key in keys:  # those that only Redis has come up
            if not any(one.holds(key) for one in (self._memory, self._disk) if one is not None):
                await self.get([key])
        pinned = [False] * len(keys)
        if self._memory is not None:
            pinned = await self._memory.pin(keys)
        if self._disk is not None:
            await self._move_to_disk(keys)
            on_disk = await self._disk.pin(keys)
            pinned = [one or other for one, other in zip(pinned, on_disk, strict=True)]
        return pinned

    async def unpin(self, keys: Sequence[bytes]) -> list[bool]:
        """See Backend.unpin."""
        self._need_pins()
        unpinned = [False] * len(keys)
        if self._memory is not None:
            unpinned = await self._memory.unpin(keys)
        if self._disk is not None:
            on_disk = await self._disk.unpin(keys)
            unpinned = [one or other for one, other in zip(unpinned, on_disk, strict=True)]
        return unpinned

    async def page(self, cursor: bytes, limit: int) -> Page:
        """See Backend.page. Tier by tier; a tier that does not answer is left out."""
        tiers = [*([self._memory] if self._memory is not None else []), *(tier.backend for tier in self._lower)]
        number = cursor[0] if cursor else 0
        if number >= len(tiers):
            raise InvalidRequest("the page token is not one of this node")
        try:
            page = await tiers[number].page(cursor[1:], limit)
        except StoreUnavailable as error:
            _log.warning("a tier is left out of a listing: %s", error)
            page = Page([], b"")
        if page.next_cursor:
            return Page(page.entries, bytes([number]) + page.next_cursor)
        return Page(page.entries, bytes([number + 1]) if number + 1 < len(tiers) else b"")

    async def stats(self) -> BackendStats:
        """See Backend.stats. Sizes are those of the first tier, evictions of the last local one."""
        tiers = [await tier.stats() for tier in self._lower]
        if self._memory is not None:
            tiers.insert(0, (await self._memory.stats())._replace(promoted=self._promoted))
        first = tiers[0]
        return first._replace(
            name="+".join(tier.name for tier in tiers),
            corrupt=sum(tier.corrupt for tier in tiers),
            errors=sum(tier.errors for tier in tiers),
            tiers=tuple(tiers),
        )

    async def drain(self, timeout_s: float) -> int:
        """Waits until the records behind are written down; returns how many are not."""
        return await self._behind.drain(timeout_s)

    async def close(self) -> None:
        """Writes down what waits, for at most CLOSE_TIMEOUT_S, then closes every tier."""
        left = await self._behind.close(CLOSE_TIMEOUT_S)
        if left:
            _log.warning("%d records were not written to the lower tiers before the end", left)
        for tier in self._lower:
            await tier.close()
        if self._memory is not None:
            await self._memory.close()
        self._verifier.close()

    def _evicted(self, key: bytes, record: bytes) -> None:
        """Takes a record down that leaves memory and that a lower tier does not have."""
        unwritten = key in self._unwritten
        self._unwritten.discard(key)
        disk = self._disk
        if unwritten or (disk is not None and not disk.holds(key)):
            self._offer(key, record, keep=False)

    @property
    def _disk(self) -> DiskBackend | None:
        return next((tier.backend for tier in self._lower if isinstance(tier.backend, DiskBackend)), None)

    def _local_keys(self) -> set[bytes]:
        return set(itertools.chain(*(one.keys() for one in (self._memory, self._disk) if one is not None)))

    def _need_pins(self) -> None:
        if self._memory is None and self._disk is None:
            raise InvalidRequest("Redis evicts as it likes and cannot pin; give the node memory or a disk")

    def _offer(self, key: bytes, record: bytes, *, keep: bool = True) -> None:
        """Puts a record into the queue; counts it where there is no room."""
        if self._behind.offer(key, record):
            return
        for tier in self._lower:
            tier.counts.dropped += 1
        if keep:
            self._unwritten.add(key)

    async def _put_in_memory(self, key: bytes, record: bytes) -> PutOutcome:
        assert self._memory is not None
        try:
            return PutOutcome.STORED if await self._memory.put(key, record) else PutOutcome.EXISTED
        except StoreFull:
            return PutOutcome.FULL

    async def _put_below(self, key: bytes, record: bytes) -> list[PutOutcome]:
        outcomes = list(await asyncio.gather(*(tier.put(key, record) for tier in self._lower)))
        if self._memory is not None and PutOutcome.LOST in outcomes and self._memory.holds(key):
            self._unwritten.add(key)
        return outcomes

    async def _write_down(self, key: bytes, record: bytes) -> None:
        await self._put_below(key, record)

    async def _promote(self, key: bytes, record: bytes) -> None:
        if self._memory is not None and await self._put_in_memory(key, record) is PutOutcome.STORED:
            self._promoted += 1

    async def _move_to_disk(self, keys: Sequence[bytes]) -> None:
        """Writes down what memory has and the disk does not, so that it can be pinned there."""
        assert self._disk is not None
        if self._memory is None:
            return
        tier = next(tier for tier in self._lower if tier.backend is self._disk)
        for key in keys:
            if self._memory.holds(key) and not self._disk.holds(key):
                record = (await self._memory.get([key]))[0]
                if record is not None:
                    await tier.put(key, record)
