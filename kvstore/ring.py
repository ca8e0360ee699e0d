"""Many KV store nodes as one store: records are spread over them by rendezvous hashing, with copies.

    chain ──runs──▶ placement: which nodes ──▶ RingLookup, RingReader, put_copies ──▶ StoreClient, one a node

A lost node is a miss, never an error: its share is kept by the next nodes in the order until it answers again.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar

from kvferry.kvstore.client import LookupResult, StoreClient
from kvferry.kvstore.codec import Record
from kvferry.kvstore.config import ClientConfig
from kvferry.kvstore.errors import InvalidRequest, StoreUnavailable
from kvferry.kvstore.node_answers import NodeStats, PutManyOutcome
from kvferry.kvstore.placement import ranked, run_keys
from kvferry.kvstore.ring_config import RingConfig, checked_nodes
from kvferry.kvstore.ring_get import RingReader
from kvferry.kvstore.ring_lease import RingLease, RingLeases
from kvferry.kvstore.ring_lookup import RingLookup, RunKeys
from kvferry.kvstore.ring_member import RingCounters, RingMember
from kvferry.kvstore.ring_put import put_copies
from kvferry.kvstore.ring_stats import sum_of_stats

T = TypeVar("T")


class StoreRing:
    """A `Store` of several nodes. Make it on the event loop that uses it; close it there."""

    def __init__(self, config: RingConfig, *, make_client: Callable[[str], StoreClient] | None = None) -> None:
        """`make_client` makes the client of a node, given host:port; the ring owns and closes it."""
        self.counters = RingCounters()
        self.config = config
        self.leases = RingLeases()
        self._make_client = make_client or self._plain_client
        self._members: dict[str, RingMember] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # Workers prefer different copies of a record, so that a popular prefix loads all nodes that have it.
        self._taste = secrets.token_hex(8)
        self.set_nodes(config.nodes)

    def _plain_client(self, address: str) -> StoreClient:
        return StoreClient(ClientConfig(address=address, lookup_timeout_s=self.config.lookup_timeout_s))

    @property
    def nodes(self) -> tuple[str, ...]:
        """host:port of each node."""
        return tuple(self._members)

    @property
    def members(self) -> tuple[RingMember, ...]:
        """The nodes' clients."""
        return tuple(self._members.values())

    def set_nodes(self, nodes: Sequence[str]) -> None:
        """Changes the nodes, while calls run. Raises ValueError for what is no list of nodes.

        Calls that have begun end with the nodes that they know. A node that joins takes its share of the runs, 1/N of
        them, from all others; blocks that are not where they belong now are misses, and are published again.
        """
        wanted = checked_nodes(nodes, self.config.min_nodes)
        for address in self._members.keys() - set(wanted):
            self.spawn(self._members[address].retire(self.config.get_timeout_s + self.config.put_timeout_s))
        self._members = {
            address: self._members.get(address) or RingMember(address, self._make_client(address)) for address in wanted
        }

    def of_chain(self, keys: Sequence[bytes]) -> RingChain:
        """See `Store`."""
        return RingChain(self, keys)

    def members_of(self, run_key: bytes) -> list[RingMember]:
        """The nodes that should hold a run now, the first by rank in front. Nodes that do not answer are replaced by
        the next ones of the ranking."""
        up = {address for address, member in self._members.items() if member.is_up}
        candidates = up if up else self._members.keys()
        return [self._members[address] for address in ranked(run_key, candidates)[: self.config.replication]]

    def reading_order(self, run_key: bytes, members: Sequence[RingMember]) -> list[RingMember]:
        """The same nodes in the order in which this ring asks them for records."""
        order = ranked(run_key, (f"{self._taste}{member.address}" for member in members))
        place = {address: i for i, address in enumerate(order)}
        return sorted(members, key=lambda member: (member.is_silent, place[f"{self._taste}{member.address}"]))

    async def delete(self, keys: Sequence[bytes], *, timeout_s: float | None = None) -> int:
        """See `Store`. Asks every node. Raises StoreUnavailable when one did not answer, after all others did: what it
        has may come back with it."""
        return sum(await self._everywhere(lambda client: client.delete(keys, timeout_s=timeout_s)))

    async def delete_all(self, *, timeout_s: float | None = None) -> int:
        """See `Store`. Raises like `delete`."""
        return sum(await self._everywhere(lambda client: client.delete_all(timeout_s=timeout_s)))

    async def pin(self, keys: Sequence[bytes], *, timeout_s: float | None = None) -> list[bool]:
        """See `Store`. Pins every copy. Raises like `delete`."""
        told = await self._everywhere(lambda client: client.pin(keys, timeout_s=timeout_s))
        return [any(copies) for copies in zip(*told, strict=True)]

    async def unpin(self, keys: Sequence[bytes], *, timeout_s: float | None = None) -> list[bool]:
        """See `Store`. Raises like `delete`."""
        told = await self._everywhere(lambda client: client.unpin(keys, timeout_s=timeout_s))
        return [any(copies) for copies in zip(*told, strict=True)]

    async def stats(self, *, timeout_s: float | None = None) -> NodeStats:
        """See `Store`. Of the nodes that answer; raises StoreUnavailable when none does."""
        told = await self.stats_by_node(timeout_s=timeout_s)
        answered = [stats for stats in told.values() if stats is not None]
        if not answered:
            raise StoreUnavailable(f"none of the {len(told)} store nodes answered")
        return sum_of_stats(answered)

    async def stats_by_node(self, *, timeout_s: float | None = None) -> dict[str, NodeStats | None]:
        """By node; None for one that did not answer."""

        async def ask(member: RingMember) -> NodeStats | None:
            try:
                with member.running() as client:
                    return await client.stats(timeout_s=timeout_s)
            except StoreUnavailable:
                return None

        members = self.members
        told = await asyncio.gather(*map(ask, members))
        return {member.address: stats for member, stats in zip(members, told, strict=True)}

    async def close(self) -> None:
        """See `Store`. Safe to call twice."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(member.client.close() for member in self.members))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs something that nobody waits for, until `close`."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _everywhere(self, call: Callable[[StoreClient], Awaitable[T]]) -> list[T]:
        async def ask(member: RingMember) -> T:
            with member.running() as client:
                return await call(client)

        members = self.members
        told = await asyncio.gather(*map(ask, members), return_exceptions=True)
        silent = [m.address for m, answer in zip(members, told, strict=True) if isinstance(answer, StoreUnavailable)]
        answers: list[T] = []
        for answer in told:
            if isinstance(answer, BaseException):
                if not isinstance(answer, StoreUnavailable):
                    raise answer
            else:
                answers.append(answer)
        if silent:
            raise StoreUnavailable(f"these store nodes did not answer, the others did: {', '.join(silent)}")
        return answers


class RingChain:
    """A ring as the store of one chain; see `ChainStore`."""

    def __init__(self, ring: StoreRing, chain: Sequence[bytes]) -> None:
        self._ring = ring
        self._run_of = dict(zip(chain, run_keys(chain), strict=True))

    async def lookup(
        self, keys: Sequence[bytes], *, lease_s: float = 0.0, timeout_s: float | None = None
    ) -> LookupResult:
        """See `ChainStore`. A block counts when one of its nodes has it."""
        ring = self._ring
        runs: list[RunKeys] = []
        last = None
        for key in keys:
            if (run := self._run(key)) != last:
                runs.append(RunKeys([], ring.members_of(run)))
                last = run
            runs[-1].keys.append(key)
        lease = RingLease(ring.spawn)
        lookup = RingLookup(runs, lease, ring.counters, lease_s=lease_s)
        found = await lookup.run(ring.config.lookup_timeout_s if timeout_s is None else timeout_s)
        if lease.is_empty:
            return LookupResult(found.num_contiguous, 0, 0.0)
        return LookupResult(found.num_contiguous, ring.leases.keep(lease, found.lease_s), found.lease_s)

    async def get(
        self, keys: Sequence[bytes], *, namespace: bytes, lease_id: int = 0, timeout_s: float | None = None
    ) -> AsyncGenerator[Record]:
        """See `ChainStore`. Raises what `StoreClient.get` raises, once no node gives the record."""
        ring = self._ring
        order: dict[bytes, list[RingMember]] = {}
        for run in dict.fromkeys(map(self._run, keys)):
            order[run] = ring.reading_order(run, ring.members_of(run))
        reader = RingReader(
            keys,
            [order[self._run_of[key]] for key in keys],
            namespace=namespace,
            lease=ring.leases.get(lease_id),
            timeout_s=ring.config.get_timeout_s if timeout_s is None else timeout_s,
            counters=ring.counters,
        )
        async with aclosing(reader.records()) as records:
            async for record in records:
                yield record

    async def put(self, key: bytes, record: bytes, *, timeout_s: float | None = None) -> bool:
        """See `ChainStore`. Ends when one node has the record and the others had a moment; raises when none took it."""
        ring = self._ring
        taken = await put_copies(
            ring.members_of(self._run(key)),
            lambda client: client.put(key, record, timeout_s=self._put_timeout(timeout_s)),
            grace_s=ring.config.lookup_timeout_s,
            counters=ring.counters,
        )
        return any(taken)

    async def put_many(
        self, records: Sequence[tuple[bytes, bytes]], *, timeout_s: float | None = None
    ) -> list[PutManyOutcome]:
        """See `ChainStore`. Raises StoreUnavailable when no node answered for one of the records."""
        groups: dict[tuple[RingMember, ...], list[int]] = {}
        for index, (key, _) in enumerate(records):
            groups.setdefault(tuple(self._ring.members_of(self._run(key))), []).append(index)
        outcomes: dict[int, PutManyOutcome] = {}

        async def put(members: tuple[RingMember, ...], indices: list[int]) -> None:
            group = [records[index] for index in indices]
            taken = await put_copies(
                members,
                lambda client: client.put_many(group, timeout_s=self._put_timeout(timeout_s)),
                grace_s=self._ring.config.lookup_timeout_s,
                counters=self._ring.counters,
            )
            for index, copies in zip(indices, zip(*taken, strict=True), strict=True):
                outcomes[index] = next(outcome for outcome in PutManyOutcome if outcome in copies)

        done = await asyncio.gather(*(put(*group) for group in groups.items()), return_exceptions=True)
        for failed in done:
            if failed is not None:
                raise failed
        return [outcomes[index] for index in range(len(records))]

    async def release(self, lease_id: int, *, timeout_s: float | None = None) -> None:
        """See `ChainStore`."""
        lease = self._ring.leases.pop(lease_id)
        if lease is not None:
            await lease.release(timeout_s)

    def _run(self, key: bytes) -> bytes:
        run = self._run_of.get(key)
        if run is None:
            raise InvalidRequest("a key is not of this chain, so nobody knows which node has it")
        return run

    def _put_timeout(self, timeout_s: float | None) -> float:
        return self._ring.config.put_timeout_s if timeout_s is None else timeout_s
