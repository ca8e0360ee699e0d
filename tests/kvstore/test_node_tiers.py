"""What a node with tiers says over the wire: several puts in a call, pins, listings, counters; and restarts."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from support.store_processes import NAMESPACE, key_of, record_of

from kvferry.kvstore import (
    ClientConfig,
    InvalidRequest,
    KVStoreServer,
    NodeConfig,
    PutManyOutcome,
    StoreClient,
    StoreUnavailable,
)
from kvferry.kvstore.memory_backend import MemoryBackend
from kvferry.proto import kvstore_pb2 as pb
from kvferry.proto import kvstore_pb2_grpc

KEYS = [key_of(number) for number in range(200)]
SIZES = [1, 64_000, 300_000, 2_000_000]


def _client(address: str) -> StoreClient:
    return StoreClient(ClientConfig(address=address, lookup_timeout_s=5.0, put_timeout_s=20.0))


async def _until_up(client: StoreClient) -> None:
    """The first connection may take more than gRPC's half second here: two cores, shared."""
    async with asyncio.timeout(30):
        while True:
            try:
                await client.stats()
                return
            except StoreUnavailable:
                await asyncio.sleep(0.05)


async def _payloads(client: StoreClient, keys: list[bytes]) -> int:
    return len([record async for record in client.get(keys, namespace=NAMESPACE)])


async def test_put_many(client: StoreClient) -> None:
    records = [(KEYS[number], record_of(number, SIZES[number % 4])) for number in range(40)]
    damaged = bytearray(records[5][1])
    damaged[-1] ^= 1
    records[5] = (KEYS[5], bytes(damaged))
    records[7] = (KEYS[7], bytes(records[7][1][:-1]))
    outcomes = await client.put_many(records)
    expected = [PutManyOutcome.CORRUPT if number in (5, 7) else PutManyOutcome.STORED for number in range(40)]
    assert outcomes == expected
    assert (await client.put_many(records[:5])) == [PutManyOutcome.EXISTED] * 5
    assert (await client.lookup(KEYS[:5])).num_contiguous == 5
    assert await _payloads(client, KEYS[8:40]) == 32
    stats = await client.stats()
    assert (stats.puts, stats.rejected) == (38, 2)
    with pytest.raises(InvalidRequest):
        await client.put_many([])
    with pytest.raises(InvalidRequest):
        await client.put_many([(b"short", b"x")])


async def test_put_many_into_a_full_node() -> None:
    server = KVStoreServer(MemoryBackend(capacity_bytes=500_000))
    await server.start()
    async with _client(server.address) as client:
        records = [(KEYS[number], record_of(number, 100_000)) for number in range(4)]
        assert await client.put_many(records) == [PutManyOutcome.STORED] * 4
        assert (await client.lookup(KEYS[:4], lease_s=30)).lease_id
        more = [(KEYS[number], record_of(number, 100_000)) for number in (0, 8)]
        assert await client.put_many(more) == [PutManyOutcome.EXISTED, PutManyOutcome.FULL]
        assert server.staged_bytes == 0
    await server.stop(0)


@pytest.mark.parametrize(
    "frame",
    [
        pb.PutManyFrame(),
        pb.PutManyFrame(records=[pb.WholeRecord(key=b"short", record=b"x")]),
        pb.PutManyFrame(records=[pb.WholeRecord(key=bytes(32), record=bytes((1 << 20) + 1))]),
    ],
)
async def test_malformed_frames_of_put_many(server: KVStoreServer, frame: pb.PutManyFrame) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await kvstore_pb2_grpc.KVStoreStub(channel).PutMany(iter([frame]), timeout=10)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert server.staged_bytes == 0


async def test_put_many_is_bounded_in_records_and_time() -> None:
    server = KVStoreServer(
        MemoryBackend(capacity_bytes=1 << 20), NodeConfig(max_keys_per_request=3, staging_timeout_s=0.3)
    )
    await server.start()
    async with _client(server.address) as client, grpc.aio.insecure_channel(server.address) as channel:
        records = [(KEYS[number], record_of(number)) for number in range(4)]
        with pytest.raises(InvalidRequest, match="1 to 3 keys, not 4"):
            await client.put_many(records)
        over_grpc = StoreClient(ClientConfig(address=server.address, lookup_timeout_s=5.0, use_bulk=False))
        with pytest.raises(InvalidRequest, match="at most 3 records"):
            await over_grpc.put_many(records)
        await over_grpc.close()
        call = kvstore_pb2_grpc.KVStoreStub(channel).PutMany(timeout=10)
        await call.write(pb.PutManyFrame(records=[pb.WholeRecord(key=KEYS[0], record=record_of(0))]))
        with pytest.raises(grpc.aio.AioRpcError, match="did not all come"):
            await call
        assert (await client.lookup(KEYS[:1])).num_contiguous == 1
    await server.stop(0)


