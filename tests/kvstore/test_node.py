"""The node over a real socket, for both backends: what the proto promises."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvferry.kvstore import (
    BlockCorrupt,
    BlockNotFound,
    ClientConfig,
    InvalidRequest,
    KVStoreServer,
    MemoryBackend,
    Namespace,
    NodeConfig,
    StoreClient,
    StoreFull,
    block_keys,
)
from kvferry.proto import kvstore_pb2 as pb
from kvferry.proto import kvstore_pb2_grpc

MakeRecord = Callable[..., bytes]
MakeServer = Callable[[NodeConfig | None], KVStoreServer]


@asynccontextmanager
async def _serving(server: KVStoreServer) -> AsyncIterator[StoreClient]:
    await server.start()
    try:
        config = ClientConfig(address=server.address, lookup_timeout_s=5.0)
        async with StoreClient(config) as client:
            yield client
    finally:
        await server.stop(0)


@asynccontextmanager
async def _raw_stub(server: KVStoreServer) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield kvstore_pb2_grpc.KVStoreStub(channel)


@pytest.fixture
def keys(namespace: Namespace) -> list[bytes]:
    return block_keys(namespace, range(32 * 20))


async def _payloads(client: StoreClient, namespace: Namespace, keys: list[bytes], **options: Any) -> list[bytes]:
    records = client.get(keys, namespace=namespace.digest(), **options)
    return [bytes(record.payload) async for record in records]


async def _until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while True:
            result = condition()
            if result if isinstance(result, bool) else await result:
                return
            await asyncio.sleep(0.02)


async def test_put_lookup_get(
    client: StoreClient, namespace: Namespace, keys: list[bytes], make_record: MakeRecord
) -> None:
    # Below, at and over one frame and the thread threshold; a record of several frames.
    sizes = [0, 1, 1000, (1 << 20) - 192, (1 << 20) - 191, 1 << 20, 3_500_000]
    records = [make_record(k, num_bytes=n) for k, n in zip(keys, sizes, strict=False)]
    for key, record in zip(keys, records, strict=False):
        assert await client.put(key, record) is True
    assert (await client.lookup(keys)).num_contiguous == len(sizes)
    got = await _payloads(client, namespace, keys[: len(sizes)])
    assert [len(payload) for payload in got] == sizes
    assert [record[-len(p) :] if p else p for record, p in zip(records, got, strict=True)] == got
    stats = await client.stats()
    assert (stats.lookups, stats.hits, stats.puts) == (1, len(sizes), len(sizes))
    assert client.counters.bytes_read == client.counters.bytes_written == sum(map(len, records))


async def test_lookup_counts_the_contiguous_prefix(
    client: StoreClient, keys: list[bytes], make_record: MakeRecord
) -> None:
    assert (await client.lookup(keys)).num_contiguous == 0
    for index in (0, 1, 3):
        await client.put(keys[index], make_record(keys[index]))
    assert (await client.lookup(keys)).num_contiguous == 2
    assert (await client.lookup(keys[3:])).num_contiguous == 1
    assert (await client.lookup(keys[:1])).num_contiguous == 1


async def test_get_stops_at_the_first_missing_key(
    client: StoreClient, namespace: Namespace, keys: list[bytes], make_record: MakeRecord
) -> None:
    for index in (0, 1, 3):
        await client.put(keys[index], make_record(keys[index]))
    got = []
    with pytest.raises(BlockNotFound, match="block 2 of 20") as error:
        async for record in client.get(keys, namespace=namespace.digest()):
            got.append(record.header.key)
    assert got == keys[:2]
    assert error.value.index == 2
    assert client.counters.not_found == 1
    assert (await client.stats()).misses == 1


async def test_many_small_records_in_order(client: StoreClient, namespace: Namespace, make_record: MakeRecord) -> None:
    keys = block_keys(namespace, range(32 * 300))
    await asyncio.gather(*(client.put(key, make_record(key, num_bytes=50)) for key in keys))
    got = [r.header.key async for r in client.get(keys, namespace=namespace.digest())]
    assert got == keys


async def test_a_put_never_overwrites(
    client: StoreClient, namespace: Namespace, keys: list[bytes], make_record: MakeRecord
) -> None:
    first, second = (make_record(keys[0], block_index=index) for index in (0, 1))
    assert await client.put(keys[0], first) is True
    assert await client.put(keys[0], second) is False
    assert await client.put(keys[0], make_record(keys[0], num_bytes=5_000_000)) is False
    records = client.get(keys[:1], namespace=namespace.digest())
    assert [record.header.block_index async for record in records] == [0]
    assert (await client.stats()).puts == 1


async def test_concurrent_puts_of_one_key(
    client: StoreClient, namespace: Namespace, keys: list[bytes], make_record: MakeRecord
) -> None:
    for round_number, key in enumerate(keys[:5]):
        contenders = [make_record(key, num_bytes=2_000_000, block_index=i) for i in range(4)]
        outcomes = await asyncio.gather(*(client.put(key, record) for record in contenders))
        assert sorted(outcomes) == [False, False, False, True]
        records = client.get([key], namespace=namespace.digest())
        assert [r.header.block_index async for r in records] == [outcomes.index(True)]
        assert (await client.stats()).puts == round_number + 1


async def test_interleaved_two_phase_puts_of_one_key(
    server: KVStoreServer, keys: list[bytes], make_record: MakeRecord
) -> None:
    """Both stage the whole record before either commits: one STORED, one EXISTED."""
    async with _raw_stub(server) as stub:
        record = make_record(keys[0])
        calls = [stub.Put(timeout=10) for _ in range(2)]
        for call in calls:
            begin = pb.PutBegin(key=keys[0], record_bytes=len(record))
            await call.write(pb.PutFrame(begin=begin))
            await call.write(pb.PutFrame(chunk=record))
        await _until(lambda: server.staged_bytes == 2 * len(record))
        assert (await stub.Lookup(pb.LookupRequest(keys=keys[:1]))).num_contiguous == 0
        for call in calls:
            await call.write(pb.PutFrame(commit=pb.PutCommit()))
            await call.done_writing()
        outcomes = [(await call).outcome for call in calls]
        assert sorted(outcomes) == [pb.PutReply.STORED, pb.PutReply.EXISTED]
    assert server.staged_bytes == 0


@pytest.mark.parametrize("end", ["cancel", "half-close", "too much", "too little", "garbage"])
async def test_an_aborted_put_leaves_nothing(
    server: KVStoreServer, client: StoreClient, keys: list[bytes], make_record: MakeRecord, end: str
) -> None:
    record = make_record(keys[0], num_bytes=3000)
    async with _raw_stub(server) as stub:
        call = stub.Put(timeout=10)
        begin = pb.PutFrame(begin=pb.PutBegin(key=keys[0], record_bytes=len(record)))
        await call.write(begin)
        await call.write(pb.PutFrame(chunk=record[:2000]))
        await _until(lambda: server.staged_bytes == len(record))
        if end == "cancel":
            call.cancel()
        elif end == "too much":
            await call.write(pb.PutFrame(chunk=record[2000:] + b"x"))
        elif end == "too little":
            await call.write(pb.PutFrame(commit=pb.PutCommit()))
        elif end == "garbage":
            await call.write(begin)
        if end != "cancel":
            if end == "half-close":
                await call.done_writing()
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await _until(lambda: server.staged_bytes == 0)
    assert (await client.lookup(keys[:1])).num_contiguous == 0
    assert (await client.stats()).puts == 0
    assert await client.put(keys[0], record) is True


async def test_staging_is_bounded_in_time(make_server: MakeServer, keys: list[bytes], make_record: MakeRecord) -> None:
    server = make_server(NodeConfig(staging_timeout_s=0.3))
    async with _serving(server) as client, _raw_stub(server) as stub:
        call = stub.Put(timeout=10)
        await call.write(pb.PutFrame(begin=pb.PutBegin(key=keys[0], record_bytes=5000)))
        with pytest.raises(grpc.aio.AioRpcError, match="did not commit within") as error:
            await call
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert server.staged_bytes == 0
        assert await client.put(keys[0], make_record(keys[0]))


async def test_staging_is_bounded_in_bytes(make_server: MakeServer, keys: list[bytes], make_record: MakeRecord) -> None:
    server = make_server(NodeConfig(max_record_bytes=10_000, max_staged_bytes=15_000))
    async with _serving(server) as client, _raw_stub(server) as stub:
        call = stub.Put(timeout=10)
        await call.write(pb.PutFrame(begin=pb.PutBegin(key=keys[0], record_bytes=9000)))
        await _until(lambda: server.staged_bytes == 9000)
        with pytest.raises(StoreFull, match="max_staged_bytes"):
            await client.put(keys[1], make_record(keys[1], num_bytes=8000))
        assert await client.put(keys[1], make_record(keys[1], num_bytes=5000))
        call.cancel()
        await _until(lambda: server.staged_bytes == 0)
        assert await client.put(keys[2], make_record(keys[2], num_bytes=8000))
        assert (await client.stats()).rejected == 1


async def test_a_damaged_put_is_refused(
    server: KVStoreServer, client: StoreClient, keys: list[bytes], make_record: MakeRecord
) -> None:
    record = bytearray(make_record(keys[0]))
    record[-1] ^= 1
    with pytest.raises(BlockCorrupt, match="checksum"):
        await client.put(keys[0], bytes(record))
    with pytest.raises(BlockCorrupt, match="another block key"):
        await client.put(keys[1], make_record(keys[0]))
    assert (await client.lookup(keys[:1])).num_contiguous == 0
    assert (await client.stats()).rejected == 2
    assert server.staged_bytes == 0


async def test_oversize_is_refused_before_it_is_sent_or_staged(
    make_server: MakeServer, keys: list[bytes], make_record: MakeRecord
) -> None:
    server = make_server(NodeConfig(max_record_bytes=4096))
    async with _serving(server) as client, _raw_stub(server) as stub:
        exact = make_record(keys[0], num_bytes=4096 - 192)
        assert len(exact) == 4096
        assert await client.put(keys[0], exact)
        with pytest.raises(InvalidRequest, match="max_record_bytes"):
            await client.put(keys[1], make_record(keys[1], num_bytes=4096 - 127))
        for announced in (0, 1 << 40, (1 << 64) - 1):
            call = stub.Put(timeout=10)
            await call.write(pb.PutFrame(begin=pb.PutBegin(key=keys[1], record_bytes=announced)))
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert server.staged_bytes == 0
    async with StoreClient(ClientConfig(address=server.address, max_record_bytes=100)) as client:
        with pytest.raises(InvalidRequest, match="over max_record_bytes"):
            await client.put(keys[1], bytes(101))


async def test_a_chunk_over_one_frame_is_refused(server: KVStoreServer, keys: list[bytes]) -> None:
    async with _raw_stub(server) as stub:
        call = stub.Put(timeout=10)
        await call.write(pb.PutFrame(begin=pb.PutBegin(key=keys[0], record_bytes=2 << 20)))
        await call.write(pb.PutFrame(chunk=bytes((1 << 20) + 1)))
        with pytest.raises(grpc.aio.AioRpcError, match="at most 1048576 bytes") as error:
            await call
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("bad", [[b""], [b"short"], [bytes(33)], [bytes(32), bytes(31)], []])
async def test_malformed_keys_are_invalid_arguments(
    server: KVStoreServer, client: StoreClient, bad: list[bytes]
) -> None:
    async with _raw_stub(server) as stub:
        calls = [
            stub.Lookup(pb.LookupRequest(keys=bad), timeout=10),
            stub.Delete(pb.DeleteRequest(keys=bad), timeout=10),
            stub.Get(pb.GetRequest(keys=bad), timeout=10).read(),
        ]
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "key" in (error.value.details() or "")
    for method in (client.lookup, client.delete):
        with pytest.raises(InvalidRequest, match="key"):
            await method(bad)
    with pytest.raises(InvalidRequest, match="key"):
        await anext(client.get(bad, namespace=bytes(32)))


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [pb.PutFrame()],
        [pb.PutFrame(chunk=b"x")],
        [pb.PutFrame(commit=pb.PutCommit())],
        [pb.PutFrame(begin=pb.PutBegin(key=b"short", record_bytes=10))],
        [pb.PutFrame(begin=pb.PutBegin(key=bytes(32), record_bytes=10)), pb.PutFrame()],
    ],
)
async def test_malformed_puts_are_invalid_arguments(server: KVStoreServer, frames: list[pb.PutFrame]) -> None:
    async with _raw_stub(server) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Put(iter(frames), timeout=10)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert server.staged_bytes == 0


async def test_too_many_keys(make_server: MakeServer, keys: list[bytes]) -> None:
    server = make_server(NodeConfig(max_keys_per_request=5))
    async with _serving(server) as client:
        assert (await client.lookup(keys[:5])).num_contiguous == 0
        with pytest.raises(InvalidRequest, match="1 to 5 keys"):
            await client.lookup(keys[:6])
        with pytest.raises(InvalidRequest, match="1 to 16384 keys"):
            await client.lookup([bytes(32)] * 16385)


async def test_the_largest_request_fits_one_message(client: StoreClient) -> None:
    assert (await client.lookup([bytes(32)] * 16384)).num_contiguous == 0


async def test_delete(client: StoreClient, keys: list[bytes], make_record: MakeRecord) -> None:
    for key in keys[:4]:
        await client.put(key, make_record(key))
    assert await client.delete([keys[1], keys[9]]) == 1
    assert (await client.lookup(keys)).num_contiguous == 1
    assert await client.delete_all() == 3
    assert await client.delete_all() == 0
    assert (await client.lookup(keys)).num_contiguous == 0


async def test_delete_with_keys_and_all_is_ambiguous(server: KVStoreServer, keys: list[bytes]) -> None:
    async with _raw_stub(server) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Delete(pb.DeleteRequest(keys=keys, all=True), timeout=10)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_leaving_a_get_early_ends_it(
    client: StoreClient, namespace: Namespace, keys: list[bytes], make_record: MakeRecord
) -> None:
    for key in keys[:3]:
        await client.put(key, make_record(key, num_bytes=2_000_000))
    for _ in range(5):
        records = client.get(keys[:3], namespace=namespace.digest())
        await anext(records)
        await records.aclose()
    assert len(await _payloads(client, namespace, keys[:3])) == 3


async def test_health(server: KVStoreServer) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "kvferry.kvstore.v1.KVStore"):
            reply = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Check(health_pb2.HealthCheckRequest(service="unknown"), timeout=10)
        assert error.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_stalled_reader_is_ended(make_server: MakeServer, keys: list[bytes], make_record: MakeRecord) -> None:
    server = make_server(NodeConfig(stalled_reader_s=0.3))
    async with _serving(server) as client:
        for key in keys:
            await client.put(key, make_record(key, num_bytes=1_500_000))
        async with _raw_stub(server) as stub:
            call = stub.Get(pb.GetRequest(keys=keys), timeout=60)
            assert (await call.read()).index == 0
            await asyncio.sleep(1.0)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                while await call.read() is not grpc.aio.EOF:
                    pass
            assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (await client.stats()).hits < len(keys)


async def test_unexpected_errors_say_nothing_of_the_inside(keys: list[bytes], caplog: pytest.LogCaptureFixture) -> None:
    class Broken(MemoryBackend):
        async def contains(self, keys: Any) -> list[bool]:
            raise RuntimeError("inside")

    server = KVStoreServer(Broken(capacity_bytes=1000))
    await server.start()
    try:
        async with _raw_stub(server) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.Lookup(pb.LookupRequest(keys=keys), timeout=10)
    finally:
        await server.stop(0)
    assert error.value.code() is grpc.StatusCode.INTERNAL
    assert "inside" not in (error.value.details() or "")
    assert "inside" in caplog.text


async def test_a_taken_port_is_an_error(server: KVStoreServer) -> None:
    port = int(server.address.rpartition(":")[2])
    second = KVStoreServer(MemoryBackend(capacity_bytes=1000), NodeConfig(port=port))
    with pytest.raises(OSError, match="cannot listen"):
        await second.start()
    await second.stop(0)
