"""The bulk port: what it serves, whom it refuses, what it bounds, and what a client does without it."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import grpc
import grpc.aio
import pytest
from support.certificates import Certificates
from support.store_processes import NAMESPACE, key_of, record_of

from kvferry.kvstore import BlockCorrupt, BlockNotFound, InvalidRequest, StoreUnavailable
from kvferry.kvstore.bulk_frames import (
    HEADER,
    MAGIC,
    MAX_RECORDS,
    READY,
    REQUEST,
    SESSION_BYTES,
    Kind,
    decode_lengths,
    encode_records_head,
    encode_request,
)
from kvferry.kvstore.bulk_sessions import BulkSessions, Purpose
from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.config import ClientConfig, NodeConfig
from kvferry.kvstore.lease import LeaseTable
from kvferry.kvstore.memory_backend import MemoryBackend
from kvferry.kvstore.server import KVStoreServer
from kvferry.proto import kvstore_pb2 as pb
from kvferry.proto import kvstore_pb2_grpc
from kvferry.proto.peer_security import PeerSecurity
from kvferry.proto.request_id import bind_request_id, current_request_id

LIMIT_S = 20.0
KEYS = [key_of(number) for number in range(8)]


@asynccontextmanager
async def node(num_records: int = 8, num_bytes: int = 1000, **config: object) -> AsyncIterator[KVStoreServer]:
    backend = MemoryBackend(capacity_bytes=256 << 20, leases=LeaseTable())
    for number in range(num_records):
        await backend.put(key_of(number), record_of(number, num_bytes))
    server = KVStoreServer(backend, NodeConfig(**config))  # type: ignore[arg-type]
    await server.start()
    yield server
    await server.stop(0.2)


@asynccontextmanager
async def client_of(server: KVStoreServer, **config: object) -> AsyncIterator[StoreClient]:
    options: dict[str, object] = {"lookup_timeout_s": 5.0, **config}
    async with StoreClient(ClientConfig(address=server.address, **options)) as client:  # type: ignore[arg-type]
        await client.stats()
        yield client


async def get(client: StoreClient, keys: list[bytes]) -> list[int]:
    """Block indexes of the records."""
    async with aclosing(client.get(keys, namespace=NAMESPACE)) as records:
        return [record.header.block_index async for record in records]


async def offer(server: KVStoreServer) -> pb.OpenBulkReply:
    async with grpc.aio.insecure_channel(server.address) as channel:
        reply: pb.OpenBulkReply = await kvstore_pb2_grpc.KVStoreStub(channel).OpenBulk(pb.OpenBulkRequest())
    return reply


async def connect(server: KVStoreServer, session: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    assert server.bulk is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", server.bulk.port)
    writer.write(MAGIC + session)
    return reader, writer


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("num_bytes", [0, 1, 65_536, 3_000_000])
async def test_records_come_over_the_bulk_port(num_bytes: int) -> None:
    async with node(num_bytes=num_bytes) as server, client_of(server) as client:
        for _ in range(3):
            assert await get(client, KEYS) == list(range(8))
        async with aclosing(client.get(KEYS, namespace=NAMESPACE)) as records:
            payloads = [bytes(record.payload) async for record in records]
        assert payloads == [record_of(number, num_bytes)[192:] for number in range(8)]
        assert (client.counters.bulk_gets, client.counters.bulk_fallbacks) == (4, 0)
        assert server.counters.bulk_gets == 4 and server.counters.hits == 32
        assert client.counters.bytes_read == 4 * sum(len(record_of(number, num_bytes)) for number in range(8))
        assert server.bulk is not None and server.bulk.num_connections == 1, "one connection serves them all"
        assert client._getter._bulk is not None and len(client._getter._bulk._idle) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the abstract namespace of Unix sockets is Linux's")
@pytest.mark.parametrize(
    ("node_config", "client_config", "family"),
    [
        ({}, {}, socket.AF_UNIX),
        ({}, {"use_local": False}, socket.AF_INET),
        ({"bulk_address": "127.0.0.1:{port}"}, {}, socket.AF_INET),
    ],
    ids=["same machine", "not wanted", "led elsewhere"],
)
async def test_which_socket_serves(
    node_config: dict[str, str], client_config: dict[str, object], family: socket.AddressFamily
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = {name: value.format(port=port) for name, value in node_config.items()}
    async with node(bulk_port=port, **told) as server, client_of(server, **client_config) as client:
        assert await get(client, KEYS) == list(range(8))
        assert server.bulk is not None
        assert [connection._socket.family for connection in server.bulk._connections] == [family]
        assert client.counters.bulk_gets == 1


async def test_a_local_name_that_nobody_has_leads_to_the_port() -> None:
    """As on another machine."""
    async with node() as server, client_of(server) as client:
        assert server.bulk is not None
        server.bulk._local_name = "kvferry-bulk-of-another-machine"
        assert await get(client, KEYS) == list(range(8))
        assert [connection._socket.family for connection in server.bulk._connections] == [socket.AF_INET]


async def test_the_request_id_is_in_the_nodes_log(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    class Ids(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            seen.append(current_request_id())
            return True

    ids = Ids()
    logger = logging.getLogger("kvferry.kvstore.bulk_connection")
    caplog.set_level(logging.DEBUG, logger.name)
    logger.addFilter(ids)
    try:
        async with node() as server, client_of(server) as client:
            bind_request_id("request-7")
            await get(client, KEYS)
            bind_request_id("")
            await get(client, KEYS)
    finally:
        logger.removeFilter(ids)
    assert seen == ["request-7", ""]


async def test_gets_at_once_and_one_that_nobody_reads() -> None:
    """A caller that stopped reading holds up nobody else, and its memory is bounded."""
    async with node(num_records=32, num_bytes=1_000_000) as server, client_of(server) as client:
        keys = [key_of(number) for number in range(32)]
        async with aclosing(client.get(keys, namespace=NAMESPACE)) as slow:
            await anext(slow)
            async with asyncio.timeout(LIMIT_S):
                assert await asyncio.gather(*(get(client, keys) for _ in range(5))) == [list(range(32))] * 5
            assert [record.header.block_index async for record in slow] == list(range(1, 32))
        assert client.counters.bulk_gets == 6


async def test_more_gets_than_threads_go_over_grpc() -> None:
    async with node(num_records=32, num_bytes=1_000_000) as server, client_of(server) as client:
        keys = [key_of(number) for number in range(32)]
        running = [client.get(keys, namespace=NAMESPACE) for _ in range(18)]
        for records in running:
            await anext(records)
        assert (client.counters.bulk_gets, client.counters.bulk_fallbacks) == (16, 2)
        for records in running:
            assert [record.header.block_index async for record in records] == list(range(1, 32))


async def test_missing_and_left_early() -> None:
    async with node() as server, client_of(server) as client:
        with pytest.raises(BlockNotFound) as missing:
            await get(client, [*KEYS[:3], key_of(99), *KEYS[3:]])
        assert missing.value.index == 3
        async with aclosing(client.get(KEYS, namespace=NAMESPACE)) as records:
            await anext(records)
        assert await get(client, KEYS) == list(range(8))
        assert client.counters.bulk_gets == 3 and client.breaker_state.name == "CLOSED"


async def test_a_damaged_record_is_refused_and_deleted() -> None:
    async with node() as server, client_of(server) as client:
        backend = server._backend
        damaged = bytearray(record_of(2))
        damaged[-1] ^= 1
        await backend.delete([key_of(2)])
        await backend.put(key_of(2), bytes(damaged))
        seen = []
        with pytest.raises(BlockCorrupt, match="block 2 of 8"):
            async for record in client.get(KEYS, namespace=NAMESPACE):
                seen.append(record.header.block_index)
        assert seen == [0, 1] and client.counters.corrupt == 1
        assert await backend.contains(KEYS) == [True, True, False, *[True] * 5]
        assert client.counters.bulk_gets == 1


async def test_a_record_over_the_clients_limit() -> None:
    async with node(num_bytes=10_000) as server, client_of(server, max_record_bytes=5000) as client:
        with pytest.raises(InvalidRequest, match="max_record_bytes"):
            await get(client, KEYS)


async def test_leases_are_renewed() -> None:
    async with node() as server, client_of(server) as client:
        found = await client.lookup(KEYS, lease_s=2.0)
        leases = server._backend.leases
        assert leases is not None
        before = leases._leases[found.lease_id].expires_at
        await asyncio.sleep(0.02)
        async with aclosing(client.get(KEYS, namespace=NAMESPACE, lease_id=found.lease_id)) as records:
            await anext(records)
            assert leases._leases[found.lease_id].expires_at > before


@pytest.mark.parametrize("config", [{"bulk_port": None}, {"max_bulk_connections": 1}, {"bulk_address": "127.0.0.1:9"}])
async def test_without_a_bulk_port_that_can_be_used(config: dict[str, object]) -> None:
    """Not offered, full, or nobody there: gRPC carries the records, and the counter says so."""
    async with node(**config) as server:
        reply = await offer(server)
        taken = await connect(server, reply.session) if server.bulk is not None else None
        await until(lambda: server.bulk is None or server.bulk.num_connections == 1)
        async with client_of(server) as client:
            assert await get(client, KEYS) == list(range(8))
            assert await get(client, KEYS) == list(range(8))
            assert (client.counters.bulk_gets, client.counters.bulk_fallbacks) == (0, 2)
            assert client.counters.failures == 0
        if taken is not None:
            taken[1].close()


async def test_sessions_are_for_one_connection() -> None:
    async with node() as server:
        session = (await offer(server)).session
        assert len(session) == SESSION_BYTES
        wrong = session[:-1] + bytes([session[-1] ^ 1])
        for used, welcome in ((wrong, b""), (session, b""), ((await offer(server)).session, READY)):
            reader, writer = await connect(server, used)
            assert await asyncio.wait_for(reader.read(1), LIMIT_S) == welcome
            if welcome:
                reader_again, writer_again = await connect(server, used)
                assert await asyncio.wait_for(reader_again.read(1), LIMIT_S) == b"", "it was used"
                writer_again.close()
                writer.write(encode_request(KEYS[:1], lease_id=0, timeout_s=5.0))
                head = await asyncio.wait_for(reader.readexactly(HEADER.size), LIMIT_S)
                assert HEADER.unpack(head) == (0, Kind.RECORDS, 1)
                lengths = decode_lengths(await asyncio.wait_for(reader.readexactly(8), LIMIT_S))
                assert lengths == (len(record_of(0)),)
            writer.close()


def test_sessions_expire_and_are_bounded() -> None:
    now = 0.0
    sessions = BulkSessions(lifetime_s=10.0, max_waiting=3, clock=lambda: now)
    old = sessions.issue(Purpose.GETS)
    kept = [sessions.issue(Purpose.GETS) for _ in range(3)]
    assert len(sessions) == 3 and not sessions.redeem(old)
    assert sessions.redeem(kept[0]) and not sessions.redeem(kept[0])
    now = 10.0
    assert not sessions.redeem(kept[1]) and len(sessions) == 0
    assert not sessions.redeem(b"") and not sessions.redeem(bytes(SESSION_BYTES))


@pytest.mark.parametrize(
    "request_", [REQUEST.pack(0, 1000, 0, 0), REQUEST.pack((1 << 32) - 1, 1000, 0, 0), REQUEST.pack(1, 1000, 0, 129)]
)
async def test_an_impossible_request_is_refused_before_memory_is_taken(request_: bytes) -> None:
    async with node() as server:
        reader, writer = await connect(server, (await offer(server)).session)
        assert await asyncio.wait_for(reader.readexactly(1), LIMIT_S) == READY
        writer.write(request_)
        answer = await asyncio.wait_for(reader.read(), LIMIT_S)
        assert HEADER.unpack_from(answer)[1] == Kind.INVALID and b"16384 keys" in answer
        writer.close()


async def test_a_reader_that_takes_nothing_is_hung_up_on() -> None:
    async with node(num_records=64, num_bytes=1_000_000, stalled_reader_s=0.3) as server:
        reader, writer = await connect(server, (await offer(server)).session)
        assert await reader.readexactly(1) == READY
        writer.write(encode_request([key_of(n) for n in range(64)], lease_id=0, timeout_s=60.0))
        await until(lambda: server.counters.bulk_gets == 1)
        await until(lambda: server.bulk is not None and server.bulk.num_connections == 0)
        writer.close()


class FakeNode(kvstore_pb2_grpc.KVStoreServicer):
    """Offers a bulk port that behaves as a test wants."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def OpenBulk(self, request: pb.OpenBulkRequest, context: object) -> pb.OpenBulkReply:
        return pb.OpenBulkReply(address=f":{self._port}", session=bytes(SESSION_BYTES))

    async def Stats(self, request: pb.StatsRequest, context: object) -> pb.StatsReply:
        return pb.StatsReply()