async def test_pins_and_listing_over_the_wire(start_node: Callable[..., Any], tmp_path: Path) -> None:
    tiers = ("--memory", "1MB", "--disk", str(tmp_path / "disk"), "--disk-bytes", "4MB")
    node = start_node(*tiers)
    async with _client(node.address) as client:
        await _until_up(client)
        await client.put_many([(KEYS[number], record_of(number, 90_000)) for number in range(5)])
        assert await client.pin([KEYS[0], KEYS[199]]) == [True, False]
        await client.put_many([(KEYS[number], record_of(number, 90_000)) for number in range(5, 80)])
        stats = await client.stats()
        assert stats.backend == "memory+disk"
        memory, disk = stats.tiers
        assert (memory.name, disk.name, disk.available) == ("memory", "disk", True)
        assert memory.evictions > 0 and disk.evictions > 0 and disk.bytes <= disk.capacity_bytes == 4_000_000
        assert memory.pinned_bytes > 90_000 and disk.pinned_bytes > 90_000
        listed = [record async for record in client.list_records(page_size=7)]
        assert len([one for one in listed if one.tier == "disk"]) == disk.records
        assert len([one for one in listed if one.tier == "memory"]) == memory.records
        for one in listed:
            number = KEYS.index(one.key)
            assert (one.record_bytes, one.block_index) == (len(record_of(number, 90_000)), number)
            assert (one.num_tokens, one.namespace, one.pinned) == (32, NAMESPACE, number == 0)
            assert one.age_s is not None and 0 <= one.age_s < 300
        assert await _payloads(client, KEYS[:1]) == 1, "pinned"
        assert (await client.lookup(KEYS[1:2])).num_contiguous == 0, "the control"
    node.signal(signal.SIGTERM)
    assert node.popen.wait(20) == 0

    node = start_node(*tiers)
    async with _client(node.address) as client:
        await _until_up(client)
        assert await _payloads(client, KEYS[:1]) == 1, "over a restart"
        listed = [record async for record in client.list_records()]
        assert [KEYS.index(one.key) for one in listed if one.pinned and one.tier == "disk"] == [0]
        assert await client.unpin(KEYS[:2]) == [True, False]
        stats = await client.stats()
        assert stats.tiers[1].hits == 1 and stats.tiers[0].promoted == 1


async def test_a_killed_node_comes_back_with_its_records(start_node: Callable[..., Any], tmp_path: Path) -> None:
    tiers = ("--disk", str(tmp_path / "disk"), "--disk-bytes", "1GB")
    node = start_node(*tiers)
    async with _client(node.address) as client:
        await _until_up(client)
        outcomes = await client.put_many([(KEYS[number], record_of(number, 200_000)) for number in range(30)])
        assert set(outcomes) == {PutManyOutcome.STORED}
    node.kill()
    node = start_node(*tiers)
    async with _client(node.address) as client:
        await _until_up(client)
        assert (await client.lookup(KEYS[:31])).num_contiguous == 30
        assert await _payloads(client, KEYS[:30]) == 30


async def test_a_folder_in_use_is_one_clear_line(start_node: Callable[..., Any], tmp_path: Path) -> None:
    tiers = ("--disk", str(tmp_path / "disk"), "--disk-bytes", "1GB")
    start_node(*tiers)
    with pytest.raises(AssertionError, match="in use by another store node") as error:
        start_node(*tiers)
    assert "Traceback" not in str(error.value)


async def test_bad_pages_and_pins(server: KVStoreServer, client: StoreClient) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = kvstore_pb2_grpc.KVStoreStub(channel)
        for request in (pb.ListRequest(page_size=1001), pb.ListRequest(page_size=(1 << 32) - 1)):
            with pytest.raises(grpc.aio.AioRpcError, match="at most 1000"):
                await stub.List(request, timeout=10)
    for bad in ([], [b"short"]):
        with pytest.raises(InvalidRequest, match="key"):
            await client.pin(bad)


@pytest.mark.parametrize("way", ["stop", "kill"])
async def test_a_dead_redis_tier_does_not_cost_the_client_its_node(
    start_node: Callable[..., Any], start_redis: Callable[..., Any], way: str
) -> None:
    """With the default timeouts of a client: the node answers from memory before they end."""
    process = start_redis()
    node = start_node("--memory", "1GiB", "--redis", process.url)
    async with _client(node.address) as client:
        await _until_up(client)
        await client.put_many([(KEYS[number], record_of(number)) for number in range(5)])
        failures = client.counters.failures
        process.signal(signal.SIGSTOP) if way == "stop" else process.kill()
        for _ in range(20):
            assert (await client.lookup(KEYS[:10])).num_contiguous == 5
            assert await _payloads(client, KEYS[:5]) == 5
        redis = (await client.stats()).tiers[1]
        assert redis.errors == 1 and redis.refused >= 19 and not redis.available, "the fault was there, and met once"
        assert client.counters.failures == failures
        with pytest.raises(StoreUnavailable, match="not deleted"):
            await client.delete(KEYS[:1])
