"""Puts over the bulk port: what they store, what is refused, what is bounded, and what a client does without it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc.aio
import pytest
from support.store_processes import NAMESPACE, key_of, record_of

from kvferry.kvstore import BlockCorrupt, StoreFull, StoreUnavailable
from kvferry.kvstore.bulk_frames import (
    HEADER,
    MAGIC,
    MAX_RECORDS,
    READY,
    SESSION_BYTES,
    Answer,
    Kind,
    encode_answers,
    encode_failure,
    encode_put_request,
    encode_request,
)
from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.config import ClientConfig, NodeConfig
from kvferry.kvstore.memory_backend import MemoryBackend
from kvferry.kvstore.node_answers import PutManyOutcome
from kvferry.kvstore.server import KVStoreServer
from kvferry.proto import kvstore_pb2 as pb
from kvferry.proto import kvstore_pb2_grpc

LIMIT_S = 20.0
STORED, EXISTED, FULL, CORRUPT = PutManyOutcome
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def node(capacity_bytes: int = 256 << 20, **config: object) -> AsyncIterator[KVStoreServer]:
    server = KVStoreServer(MemoryBackend(capacity_bytes=capacity_bytes), NodeConfig(**config))  # type: ignore[arg-type]
    await server.start()
    yield server
    await server.stop(0.2)


@asynccontextmanager
async def client_of(server: KVStoreServer, **config: object) -> AsyncIterator[StoreClient]:
    options: dict[str, object] = {"lookup_timeout_s": 5.0, "put_timeout_s": LIMIT_S, **config}
    async with StoreClient(ClientConfig(address=server.address, **options)) as client:  # type: ignore[arg-type]
        await client.stats()
        yield client


@asynccontextmanager
async def raw(
    server: KVStoreServer, *, puts: bool = True
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to the bulk port whose session is accepted."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = kvstore_pb2_grpc.KVStoreStub(channel)
        offer = await (stub.OpenBulkPuts if puts else stub.OpenBulk)(pb.OpenBulkRequest())
    assert server.bulk is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", server.bulk.port)
    writer.write(MAGIC + offer.session)
    assert await asyncio.wait_for(reader.readexactly(1), LIMIT_S) == READY
    try:
        yield reader, writer
    finally:
        writer.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.01)


def keyed(*numbers: int, num_bytes: int = 1000) -> list[tuple[bytes, bytes]]:
    return [(key_of(number), record_of(number, num_bytes)) for number in numbers]


@pytest.mark.parametrize("use_local", [True, False], ids=["local", "tcp"])
@pytest.mark.parametrize("num_bytes", [0, 1, 65_536, 3_000_000])
async def test_records_go_over_the_bulk_port(num_bytes: int, use_local: bool) -> None:
    async with node() as server, client_of(server, use_local=use_local) as client:
        records = keyed(*range(6), num_bytes=num_bytes)
        assert [await client.put(*record) for record in records[:2]] == [True, True]
        assert await client.put(*records[1]) is False
        assert await client.put_many(records) == [EXISTED, EXISTED, *[STORED] * 4]
        keys = [key for key, _ in records]
        assert await server._backend.get(keys) == [record for _, record in records]
        read = [bytes(record.payload) async for record in client.get(keys, namespace=NAMESPACE)]
        assert [len(payload) for payload in read] == [num_bytes] * 6
        assert client.counters.bulk_puts == server.counters.bulk_puts >= 4
        assert client.counters.bytes_written == sum(len(record) for _, record in records)
        await until(lambda: (server.counters.puts, server.counters.rejected, server.staged_bytes) == (6, 0, 0))
        assert server.bulk is not None and server.bulk.num_connections == 2, "one for gets and one for puts"


async def test_more_records_than_one_request_takes() -> None:
    async with node() as server, client_of(server) as client:
        assert set(await client.put_many(keyed(*range(2 * MAX_RECORDS + 1), num_bytes=10))) == {STORED}
        assert client.counters.bulk_puts == 3
        assert set(await client.put_many(keyed(*range(200, 212), num_bytes=3_000_000))) == {STORED}
        assert client.counters.bulk_puts == 3 + 6, "8 MiB are two of these"
        assert server.counters.puts == 2 * MAX_RECORDS + 1 + 12


async def test_what_a_refused_record_says() -> None:
    async with node(capacity_bytes=10_000) as server, client_of(server) as client:
        with pytest.raises(StoreFull, match="can never fit the node's 10000 bytes"):
            await client.put(*keyed(1, num_bytes=20_000)[0])
        damaged = bytearray(record_of(2))
        damaged[-1] ^= 1
        with pytest.raises(BlockCorrupt, match="checksum"):
            await client.put(key_of(2), bytes(damaged))
        with pytest.raises(BlockCorrupt, match="another block key"):
            await client.put(key_of(3), record_of(4))
        records = [*keyed(5), (key_of(6), bytes(damaged)), *keyed(7, num_bytes=20_000), *keyed(8)]
        assert await client.put_many(records) == [STORED, CORRUPT, FULL, STORED]
        await until(lambda: (server.counters.puts, server.counters.rejected, server.staged_bytes) == (2, 5, 0))
        assert client.counters.failures == 0 and client.counters.bulk_puts == 4
        assert server.bulk is not None and server.bulk.num_connections == 1, "a refusal ends no connection"


async def test_room_for_records_on_their_way_is_bounded() -> None:
    limits = {"max_record_bytes": 5000, "max_staged_bytes": 5000}
    async with node(**limits) as server, client_of(server) as client:
        async with raw(server) as (reader, writer):
            writer.write(encode_put_request([key_of(0)], [4000]))
            assert await reader.readexactly(HEADER.size + 1) == encode_answers([Answer.WANTED])
            assert server.staged_bytes == 4000
            with pytest.raises(StoreFull, match="max_staged_bytes"):
                await client.put(*keyed(1, num_bytes=2000)[0])
        await until(lambda: server.staged_bytes == 0)
        assert await client.put(*keyed(1, num_bytes=2000)[0])
        assert await server._backend.contains([key_of(0)]) == [False]


@pytest.mark.parametrize(
    "request_",
    [
        encode_put_request([], []),
        encode_put_request([key_of(0)], [0]),
        encode_put_request([key_of(0)], [(1 << 64) - 1]),
        encode_put_request([key_of(number) for number in range(MAX_RECORDS + 1)], []),  # it waits for no lengths
    ],
    ids=["no record", "an empty one", "a huge one", "too many"],
)
async def test_an_impossible_request_is_refused_before_memory_is_taken(request_: bytes) -> None:
    async with node() as server, raw(server) as (reader, writer):
        writer.write(request_)
        answer = await asyncio.wait_for(reader.read(), LIMIT_S)
        assert HEADER.unpack_from(answer)[1] == Kind.INVALID
        assert server.staged_bytes == 0


async def test_a_record_that_does_not_come_whole_is_not_there() -> None:
    record = record_of(0, 5000)
    async with node(staging_timeout_s=1.0) as server:
        for sent in (0, 1, 64, len(record) - 1):
            for waits in (False, True):
                async with raw(server) as (reader, writer):
                    writer.write(encode_put_request([key_of(0)], [len(record)]))
                    assert await reader.readexactly(HEADER.size + 1) == encode_answers([Answer.WANTED])
                    writer.write(record[:sent])
                    if waits:
                        assert await asyncio.wait_for(reader.read(), LIMIT_S) == b"", "it was hung up on"
                await until(lambda: server.staged_bytes == 0)
                assert await server._backend.contains([key_of(0)]) == [False]
        assert server.counters.puts == 0


async def test_a_session_is_for_gets_or_for_puts() -> None:
    """Who may get may not put, and the other way round. Each reads the other's request as one of its own kind."""
    put = encode_put_request([key_of(0)], [len(record_of(0))]) + record_of(0)
    get_ = encode_request([key_of(1)], lease_id=0, timeout_s=1.0)
    async with node() as server:
        await server._backend.put(key_of(1), record_of(1))
        for puts, request in ((False, put), (True, get_)):
            async with raw(server, puts=puts) as (reader, writer):
                writer.write(request)
                writer.write_eof()
                with contextlib.suppress(ConnectionResetError):  # it is closed with bytes unread
                    assert await asyncio.wait_for(reader.read(), LIMIT_S) == b""
        assert await server._backend.contains([key_of(0)]) == [False]
        assert (server.counters.puts, server.counters.hits) == (0, 0)