@asynccontextmanager
async def fake(reply: bytes, *, stays: bool) -> AsyncIterator[StoreClient]:
    """A client of a node whose bulk port answers every request with `reply`, and closes or stays silent then."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(len(MAGIC) + SESSION_BYTES)
        writer.write(READY)
        await reader.readexactly(REQUEST.size)
        writer.write(reply)
        if stays:
            await reader.read()
        writer.close()

    bulk = await asyncio.start_server(serve, "127.0.0.1", 0)
    server = grpc.aio.server()
    kvstore_pb2_grpc.add_KVStoreServicer_to_server(FakeNode(bulk.sockets[0].getsockname()[1]), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    config = ClientConfig(address=f"127.0.0.1:{port}", lookup_timeout_s=5.0, progress_timeout_s=0.3)
    async with StoreClient(config) as client:
        await client.stats()
        yield client
    bulk.close()
    await server.stop(0.2)


def frame(index: int, kind: int, body: bytes, number: int | None = None) -> bytes:
    return HEADER.pack(index, kind, len(body) if number is None else number) + body


def frame_of(index: int, *records: bytes) -> bytes:
    return encode_records_head(index, [len(record) for record in records]) + b"".join(records)


@pytest.mark.parametrize("stays", [False, True], ids=["cut", "silent"])
async def test_a_reply_that_ends_at_any_byte(stays: bool) -> None:
    """The records that came whole are used; then the get fails in time."""
    records = [record_of(number, 300) for number in range(4)]
    whole = frame_of(0, records[0]) + frame_of(1, *records[1:3]) + frame_of(3, records[3])
    size = len(records[0])
    ends = [24 + size, 24 + size + 32 + size, 24 + size + 32 + 2 * size]
    step = 97 if stays else 17
    for length in range(0, len(whole), step):
        async with fake(whole[:length], stays=stays) as client:
            seen = []
            async with asyncio.timeout(LIMIT_S):
                with pytest.raises(StoreUnavailable):
                    async for record in client.get(KEYS[:4], namespace=NAMESPACE):
                        seen.append(record.header.block_index)
            assert seen == list(range(sum(end <= length for end in ends)))
            assert client.counters.failures == 1 and client.counters.bulk_gets == 1


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (frame_of(1, record_of(0)), BlockCorrupt),
        (frame(0, 9, record_of(0)), BlockCorrupt),
        (frame_of(0, b""), BlockCorrupt),
        (frame(0, Kind.RECORDS, b""), BlockCorrupt),
        (frame_of(0, record_of(0), record_of(1)), BlockCorrupt),
        (frame(0, Kind.RECORDS, b"", (1 << 64) - 1), BlockCorrupt),
        (frame(0, Kind.MISSING, b"x"), BlockCorrupt),
        (frame(0, Kind.RECORDS, struct.pack("<Q", (1 << 64) - 1), 1), InvalidRequest),
        (frame(0, Kind.UNAVAILABLE, b"", 1 << 40), BlockCorrupt),
        (frame(0, Kind.UNAVAILABLE, b"Redis is away"), StoreUnavailable),
        (frame(0, Kind.INVALID, b"no \xff"), InvalidRequest),
    ],
)
async def test_what_a_node_may_not_say(reply: bytes, error: type[Exception]) -> None:
    async with fake(reply, stays=True) as client, asyncio.timeout(LIMIT_S):
        with pytest.raises(error):
            await get(client, KEYS[:1])


async def test_a_frame_has_a_bound() -> None:
    records = [record_of(number, 10) for number in range(MAX_RECORDS + 1)]
    async with fake(frame_of(0, *records), stays=True) as client, asyncio.timeout(LIMIT_S):
        with pytest.raises(BlockCorrupt):
            await get(client, [key_of(number) for number in range(MAX_RECORDS + 1)])


@pytest.mark.parametrize("num_bytes", [10, 100_000])
async def test_more_records_than_a_frame_has(num_bytes: int) -> None:
    num_records = 3 * MAX_RECORDS + 1
    async with node(num_records=num_records, num_bytes=num_bytes) as server, client_of(server) as client:
        assert await get(client, [key_of(number) for number in range(num_records)]) == list(range(num_records))


async def test_a_node_that_stops_ends_running_gets() -> None:
    async with node(num_records=64, num_bytes=1_000_000) as server, client_of(server) as client:
        async with aclosing(client.get([key_of(n) for n in range(64)], namespace=NAMESPACE)) as records:
            await anext(records)
            async with asyncio.timeout(LIMIT_S):
                await server.stop(0.1)
                with pytest.raises(StoreUnavailable):
                    async for _ in records:
                        pass
        assert server.bulk is not None and server.bulk.num_connections == 0


async def test_an_idle_connection_of_a_node_that_restarted_is_not_used() -> None:
    async with node() as server, client_of(server) as client:
        assert await get(client, KEYS) == list(range(8))
        assert server.bulk is not None
        for connection in set(server.bulk._connections):
            connection.hang_up()
        await until(lambda: server.bulk is not None and server.bulk.num_connections == 0)
        assert await get(client, KEYS) == list(range(8))
        assert (client.counters.bulk_gets, client.counters.failures) == (2, 0)


async def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = KVStoreServer(MemoryBackend(capacity_bytes=1000), NodeConfig(bulk_port=taken.getsockname()[1]))
        with pytest.raises(OSError, match="bulk port"):
            await server.start()
        await server.stop(0.1)


async def test_beside_tls_no_bulk_port_is_offered(certificates: Certificates) -> None:
    """It would be plain text beside an encrypted channel."""
    security = PeerSecurity(tls=certificates.node())
    server = KVStoreServer(MemoryBackend(capacity_bytes=1000), NodeConfig(bulk_port=0), security=security)
    assert server.bulk is None
    await server.start()
    client = StoreClient(ClientConfig(address=server.address), security=security)
    assert client._getter._bulk is None
    assert (await client.stats()).records == 0
    await client.close()
    await server.stop(0.1)


def test_the_request_is_pinned() -> None:
    request = encode_request(KEYS[:2], lease_id=7, timeout_s=1.5)
    assert request == struct.pack("<IIQI", 2, 1500, 7, 0) + KEYS[0] + KEYS[1]
    request = encode_request(KEYS[:1], lease_id=7, timeout_s=1.5, request_id="a-1")
    assert request == struct.pack("<IIQI", 1, 1500, 7, 3) + b"a-1" + KEYS[0]
