"""Several real nodes as one store: copies, leases, damage, and nodes that join and leave."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import pytest

from kvferry.kvstore import (
    BlockCorrupt,
    BlockNotFound,
    ClientConfig,
    InvalidRequest,
    KVStoreServer,
    MemoryBackend,
    Namespace,
    NodeConfig,
    PutManyOutcome,
    RingConfig,
    StoreClient,
    StoreFull,
    StoreRing,
    StoreUnavailable,
    block_keys,
    ring_member,
)
from kvferry.kvstore.placement import ranked, run_keys

MakeRecord = Callable[..., bytes]


@dataclass
class Node:
    server: KVStoreServer
    backend: MemoryBackend

    @property
    def address(self) -> str:
        return self.server.address

    async def has(self, keys: Sequence[bytes]) -> list[bool]:
        return await self.backend.contains(keys)


def patient(address: str) -> StoreClient:
    return StoreClient(ClientConfig(address=address, lookup_timeout_s=5.0))


def make_ring(nodes: Sequence[Node], replication: int = 1) -> StoreRing:
    config = RingConfig(nodes=tuple(node.address for node in nodes), replication=replication, lookup_timeout_s=5.0)
    return StoreRing(config, make_client=patient)


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Any]]:
    """Starts so many nodes in this process, on real sockets."""
    servers: list[KVStoreServer] = []

    async def start(count: int, capacity_bytes: int = 64 << 20) -> list[Node]:
        nodes = []
        for _ in range(count):
            backend = MemoryBackend(capacity_bytes=capacity_bytes)
            servers.append(KVStoreServer(backend, NodeConfig()))
            await servers[-1].start()
            nodes.append(Node(servers[-1], backend))
        return nodes

    yield start
    for server in servers:
        await server.stop(0)


@pytest.fixture
def chain(namespace: Namespace) -> list[bytes]:
    return block_keys(namespace, range(32 * 70))


async def fill(ring: StoreRing, chain: list[bytes], make_record: MakeRecord, size: int = 1000) -> None:
    store = ring.of_chain(chain)
    for index, key in enumerate(chain):
        assert await store.put(key, make_record(key, num_bytes=size, block_index=index))


async def read(ring: StoreRing, chain: list[bytes], namespace: Namespace, **options: Any) -> list[bytes]:
    """Keys of the records that came, each with the payload that was made for it."""
    got = []
    keys = options.pop("keys", chain)
    async with aclosing(ring.of_chain(chain).get(keys, namespace=namespace.digest(), **options)) as records:
        async for record in records:
            assert bytes(record.payload) == hashlib.shake_128(record.header.key).digest(len(record.payload))
            got.append(record.header.key)
    return got


@pytest.mark.parametrize(("count", "replication"), [(1, 1), (1, 2), (2, 1), (3, 2), (4, 4), (5, 3)])
async def test_records_are_where_the_ranking_says(
    start: Any, namespace: Namespace, chain: list[bytes], make_record: MakeRecord, count: int, replication: int
) -> None:
    nodes = await start(count)
    addresses = [node.address for node in nodes]
    async with make_ring(nodes, replication) as ring:
        await fill(ring, chain, make_record)
        for node in nodes:
            wanted = [node.address in ranked(run, addresses)[:replication] for run in run_keys(chain)]
            assert await node.has(chain) == wanted
        store = ring.of_chain(chain)
        assert (await store.lookup(chain)).num_contiguous == len(chain)
        assert (await store.lookup(chain[3:20])).num_contiguous == 17
        assert await read(ring, chain, namespace) == chain
        assert await read(ring, chain, namespace, keys=chain[5:40]) == chain[5:40]
        assert await read(ring, chain, namespace, keys=[chain[1], chain[60]]) == [chain[1], chain[60]]
        assert not await store.put(chain[0], make_record(chain[0]))  # never twice
        stats = await ring.stats()
        assert stats.records == len(chain) * min(count, replication)
        assert sum(node.server.counters.lookups for node in nodes) <= 2 * count + 2  # one RPC a node, not one a run
        assert await ring.delete(chain) == len(chain) * min(count, replication)
        assert (await store.lookup(chain)).num_contiguous == 0


async def test_another_client_finds_them(
    start: Any, namespace: Namespace, chain: list[bytes], make_record: MakeRecord
) -> None:
    """Placement is a function of addresses and keys alone."""
    nodes = await start(3)
    async with make_ring(nodes) as ring, make_ring(nodes[::-1]) as other:
        await fill(ring, chain, make_record)
        assert await read(other, chain, namespace) == chain


async def test_put_many_and_its_outcomes(
    start: Any, namespace: Namespace, chain: list[bytes], make_record: MakeRecord
) -> None:
    nodes = await start(3)
    async with make_ring(nodes, 2) as ring:
        store = ring.of_chain(chain)
        records = [(key, make_record(key)) for key in chain]
        assert await store.put(*records[7])
        records[3] = (chain[3], records[3][1][:-1])
        outcomes = await store.put_many(records)
        assert outcomes.pop(7) is PutManyOutcome.EXISTED
        assert outcomes.pop(3) is PutManyOutcome.CORRUPT
        assert set(outcomes) == {PutManyOutcome.STORED}
        assert (await store.lookup(chain)).num_contiguous == 3
        assert (await ring.stats()).records == 2 * (len(chain) - 1)


async def test_what_is_wrong_with_the_record_is_told(start: Any, chain: list[bytes], make_record: MakeRecord) -> None:
    small = await start(2, capacity_bytes=500)
    async with make_ring(small, 2) as ring:
        store = ring.of_chain(chain)
        with pytest.raises(StoreFull):
            await store.put(chain[0], make_record(chain[0]))
        with pytest.raises(BlockCorrupt):
            await store.put(chain[0], make_record(chain[1], num_bytes=10))
        with pytest.raises(InvalidRequest, match="not of this chain"):
            await store.put(bytes(32), b"x")
        assert ring.counters.copies_lost == 0


async def test_a_miss_on_one_copy_is_found_on_the_other(
    start: Any, namespace: Namespace, chain: list[bytes], make_record: MakeRecord
) -> None:
    """Every node loses other records: what one lacks another has, and holes end a chain only where all have one."""
    nodes = await start(2)
    async with make_ring(nodes, 2) as ring:
        await fill(ring, chain, make_record)
        lost = [chain[0], chain[9], chain[10], chain[33]], [chain[5], chain[40]]
        for node, keys in zip(nodes, lost, strict=True):
            await node.backend.delete(keys)
        assert (await ring.of_chain(chain).lookup(chain)).num_contiguous == len(chain)
        assert await read(ring, chain, namespace) == chain
        # Blocks 33 and 40 are of one run: whichever node is asked for it first lacks one of them.
        assert ring.counters.failovers >= 1
        await nodes[0].backend.delete([chain[40]])
        assert (await ring.of_chain(chain).lookup(chain)).num_contiguous == 40
        got: list[bytes] = []
        with pytest.raises(BlockNotFound) as caught:
            async for record in ring.of_chain(chain).get(chain, namespace=namespace.digest()):
                got.append(record.header.key)
        assert (caught.value.index, got) == (40, chain[:40])


async def test_a_node_that_lacks_a_run_is_not_asked_for_each_of_its_blocks(
    start: Any, namespace: Namespace, chain: list[bytes], make_record: MakeRecord
) -> None:
    nodes = await start(2)
    async with make_ring(nodes, 2) as ring:
        await fill(ring, chain, make_record)
        await nodes[0].backend.delete(chain)
        assert await read(ring, chain, namespace) == chain
        assert ring.counters.failovers <= len(set(run_keys(chain)))


async def test_a_damaged_copy_is_replaced_by_the_other(
    start: Any, namespace: Namespace, chain: list[bytes], make_record: MakeRecord
) -> None:
    """The node sends what it has in memory unchecked; the client refuses it and asks the other node."""
    nodes = await start(2)
    async with make_ring(nodes, 2) as ring:
        await fill(ring, chain, make_record)
        for number, index in enumerate((0, 6, 20, 69), start=1):
            run = run_keys(chain)[index]
            first = ring.reading_order(run, ring.members_of(run))[0].address
            node = next(node for node in nodes if node.address == first)
            record = bytearray((await node.backend.get([chain[index]]))[0])
            record[-1] ^= 1
            await node.backend.delete([chain[index]])
            await node.backend.put(chain[index], bytes(record))
            assert await read(ring, chain, namespace) == chain
            assert ring.counters.corrupt == number
            assert await node.has([chain[index]]) == [False]  # and deleted there
        # Both copies damaged: refused, whatever is asked first.
        for node in nodes:
            await node.backend.delete([chain[2]])
            await node.backend.put(chain[2], make_record(chain[2])[:-1] + b"?")
        with pytest.raises(BlockCorrupt):
            await read(ring, chain, namespace)
        assert ring.counters.corrupt == 6


async def test_leases_are_one_handle(
    start: Any, namespace: Namespace, chain: list[bytes], make_record: MakeRecord
) -> None:
    nodes = await start(3)
    async with make_ring(nodes, 2) as ring:
        await fill(ring, chain, make_record)
        store = ring.of_chain(chain)
        found = await store.lookup(chain, lease_s=20.0)
        assert found.lease_id
        assert 0 < found.lease_s <= 20.0
        async with asyncio.timeout(5):  # the copies' answers may be on their way
            while not all(len(node.backend.leases) == 1 for node in nodes):
                await asyncio.sleep(0.01)
        held = [[node.backend.leases.is_pinned(key) for key in chain] for node in nodes]
        assert all(any(copies) for copies in zip(*held, strict=True))
        assert await read(ring, chain, namespace, lease_id=found.lease_id) == chain
        await store.release(found.lease_id)
        await store.release(found.lease_id)
        await store.release(12345)
        assert [len(node.backend.leases) for node in nodes] == [0, 0, 0]
        assert len(ring.leases) == 0
        assert (await store.lookup(chain)).lease_id == 0


async def test_a_lease_that_comes_after_its_release_is_released(
    start: Any, namespace: Namespace, chain: list[bytes], make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = await start(2)
    async with make_ring(nodes, 2) as ring:
        await fill(ring, chain, make_record)
        slow, go_on = nodes[0].address, asyncio.Event()
        lookup = StoreClient.lookup

        async def late(self: StoreClient, *arguments: Any, **options: Any) -> Any:
            found = await lookup(self, *arguments, **options)
            if self.address == slow:
                await go_on.wait()
            return found

        monkeypatch.setattr(StoreClient, "lookup", late)
        store = ring.of_chain(chain)
        found = await store.lookup(chain, lease_s=20.0)
        assert found.num_contiguous == len(chain)  # the other copy answered
        assert ring.counters.left_behind == 1
        assert [member.is_silent for member in ring.members] == [member.address == slow for member in ring.members]
        assert await read(ring, chain, namespace) == chain
        assert nodes[0].server.counters.hits == 0  # a node that owes an answer is asked last
        await store.release(found.lease_id)
        assert len(nodes[0].backend.leases) == 1
        go_on.set()
        async with asyncio.timeout(5):
            while len(nodes[0].backend.leases):
                await asyncio.sleep(0.01)
        assert not any(member.is_silent for member in ring.members)


async def test_nodes_join_and_leave(start: Any, namespace: Namespace, make_record: MakeRecord) -> None:
    """A quarter of the runs moves to the fourth node; what moved is a miss, is published again, and found again."""
    nodes = await start(4)
    chains = [block_keys(namespace, [number] * 32 * 40) for number in range(40)]
    async with make_ring(nodes[:3]) as ring:
        for chain in chains:
            await fill(ring, chain, make_record, size=100)
        ring.set_nodes([node.address for node in nodes])
        assert len(ring.nodes) == 4
        moved = 0
        for chain in chains:
            for run in set(run_keys(chain)):
                moved += ring.members_of(run)[0].address == nodes[3].address
        total = sum(len(set(run_keys(chain))) for chain in chains)
        assert 0.15 < moved / total < 0.35
        for chain in chains:
            store = ring.of_chain(chain)
            here = [ring.members_of(run)[0].address != nodes[3].address for run in run_keys(chain)]
            expected = here.index(False) if False in here else len(chain)
            assert (await store.lookup(chain)).num_contiguous == expected
            stored = [
                await store.put(key, make_record(key, num_bytes=100, block_index=i)) for i, key in enumerate(chain)
            ]
            assert stored == [not there for there in here]
            assert await read(ring, chain, namespace) == chain
        ring.set_nodes([node.address for node in nodes[1:]])
        ring.set_nodes([node.address for node in nodes])  # and back: its records are still there
        for chain in chains:
            assert await read(ring, chain, namespace) == chain
        with pytest.raises(ValueError, match="host:port"):
            ring.set_nodes(["nowhere"])
        assert len(ring.nodes) == 4


async def test_a_get_outlives_the_nodes_it_reads_from(
    start: Any, namespace: Namespace, chain: list[bytes], make_record: MakeRecord
) -> None:
    nodes = await start(3)
    async with make_ring(nodes[:2]) as ring:
        await fill(ring, chain, make_record, size=200_000)
        got = []
        async with aclosing(ring.of_chain(chain).get(chain, namespace=namespace.digest())) as records:
            async for record in records:
                got.append(record.header.key)
                if len(got) == 1:
                    ring.set_nodes([nodes[2].address])
        assert got == chain
        assert (await ring.of_chain(chain).lookup(chain)).num_contiguous == 0


@pytest.mark.parametrize("settle_s", [0.0, 60.0])
async def test_a_lease_at_a_node_that_left(
    start: Any, chain: list[bytes], make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch, settle_s: float
) -> None:
    """It is released while the connection is kept; later it ends by itself, and the caller hears an ordinary error."""
    monkeypatch.setattr(ring_member, "SETTLE_S", settle_s)
    nodes = await start(2)
    async with make_ring(nodes[:1]) as ring:
        await fill(ring, chain, make_record)
        store = ring.of_chain(chain)
        found = await store.lookup(chain, lease_s=20.0)
        (member,) = ring.members
        ring.set_nodes([nodes[1].address])
        await asyncio.sleep(0.05)
        if settle_s:
            await store.release(found.lease_id)
            assert len(nodes[0].backend.leases) == 0
            await member.client.close()
        else:
            with pytest.raises(StoreUnavailable, match="not used any more"):
                await store.release(found.lease_id)
        assert (await store.lookup(chain)).num_contiguous == 0


async def test_pins_hold_every_copy(start: Any, chain: list[bytes], make_record: MakeRecord) -> None:
    nodes = await start(3)
    async with make_ring(nodes, 2) as ring:
        await fill(ring, chain[:10], make_record)
        assert await ring.pin(chain[:12]) == [True] * 10 + [False] * 2
        pinned = [sum(entry.pinned for entry in (await node.backend.page(b"", 1000)).entries) for node in nodes]
        assert sum(pinned) == 20  # two copies each
        assert await ring.unpin(chain[:12]) == [True] * 10 + [False] * 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nodes": ()}, "1 to 64 nodes"),
        ({"nodes": ("x",)}, "host:port"),
        ({"nodes": ("x:0",)}, "host:port"),
        ({"nodes": ("x:1", "y:1", "x:1")}, "x:1 is given twice"),
        ({"replication": 0}, "replication"),
        ({"replication": 9}, "replication"),
        ({"lookup_timeout_s": 0}, "lookup_timeout_s"),
    ],
)
def test_impossible_rings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RingConfig(**{"nodes": ("x:1",), **changes})


async def test_nobody_there() -> None:
    async with StoreRing(RingConfig(nodes=("127.0.0.1:1", "127.0.0.1:2"), replication=2)) as ring:
        chain = [bytes(32)]
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                await ring.of_chain(chain).lookup(chain)
            with pytest.raises(StoreUnavailable):
                await ring.of_chain(chain).put(chain[0], b"x")
            with pytest.raises(StoreUnavailable):
                await anext(ring.of_chain(chain).get(chain, namespace=bytes(32)))
            with pytest.raises(StoreUnavailable):
                await ring.stats()
            with pytest.raises(StoreUnavailable, match="did not answer"):
                await ring.delete(chain)