@pytest.mark.parametrize("config", [{"bulk_port": None}, {"bulk_address": "127.0.0.1:9"}])
async def test_without_a_bulk_port_that_can_be_used(config: dict[str, object]) -> None:
    async with node(**config) as server, client_of(server) as client:
        assert await client.put(*keyed(0)[0])
        assert await client.put_many(keyed(0, 1, 2)) == [EXISTED, STORED, STORED]
        assert client.counters.bulk_puts == server.counters.bulk_puts == 0
        assert server.counters.puts == 3 and client.counters.failures == 0


async def test_more_puts_at_once_than_threads() -> None:
    async with node() as server, client_of(server) as client:
        async with asyncio.timeout(LIMIT_S):
            assert all(await asyncio.gather(*(client.put(*record) for record in keyed(*range(20), num_bytes=100_000))))
        assert server.counters.puts == 20 and 4 <= client.counters.bulk_puts <= 20


async def test_a_put_that_is_cancelled_leaves_nothing() -> None:
    async with node() as server, client_of(server) as client:
        for number in range(8):
            putting = asyncio.create_task(client.put(*keyed(number, num_bytes=30_000_000)[0]))
            await asyncio.sleep(0.004 * number)
            putting.cancel()
            await asyncio.gather(putting, return_exceptions=True)
        await until(lambda: server.staged_bytes == 0)
        assert await client.put(*keyed(100)[0])
        assert client.breaker_state.name == "CLOSED"


