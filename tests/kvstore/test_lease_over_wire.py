"""Leases, eviction and a full store, over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvferry.kvstore import (
    ClientConfig,
    KVStoreServer,
    MemoryBackend,
    Namespace,
    NodeConfig,
    StoreClient,
    StoreFull,
    block_keys,
)
from kvferry.kvstore.memory_backend import ENTRY_OVERHEAD_BYTES

_RECORD_BYTES = 1192 + ENTRY_OVERHEAD_BYTES


@pytest.fixture
def keys(namespace: Namespace) -> list[bytes]:
    return block_keys(namespace, range(32 * 20))


@asynccontextmanager
async def _node_of(num_records: int, **config: Any) -> AsyncIterator[StoreClient]:
    backend = MemoryBackend(capacity_bytes=num_records * _RECORD_BYTES)
    server = KVStoreServer(backend, NodeConfig(**config))
    await server.start()
    try:
        config_of_client = ClientConfig(address=server.address, lookup_timeout_s=5.0)
        async with StoreClient(config_of_client) as client:
            yield client
    finally:
        await server.stop(0)


async def test_leased_records_are_not_evicted(keys: list[bytes], make_record: Callable[..., bytes]) -> None:
    async with _node_of(4) as client:
        for key in keys[:4]:
            assert await client.put(key, make_record(key))
        found = await client.lookup(keys[:2], lease_s=20.0)
        assert found.num_contiguous == 2
        assert found.lease_id != 0
        assert found.lease_s == 20.0
        for key in keys[4:12]:
            assert await client.put(key, make_record(key))
        assert (await client.lookup(keys[:2])).num_contiguous == 2
        assert (await client.lookup(keys[2:3])).num_contiguous == 0, "the control: others went"
        await client.release(found.lease_id)
        await client.release(found.lease_id)
        for key in keys[12:16]:
            assert await client.put(key, make_record(key))
        assert (await client.lookup(keys[:2])).num_contiguous == 0
        assert (await client.stats()).evictions == 12


async def test_full_of_leases_is_store_full_until_they_expire(
    keys: list[bytes], make_record: Callable[..., bytes]
) -> None:
    async with _node_of(2, max_lease_s=1.0) as client:
        for key in keys[:2]:
            await client.put(key, make_record(key))
        found = await client.lookup(keys[:2], lease_s=1000.0)
        assert found.lease_s == 1.0, "the node grants no more than its limit"
        with pytest.raises(StoreFull, match="leased"):
            await client.put(keys[2], make_record(keys[2]))
        assert client.breaker_state.value == "closed", "a full store did answer"
        assert (await client.stats()).rejected == 1
        async with asyncio.timeout(10):
            while True:
                try:
                    assert await client.put(keys[2], make_record(keys[2]))
                    break
                except StoreFull:
                    await asyncio.sleep(0.05)


async def test_a_lease_covers_only_what_was_found(keys: list[bytes], make_record: Callable[..., bytes]) -> None:
    async with _node_of(3) as client:
        nothing = await client.lookup(keys[:2], lease_s=20.0)
        assert (nothing.num_contiguous, nothing.lease_id, nothing.lease_s) == (0, 0, 0.0)
        for key in (keys[0], keys[2]):
            await client.put(key, make_record(key))
        assert (await client.lookup(keys[:3], lease_s=20.0)).num_contiguous == 1
        for key in keys[3:6]:
            await client.put(key, make_record(key))
        assert (await client.lookup(keys[:1])).num_contiguous == 1
        assert (await client.lookup(keys[2:3])).num_contiguous == 0


async def test_get_with_a_lease_renews_it(
    namespace: Namespace, keys: list[bytes], make_record: Callable[..., bytes]
) -> None:
    async with _node_of(2) as client:
        await client.put(keys[0], make_record(keys[0]))
        found = await client.lookup(keys[:1], lease_s=2.0)
        for _ in range(5):
            await asyncio.sleep(0.5)
            records = client.get(keys[:1], namespace=namespace.digest(), lease_id=found.lease_id)
            assert [record.header.key async for record in records] == keys[:1]
        for key in keys[1:5]:
            await client.put(key, make_record(key))
        assert (await client.lookup(keys[:1])).num_contiguous == 1


async def test_least_recently_used_goes_first(keys: list[bytes], make_record: Callable[..., bytes]) -> None:
    async with _node_of(3) as client:
        for key in keys[:3]:
            await client.put(key, make_record(key))
        await client.lookup(keys[:1])
        await client.put(keys[3], make_record(keys[3]))
        present = [(await client.lookup([key])).num_contiguous for key in keys[:4]]
        assert present == [1, 0, 1, 1]
