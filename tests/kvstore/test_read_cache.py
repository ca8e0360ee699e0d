"""A worker's own cache of records: what crosses, what does not, and that it claims nothing."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from typing import Any

import pytest

from kvferry.kvstore import (
    BlockCorrupt,
    BlockNotFound,
    ClientConfig,
    KVStoreServer,
    MemoryBackend,
    Namespace,
    NodeConfig,
    StoreClient,
    block_keys,
    read_cache,
)
from kvferry.kvstore.read_cache import OVERHEAD_BYTES, ReadCache

MakeRecord = Callable[..., bytes]
SIZE = 200_000


class Lab:
    def __init__(self, server: KVStoreServer, backend: MemoryBackend, namespace: Namespace, capacity: int) -> None:
        self.server = server
        self.backend = backend
        self.namespace = namespace
        self.chain = block_keys(namespace, range(32 * 12))
        self.cache = ReadCache(StoreClient(ClientConfig(address=server.address, lookup_timeout_s=5.0)), capacity)

    async def get(self, first: int = 0, end: int = 12, namespace: Namespace | None = None) -> tuple[int, int]:
        """Records and bytes that came."""
        keys = self.chain[first:end]
        got, crossed = [], 0
        digest = (namespace or self.namespace).digest()
        async with aclosing(self.cache.of_chain(self.chain).get(keys, namespace=digest)) as records:
            async for record in records:
                assert bytes(record.payload) == hashlib.shake_128(record.header.key).digest(SIZE)
                got.append(record.header.key)
                crossed += record.nbytes > 0
                await asyncio.sleep(0)
        assert got == keys
        return len(got), crossed


@pytest.fixture
async def make_lab(namespace: Namespace, make_record: MakeRecord) -> AsyncIterator[Callable[..., Any]]:
    labs: list[Lab] = []

    async def make(capacity: int = 64 << 20) -> Lab:
        backend = MemoryBackend(capacity_bytes=64 << 20)
        server = KVStoreServer(backend, NodeConfig())
        await server.start()
        labs.append(Lab(server, backend, namespace, capacity))
        for key in labs[-1].chain:
            await backend.put(key, make_record(key, num_bytes=SIZE))
        return labs[-1]

    yield make
    for lab in labs:
        await lab.cache.close()
        await lab.server.stop(0)


async def test_the_second_get_costs_no_transfer(make_lab: Any) -> None:
    lab = await make_lab()
    assert await lab.get(0, 5) == (5, 5)
    assert await lab.get() == (12, 7)
    assert await lab.get() == (12, 0)
    assert await lab.get(3, 9) == (6, 0)
    assert lab.server.counters.hits == lab.cache.counters.read == 12


async def test_what_this_process_put_does_not_cross_back(make_lab: Any, make_record: MakeRecord) -> None:
    lab = await make_lab()
    chain = lab.cache.of_chain(lab.chain)
    for key in lab.chain[:4]:
        assert not await chain.put(key, make_record(key, num_bytes=SIZE))  # the store has it
    assert await lab.get(0, 6) == (6, 2)
    assert lab.cache.counters.read == 2


async def test_gets_at_once_cost_one_transfer(make_lab: Any) -> None:
    lab = await make_lab()
    done = await asyncio.gather(*(lab.get(0, 8 + number) for number in range(5)))
    assert [records for records, _ in done] == [8, 9, 10, 11, 12]
    assert sum(crossed for _, crossed in done) == lab.server.counters.hits == 12
    assert lab.cache.counters.joined > 0


async def test_memory_is_bounded_and_the_oldest_go(make_lab: Any) -> None:
    lab = await make_lab(4 * (SIZE + OVERHEAD_BYTES))
    assert await lab.get() == (12, 12)
    assert lab.cache.num_bytes == 4 * (SIZE + OVERHEAD_BYTES)
    assert lab.cache.counters.evictions == 8
    assert await lab.get(8, 12) == (4, 0)
    assert await lab.get(0, 1) == (1, 1)
    assert await lab.get(9, 12) == (3, 0)
    assert await lab.get(8, 9) == (1, 1)
    tiny = await make_lab(10)
    assert await tiny.get() == (12, 12)
    assert await tiny.get() == (12, 12)
    assert tiny.cache.num_bytes == 0


async def test_who_follows_goes_on_when_the_leader_leaves_or_stalls(
    make_lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = 0
    follow = ReadCache.follow

    async def counted(self: ReadCache, *arguments: Any) -> Any:
        nonlocal waits
        waits += 1
        return await follow(self, *arguments)

    monkeypatch.setattr(read_cache, "FOLLOW_S", 0.3)
    monkeypatch.setattr(ReadCache, "follow", counted)
    for leaves in (True, False):
        lab = await make_lab()
        leader = lab.cache.of_chain(lab.chain).get(lab.chain, namespace=lab.namespace.digest())
        await anext(leader)  # reads all twelve, and takes one
        follower = asyncio.create_task(lab.get())
        await asyncio.sleep(0.05)
        assert not follower.done()
        waits = 1
        if leaves:
            await leader.aclose()
        async with asyncio.timeout(10):
            assert await follower == (12, 11)  # the first was there
        assert waits == 1  # one bounded wait, not one a record
        await leader.aclose()
        assert not lab.cache._reading


async def test_it_claims_nothing_that_the_store_lost(make_lab: Any) -> None:
    lab = await make_lab()
    await lab.get()
    await lab.backend.delete(lab.chain)
    assert (await lab.cache.of_chain(lab.chain).lookup(lab.chain)).num_contiguous == 0
    await lab.cache.delete(lab.chain[:1])
    with pytest.raises(BlockNotFound):
        await lab.get()
    await lab.cache.delete_all()
    assert lab.cache.num_bytes == 0
    with pytest.raises(BlockNotFound):
        await lab.get(1)


async def test_only_verified_records_are_kept(make_lab: Any, namespace: Namespace) -> None:
    lab = await make_lab()
    record = bytearray((await lab.backend.get([lab.chain[2]]))[0])
    record[-1] ^= 1
    await lab.backend.delete([lab.chain[2]])
    await lab.backend.put(lab.chain[2], bytes(record))
    with pytest.raises((BlockCorrupt, BlockNotFound)):
        await lab.get()
    assert lab.cache.counters.read == 2
    assert not lab.cache._reading
    with pytest.raises(BlockNotFound):
        await lab.get(2, 3)  # deleted, and not from memory
    with suppress(BlockCorrupt, BlockNotFound):
        await lab.get(0, 1, Namespace(**{**vars(namespace), "tenant": "other"}))
        pytest.fail("another tenant got a record of this one")