class FakeNode(kvstore_pb2_grpc.KVStoreServicer):
    """Offers a bulk port that behaves as a test wants."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def OpenBulkPuts(self, request: pb.OpenBulkRequest, context: object) -> pb.OpenBulkReply:
        return pb.OpenBulkReply(address=f":{self._port}", session=bytes(SESSION_BYTES))

    async def Stats(self, request: pb.StatsRequest, context: object) -> pb.StatsReply:
        return pb.StatsReply()


@asynccontextmanager
async def fake(answer: bytes, *, stays: bool) -> AsyncIterator[StoreClient]:
    """A client of a node whose bulk port says this, whatever it is sent, and closes or stays silent then."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(len(MAGIC) + SESSION_BYTES)
        writer.write(READY + answer)
        if stays:
            await reader.read()
        writer.close()

    bulk = await asyncio.start_server(serve, "127.0.0.1", 0)
    server = grpc.aio.server()
    kvstore_pb2_grpc.add_KVStoreServicer_to_server(FakeNode(bulk.sockets[0].getsockname()[1]), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    config = ClientConfig(address=f"127.0.0.1:{port}", lookup_timeout_s=5.0, failure_threshold=100)
    async with StoreClient(config) as client:
        await client.stats()
        yield client
    bulk.close()
    await server.stop(0.2)


WHOLE = encode_answers([Answer.WANTED]) + encode_answers([Answer.STORED], "x")


@pytest.mark.parametrize("stays", [False, True], ids=["cut", "silent"])
async def test_answers_that_end_at_any_byte(stays: bool) -> None:
    for length in range(len(WHOLE) + 1):
        is_whole = length == len(WHOLE)
        async with fake(WHOLE[:length], stays=stays or is_whole) as client, asyncio.timeout(LIMIT_S):
            if is_whole:
                assert await client.put(*keyed(0)[0])
                continue
            with pytest.raises(StoreUnavailable):
                await client.put(*keyed(0)[0], timeout_s=0.3)
            assert client.counters.failures == 1


@pytest.mark.parametrize(
    "answer",
    [
        encode_answers([Answer.WANTED]) * 2,
        encode_answers([Answer.STORED, Answer.STORED]),
        encode_answers([]),
        HEADER.pack(0, Kind.ANSWERS, 1) + b"\x09",
        HEADER.pack(1 << 30, Kind.ANSWERS, 1) + b"\x01",
        HEADER.pack(0, Kind.RECORDS, 1) + b"\x01",
        HEADER.pack(0, Kind.UNAVAILABLE, 1 << 40),
        encode_failure(0, StoreUnavailable("Redis is away")),
    ],
)
async def test_what_a_node_may_not_say(answer: bytes) -> None:
    async with fake(answer, stays=True) as client, asyncio.timeout(LIMIT_S):
        with pytest.raises(StoreUnavailable):
            await client.put(*keyed(0)[0])
