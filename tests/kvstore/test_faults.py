"""Stopped, killed and damaged: real processes, real signals. Slower, never wrong, never stuck."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc.aio
import pytest
import redis
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvferry.kvstore import (
    BlockNotFound,
    ClientConfig,
    KVStoreServer,
    Namespace,
    StoreClient,
    StoreUnavailable,
    block_keys,
)
from kvferry.kvstore.breaker import BreakerState
from kvferry.kvstore.redis_backend import RedisBackend

MakeRecord = Callable[..., bytes]
StartProcess = Callable[..., Any]


@pytest.fixture
def keys(namespace: Namespace) -> list[bytes]:
    return block_keys(namespace, range(32 * 40))


async def _heal(call: Callable[[], Awaitable[Any]]) -> Any:
    """Repeats a call until the store answers again; healing must need no restart."""
    async with asyncio.timeout(15):
        while True:
            try:
                return await call()
            except StoreUnavailable:
                await asyncio.sleep(0.05)


async def test_stopped_node_costs_one_timeout_and_heals(
    start_node: StartProcess, keys: list[bytes], make_record: MakeRecord
) -> None:
    node = start_node("--memory", "64MiB")
    async with StoreClient(ClientConfig(address=node.address)) as client:
        assert await client.put(keys[0], make_record(keys[0]))
        node.signal(signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await client.lookup(keys)
        first = time.monotonic() - start
        assert client.breaker_state is not BreakerState.CLOSED
        for _ in range(200):
            with pytest.raises(StoreUnavailable):
                await client.lookup(keys)
            with pytest.raises(StoreUnavailable):
                await client.put(keys[1], b"record")
        assert first < 2.0
        assert time.monotonic() - start < 4.0
        assert client.counters.failures == 1
        assert client.counters.refused == 400
        node.signal(signal.SIGCONT)
        found = await _heal(lambda: client.lookup(keys, timeout_s=5.0))
        assert found.num_contiguous == 1


async def test_node_stopped_in_the_middle_of_a_get(
    start_node: StartProcess, namespace: Namespace, keys: list[bytes], make_record: MakeRecord
) -> None:
    node = start_node("--memory", "256MiB")
    config = ClientConfig(address=node.address, lookup_timeout_s=2.0, progress_timeout_s=0.5)
    async with StoreClient(config) as client:
        for key in keys:
            await client.put(key, make_record(key, num_bytes=2_000_000))
        start, num_records = 0.0, 0
        with pytest.raises(StoreUnavailable):
            async with aclosing(client.get(keys, namespace=namespace.digest())) as records:
                async for _ in records:
                    if num_records == 0:
                        node.signal(signal.SIGSTOP)
                        start = time.monotonic()
                    num_records += 1
        assert time.monotonic() - start < 5.0
        assert 1 <= num_records < len(keys)
        node.signal(signal.SIGCONT)
        await _heal(client.stats)
        got = client.get(keys[:5], namespace=namespace.digest())
        assert [record.header.key async for record in got] == keys[:5]


async def test_killed_node_fails_at_once_and_its_successor_is_found(
    start_node: StartProcess, namespace: Namespace, keys: list[bytes], make_record: MakeRecord
) -> None:
    node = start_node("--memory", "256MiB")
    config = ClientConfig(address=node.address, lookup_timeout_s=2.0)
    async with StoreClient(config) as client:
        for key in keys:
            await client.put(key, make_record(key, num_bytes=1_000_000))
        start = 0.0
        with pytest.raises(StoreUnavailable):
            async with aclosing(client.get(keys, namespace=namespace.digest())) as records:
                async for _ in records:
                    if start == 0.0:
                        start = time.monotonic()
                        node.kill()
        with pytest.raises(StoreUnavailable):
            await client.lookup(keys)
        assert time.monotonic() - start < 5.0
        start_node("--memory", "64MiB", "--port", node.address.rpartition(":")[2])
        assert (await _heal(lambda: client.lookup(keys))).num_contiguous == 0
        assert await client.put(keys[0], make_record(keys[0]))


async def test_node_killed_in_the_middle_of_a_put(
    start_node: StartProcess, start_redis: StartProcess, keys: list[bytes], make_record: MakeRecord
) -> None:
    """The shared tier holds nothing of a put whose node died before the commit."""
    process = start_redis()
    node = start_node("--redis", process.url)
    record = make_record(keys[0], num_bytes=20_000_000)
    config = ClientConfig(address=node.address, lookup_timeout_s=2.0)
    async with StoreClient(config) as client:
        await client.stats()
        put = asyncio.create_task(client.put(keys[0], record))
        await asyncio.sleep(0.005)
        node.kill()
        with pytest.raises(StoreUnavailable):
            await put
    with redis.Redis(port=process.port) as admin:
        assert admin.dbsize() == 0


@asynccontextmanager
async def _redis_node(url: str) -> AsyncIterator[tuple[KVStoreServer, StoreClient]]:
    server = KVStoreServer(RedisBackend(url))
    await server.start()
    try:
        async with StoreClient(
            ClientConfig(address=server.address, lookup_timeout_s=3.0, failure_threshold=1000)
        ) as client:
            yield server, client
    finally:
        await server.stop(0)


async def test_damage_in_redis_is_refused_deleted_and_counted(
    start_redis: StartProcess, namespace: Namespace, keys: list[bytes], make_record: MakeRecord
) -> None:
    process = start_redis()
    async with _redis_node(process.url) as (server, client):
        with redis.Redis(port=process.port) as admin:
            damages: list[Callable[[bytes, bytes], Any]] = [
                lambda name, value: admin.setrange(name, 200, bytes([value[200] ^ 16])),
                lambda name, value: admin.setrange(name, 0, b"x"),
                lambda name, value: admin.set(name, value[:-1]),
                lambda name, value: admin.append(name, b"\0"),
                lambda name, value: admin.set(name, admin.get(b"kvferry:" + keys[0])),
                lambda name, value: admin.set(name, b"\x80\x04cos\nsystem\n(S'touch x'\ntR."),
                lambda name, value: (admin.delete(name), admin.rpush(name, value)),
            ]
            await client.put(keys[0], make_record(keys[0]))
            for number, damage in enumerate(damages, start=1):
                name = b"kvferry:" + keys[1]
                assert await client.put(keys[1], make_record(keys[1])) is True
                value = admin.get(name)
                assert isinstance(value, bytes)
                records = client.get(keys[:2], namespace=namespace.digest())
                assert len([record async for record in records]) == 2
                damage(name, value)
                records = client.get(keys[:2], namespace=namespace.digest())
                assert (await anext(records)).header.key == keys[0]
                with pytest.raises(BlockNotFound):
                    await anext(records)
                assert server.counters.corrupt == number
                assert admin.exists(name) == 0
            assert admin.exists(b"kvferry:" + keys[0]) == 1


async def test_killed_redis_is_unavailable_and_the_node_stays_up(
    start_redis: StartProcess, namespace: Namespace, keys: list[bytes], make_record: MakeRecord
) -> None:
    process = start_redis()
    async with _redis_node(process.url) as (server, client):
        assert await client.put(keys[0], make_record(keys[0]))
        process.kill()
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: client.lookup(keys),
            lambda: client.put(keys[0], make_record(keys[0])),
            lambda: anext(client.get(keys, namespace=namespace.digest())),
            lambda: client.delete(keys),
            client.stats,
        ]
        for call in calls:
            start = time.monotonic()
            with pytest.raises(StoreUnavailable, match=f"Redis at 127.0.0.1:{process.port}"):
                await call()
            assert time.monotonic() - start < 3.0
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        start_redis(port=process.port)
        assert (await _heal(lambda: client.lookup(keys))).num_contiguous == 0
        assert await client.put(keys[0], make_record(keys[0])) is True


async def test_stopped_redis_opens_the_breaker_until_redis_is_back(
    start_redis: StartProcess, keys: list[bytes], make_record: MakeRecord
) -> None:
    process = start_redis()
    async with (
        _redis_node(process.url) as (server, other),
        StoreClient(ClientConfig(address=server.address)) as client,
    ):
        await other.put(keys[0], make_record(keys[0]))
        process.signal(signal.SIGSTOP)
        with pytest.raises(StoreUnavailable):
            await client.lookup(keys)
        # Long enough for probes: the node answers health checks, but its Redis does not.
        for _ in range(20):
            assert client.breaker_state is not BreakerState.CLOSED
            await asyncio.sleep(0.1)
        process.signal(signal.SIGCONT)
        found = await _heal(lambda: client.lookup(keys, timeout_s=3.0))
        assert found.num_contiguous == 1
