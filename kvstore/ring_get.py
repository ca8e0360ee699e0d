"""Reads records in the chain's order from the nodes of a ring, and asks the replicas for what a node does not give."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing

from kvferry.kvstore.codec import Record
from kvferry.kvstore.errors import BlockCorrupt, BlockNotFound, KVStoreError, StoreUnavailable
from kvferry.kvstore.ring_lease import RingLease
from kvferry.kvstore.ring_member import RingCounters, RingMember, nobody_answered

_AHEAD = 2
"""Records before its end at which a stream's successor is opened: its first ones come while the last are used."""


class _Stream:
    """A Get call to one node for keys[start:end]."""

    def __init__(self, member: RingMember, start: int, end: int, records: AsyncGenerator[Record]) -> None:
        self.member = member
        self.start = start
        self.end = end
        self._records = records
        self._first: asyncio.Task[Record] | None = None

    def begin(self) -> None:
        """Sends the call without waiting for its first record."""
        self._first = asyncio.ensure_future(anext(self._records))

    async def next(self) -> Record:
        """Raises what the call raises."""
        first, self._first = self._first, None
        return await (anext(self._records) if first is None else first)

    async def close(self) -> None:
        if self._first is not None:
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
        await self._records.aclose()


class RingReader:
    """One get. `members[i]` are the nodes that may hold keys[i], the one to ask first in front; keys of one run share
    the list itself."""

    def __init__(
        self,
        keys: Sequence[bytes],
        members: Sequence[Sequence[RingMember]],
        *,
        namespace: bytes,
        lease: RingLease | None,
        timeout_s: float,
        counters: RingCounters,
    ) -> None:
        self._keys = keys
        self._members = members
        self._namespace = namespace
        self._lease = lease
        self._end = time.monotonic() + timeout_s
        self._counters = counters
        self._down: set[RingMember] = set()
        self._lacking: dict[int, set[RingMember]] = {}
        """By run (the identity of its list): members that lacked a record of it. They are asked last for its others."""
        self._errors: dict[int, dict[RingMember, KVStoreError]] = {}
        """By position: what its members said."""

    async def records(self) -> AsyncGenerator[Record]:
        """Raises, at the first key that no member gave: BlockNotFound if one says so, else BlockCorrupt, else
        StoreUnavailable."""
        with ExitStack() as stack:
            for member in {member for members in self._members for member in members}:
                stack.enter_context(member.running())
            async with aclosing(self._records()) as records:
                async for record in records:
                    yield record

    async def _records(self) -> AsyncGenerator[Record]:
        position, num_keys = 0, len(self._keys)
        stream: _Stream | None = None
        successor: _Stream | None = None
        try:
            while position < num_keys:
                if stream is None:
                    stream, successor = successor or self._open(position), None
                if successor is None and stream.end < num_keys and stream.end - position <= _AHEAD:
                    successor = self._try_open(stream.end)
                try:
                    record = await stream.next()
                except (BlockNotFound, BlockCorrupt, StoreUnavailable) as error:
                    self._note(stream.member, position, error)
                    failed, stream = stream, None
                    await failed.close()
                    if successor is not None:
                        late, successor = successor, None
                        await late.close()
                    continue
                yield record
                self._errors.pop(position, None)
                position += 1
                if position == stream.end:
                    finished, stream = stream, None
                    await finished.close()
        finally:
            for left in (stream, successor):
                if left is not None:
                    await left.close()

    def _candidates(self, position: int) -> list[RingMember]:
        members = self._members[position]
        lacking = self._lacking.get(id(members), set())
        failed = self._errors.get(position, {})
        left = [member for member in members if member not in self._down and member not in failed]
        return sorted(left, key=lambda member: member in lacking)

    def _try_open(self, position: int) -> _Stream | None:
        """None when nobody is left to ask: that is for the turn of `position` to say."""
        if not self._candidates(position) or time.monotonic() >= self._end:
            return None
        stream = self._open(position)
        stream.begin()
        return stream

    def _open(self, position: int) -> _Stream:
        """A stream from the first candidate, for as long as it stays the first one."""
        left_s = self._end - time.monotonic()
        candidates = self._candidates(position)
        if not candidates or left_s <= 0:
            raise self._failure(position)
        member, end = candidates[0], position + 1
        while end < len(self._keys) and self._candidates(end)[:1] == [member]:
            end += 1
        records = member.client.get(
            self._keys[position:end],
            namespace=self._namespace,
            lease_id=0 if self._lease is None else self._lease.id_at(member),
            timeout_s=left_s,
        )
        return _Stream(member, position, end, records)

    def _note(self, member: RingMember, position: int, error: KVStoreError) -> None:
        self._errors.setdefault(position, {})[member] = error
        if isinstance(error, StoreUnavailable):
            self._down.add(member)
        else:
            self._lacking.setdefault(id(self._members[position]), set()).add(member)
        self._counters.corrupt += isinstance(error, BlockCorrupt)
        self._counters.failovers += bool(self._candidates(position))

    def _failure(self, position: int) -> KVStoreError:
        said = list(self._errors.get(position, {}).values())
        if any(isinstance(error, BlockNotFound) for error in said):
            return BlockNotFound(f"block {position} of {len(self._keys)} is on no node", index=position)
        for error in said:
            if isinstance(error, BlockCorrupt):
                return BlockCorrupt(f"block {position} of {len(self._keys)}: {error}")
        if time.monotonic() >= self._end:
            return StoreUnavailable("the get took longer than its timeout")
        return said[0] if said else nobody_answered(len(self._members[position]))
