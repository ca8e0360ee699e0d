"""Records over the nodes of a Redis Cluster. A node that is lost loses its share of the records, no more.

redis-py's RedisCluster finds out which node has which slots. Each node is then a RedisBackend of its own
with a breaker of its own, because RedisCluster's own commands wait, refresh and retry for all nodes
when one of them is silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import redis.asyncio.cluster
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, RedisClusterException, RedisError, TryAgainError

from kvferry.kvstore.backend import BackendStats, Page
from kvferry.kvstore.breaker import Breaker
from kvferry.kvstore.config import DEFAULT_MAX_RECORD_BYTES
from kvferry.kvstore.errors import InvalidRequest, StoreUnavailable
from kvferry.kvstore.lease import LeaseTable
from kvferry.kvstore.redis_backend import RedisBackend
from kvferry.kvstore.redis_place import RedisPlace

_T = TypeVar("_T")

_ELSEWHERE = (MovedError, AskError, TryAgainError, ClusterDownError)
_REFRESH_EVERY_S = 1.0


class _ClusterNode(RedisBackend):
    """One node. Keys that are elsewhere now are missing here, and `on_moved` is told."""

    def __init__(self, place: RedisPlace, *, on_moved: Callable[[], None], cool_down_s: float, **options: Any) -> None:
        super().__init__(place, **options)
        self.breaker = Breaker(failure_threshold=1, cool_down_s=cool_down_s)
        self.prober: asyncio.Task[None] | None = None
        self._on_moved = on_moved

    def _value(self, reply: Any) -> Any:
        if isinstance(reply, _ELSEWHERE):
            self._on_moved()
            return None
        return super()._value(reply)


class RedisClusterBackend:
    """Keeps records in a Redis Cluster. The keys of a node that does not answer are missing.

    Each operation asks the nodes it needs at the same time, ends within `op_timeout_s`, and is tried
    once; a node that did not answer is not asked again until it answers a probe, sent every
    `cool_down_s`. Raises StoreUnavailable when no node of the cluster can be reached at all, and for a
    put whose node is lost.
    """

    def __init__(
        self,
        place: RedisPlace,
        *,
        key_prefix: bytes = b"kvferry:",
        connect_timeout_s: float = 0.2,
        op_timeout_s: float = 1.0,
        lookup_timeout_s: float = 0.1,
        cool_down_s: float = 0.5,
        max_connections: int = 16,
        max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES,
    ) -> None:
        if not place.cluster:
            raise ValueError("a cluster needs the addresses of some of its nodes")
        self._place = place
        self._key_prefix = key_prefix
        self._op_timeout_s = op_timeout_s
        self._lookup_timeout_s = lookup_timeout_s
        self._cool_down_s = cool_down_s
        self._options = {
            "key_prefix": key_prefix,
            "connect_timeout_s": connect_timeout_s,
            "op_timeout_s": op_timeout_s,
            "max_connections": max_connections,
            "max_record_bytes": max_record_bytes,
        }
        options = place.connection_options(connect_timeout_s=connect_timeout_s, op_timeout_s=op_timeout_s)
        self._cluster: Any = redis.asyncio.cluster.RedisCluster(
            startup_nodes=[redis.asyncio.cluster.ClusterNode(host, port) for host, port in place.nodes()],
            require_full_coverage=False,
            ssl=place.tls is not None,
            **options,
        )
        self._nodes: dict[tuple[str, int], _ClusterNode] = {}
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_at = -_REFRESH_EVERY_S
        self._known = False
        self._errors = self._refused = 0

    @property
    def leases(self) -> LeaseTable | None:
        """None: Redis evicts as it likes."""
        return None

    @property
    def hands_out_verified(self) -> bool:
        """False: whoever writes to Redis may have damaged a record."""
        return False

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See Backend.get. The records of lost nodes are missing."""
        return await self._scatter(keys, lambda node, some: node.get(some), None, self._op_timeout_s)

    async def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """See Backend.contains. The keys of lost nodes are missing."""
        return await self._scatter(keys, lambda node, some: node.contains(some), False, self._lookup_timeout_s)

    async def put(self, key: bytes, record: bytes) -> bool:
        """See Backend.put. Raises StoreUnavailable when the key's node is lost."""
        await self._know_the_nodes()
        node = self._node_of(key)
        if node is None or not node.breaker.allows_call():
            self._refused += 1
            raise StoreUnavailable("the cluster node of this record does not answer; going on without it")
        try:
            stored = await node.put(key, record)
        except StoreUnavailable as error:
            if isinstance(error.__cause__, _ELSEWHERE):
                self._refresh()  # the node answers: its breaker stays closed
            else:
                self._lost(node)
            raise
        node.breaker.record_success()
        return stored

    async def delete(self, keys: Sequence[bytes] | None) -> int:
        """See Backend.delete. Raises StoreUnavailable when a node could not be asked."""
        await self._know_the_nodes()
        refused, errors = self._refused, self._errors
        if keys is None:
            counts = await asyncio.gather(
                *(self._ask(node, node.delete(None), 10 * self._op_timeout_s) for node in list(self._nodes.values()))
            )
            deleted = sum(count or 0 for count in counts)
        else:

            async def count(node: _ClusterNode, some: Sequence[bytes]) -> list[int]:
                return [await node.delete(some), *[0] * (len(some) - 1)]

            deleted = sum(await self._scatter(keys, count, 0, self._op_timeout_s))
        if (self._refused, self._errors) != (refused, errors):
            raise StoreUnavailable("a cluster node does not answer; its records were not deleted")
        return deleted

    async def pin(self, keys: Sequence[bytes]) -> list[bool]:
        """Raises InvalidRequest: Redis evicts as it likes."""
        raise InvalidRequest("Redis evicts as it likes and cannot pin; give the node memory or a disk")

    async def unpin(self, keys: Sequence[bytes]) -> list[bool]:
        """Raises InvalidRequest: Redis evicts as it likes."""
        raise InvalidRequest("Redis evicts as it likes and cannot pin; give the node memory or a disk")

    async def page(self, cursor: bytes, limit: int) -> Page:
        """See Backend.page. Node by node, in the order of their addresses; lost nodes are left out."""
        await self._know_the_nodes()
        nodes = [node for _, node in sorted(self._nodes.items())]
        number, _, position = cursor.partition(b":")
        if not (number or b"0").isdigit() or int(number or 0) >= len(nodes):
            raise InvalidRequest("the page token is not one of this node")
        index = int(number or 0)
        page = await self._ask(nodes[index], nodes[index].page(position, limit), self._op_timeout_s) or Page([], b"")
        if page.next_cursor:
            return Page(page.entries, b"%d:%s" % (index, page.next_cursor))
        return Page(page.entries, b"%d:" % (index + 1) if index + 1 < len(nodes) else b"")

    async def stats(self) -> BackendStats:
        """See Backend.stats. Sums of the nodes that answer; raises StoreUnavailable when none does."""
        await self._know_the_nodes()
        answers = await asyncio.gather(
            *(self._ask(node, node.stats(), self._lookup_timeout_s) for node in list(self._nodes.values()))
        )
        stats = [one for one in answers if one is not None]
        if not stats:
            raise StoreUnavailable("no node of the Redis cluster answers")
        return BackendStats(
            name="redis",
            records=sum(one.records for one in stats),
            bytes=sum(one.bytes for one in stats),
            capacity_bytes=sum(one.capacity_bytes for one in stats),
            evictions=sum(one.evictions for one in stats),
            errors=self._errors,
            refused=self._refused,
        )

    async def close(self) -> None:
        """Closes all connections. Does not touch the records."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        await asyncio.gather(*(self._close_node(node) for node in self._nodes.values()))
        # Not RedisCluster.aclose, which does nothing before a command has gone through it.
        for group in ("nodes_cache", "startup_nodes"):
            await self._cluster.nodes_manager.aclose(group)

    async def _scatter(
        self,
        keys: Sequence[bytes],
        ask: Callable[[_ClusterNode, Sequence[bytes]], Awaitable[Sequence[_T]]],
        missing: _T,
        timeout_s: float,
    ) -> list[_T]:
        """Asks each node for its keys, all nodes at once; `missing` for the keys of lost nodes."""
        await self._know_the_nodes()
        results = [missing] * len(keys)
        shares: dict[_ClusterNode, list[int]] = {}
        for index, key in enumerate(keys):
            node = self._node_of(key)
            if node is not None:
                shares.setdefault(node, []).append(index)
            else:
                self._refused += 1

        async def share(node: _ClusterNode, indexes: list[int]) -> None:
            found = await self._ask(node, ask(node, [keys[index] for index in indexes]), timeout_s)
            for index, result in zip(indexes, found or (), strict=found is not None):
                results[index] = result

        await asyncio.gather(*(share(node, indexes) for node, indexes in shares.items()))
        return results

    async def _ask(self, node: _ClusterNode, work: Any, timeout_s: float) -> Any:
        """The outcome of the coroutine `work`, or None when the node does not answer."""
        if not node.breaker.allows_call():
            self._refused += 1
            work.close()
            return None
        try:
            async with asyncio.timeout(timeout_s):
                result = await work
        except (StoreUnavailable, TimeoutError):
            self._lost(node)
            return None
        node.breaker.record_success()
        return result

    def _lost(self, node: _ClusterNode) -> None:
        self._errors += 1
        node.breaker.record_failure()
        self._refresh()
        if node.prober is None or node.prober.done():
            node.prober = asyncio.create_task(self._probe(node), name="kvstore-probe-redis-node")

    async def _probe(self, node: _ClusterNode) -> None:
        while not node.breaker.allows_call():
            await asyncio.sleep(self._cool_down_s)
            if not node.breaker.try_probe():
                continue
            try:
                async with asyncio.timeout(self._op_timeout_s):
                    await node.stats()
            except (StoreUnavailable, TimeoutError):
                node.breaker.record_failure()
                self._refresh()  # its slots may have gone to another node
            else:
                node.breaker.record_success()

    def _node_of(self, key: bytes) -> _ClusterNode | None:
        slot = key_slot(self._key_prefix + key)
        owners = self._cluster.nodes_manager.slots_cache.get(slot)
        return self._nodes.get((str(owners[0].host), int(owners[0].port))) if owners else None

    async def _know_the_nodes(self) -> None:
        """Finds the nodes on first use. Raises StoreUnavailable when none of them answers."""
        if self._known:
            return
        self._refresh()
        if self._refreshing is not None:
            await asyncio.shield(self._refreshing)
        if not self._known:
            raise StoreUnavailable(f"no node of the Redis {self._place.text} answers")

    def _refresh(self) -> None:
        """Asks the cluster for its slots, in the background and at most once a second."""
        running = self._refreshing is not None and not self._refreshing.done()
        if not running and time.monotonic() - self._refreshed_at >= _REFRESH_EVERY_S:
            self._refreshed_at = time.monotonic()
            self._refreshing = asyncio.create_task(self._find_nodes(), name="kvstore-redis-slots")

    async def _find_nodes(self) -> None:
        manager = self._cluster.nodes_manager
        # RedisClusterException is no RedisError.
        with contextlib.suppress(
            RedisError, RedisClusterException, TimeoutError, OSError
        ):  # the old picture stays, or none
            async with asyncio.timeout(self._op_timeout_s * len(self._place.cluster)):
                await manager.initialize()
                self._known = True
        owners = {(str(slot[0].host), int(slot[0].port)) for slot in manager.slots_cache.values() if slot}
        for address in owners - self._nodes.keys():
            self._nodes[address] = _ClusterNode(
                self._place.node(*address), on_moved=self._refresh, cool_down_s=self._cool_down_s, **self._options
            )
        for address in self._nodes.keys() - owners:
            await self._close_node(self._nodes.pop(address))

    async def _close_node(self, node: _ClusterNode) -> None:
        if node.prober is not None:
            node.prober.cancel()
            await asyncio.gather(node.prober, return_exceptions=True)
        await node.close()
