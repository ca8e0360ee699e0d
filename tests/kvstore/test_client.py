"""The client against a node that lies, stalls or breaks off. It must not believe or wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest

from kvferry.kvstore import (
    BlockCorrupt,
    BlockNotFound,
    ClientConfig,
    InvalidRequest,
    KVStoreError,
    Namespace,
    StoreClient,
    StoreUnavailable,
    block_keys,
)
from kvferry.kvstore.breaker import BreakerState
from kvferry.kvstore.client_channel import whole
from kvferry.proto import kvstore_pb2 as pb
from kvferry.proto import kvstore_pb2_grpc


class _LyingNode(kvstore_pb2_grpc.KVStoreServicer):
    """Answers a Get with the given frames, a None meaning: hang."""

    def __init__(self, frames: list[pb.GetFrame | None]) -> None:
        self.frames = frames
        self.deleted: list[bytes] = []
        self.hanging = False

    async def Get(self, request: Any, context: Any) -> AsyncIterator[pb.GetFrame]:
        for frame in self.frames:
            if frame is None:
                await asyncio.sleep(60)
            else:
                yield frame

    async def Lookup(self, request: Any, context: Any) -> pb.LookupReply:
        if self.hanging:
            await asyncio.sleep(60)
        return pb.LookupReply(num_contiguous=1000)

    async def Delete(self, request: Any, context: Any) -> pb.DeleteReply:
        self.deleted.extend(request.keys)
        return pb.DeleteReply(deleted=len(request.keys))

    async def Stats(self, request: Any, context: Any) -> pb.StatsReply:
        if self.hanging:
            await asyncio.sleep(60)
        return pb.StatsReply()


@asynccontextmanager
async def _connected(frames: list[pb.GetFrame | None], **config: Any) -> AsyncIterator[tuple[StoreClient, _LyingNode]]:
    node = _LyingNode(frames)
    server = grpc.aio.server()
    kvstore_pb2_grpc.add_KVStoreServicer_to_server(node, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        options = {"lookup_timeout_s": 5.0, **config}
        async with StoreClient(ClientConfig(address=f"127.0.0.1:{port}", **options)) as client:
            yield client, node
    finally:
        await server.stop(0)


@pytest.fixture
def keys(namespace: Namespace) -> list[bytes]:
    return block_keys(namespace, range(32 * 4))


def _frame(record: bytes, index: int = 0, **changes: Any) -> pb.GetFrame:
    return pb.GetFrame(**{"index": index, "record_bytes": len(record), "chunk": record, **changes})


async def _get(client: StoreClient, namespace: Namespace, keys: list[bytes]) -> int:
    return len([r async for r in client.get(keys, namespace=namespace.digest())])


async def test_honest_frames_are_accepted(
    namespace: Namespace, keys: list[bytes], make_record: Callable[..., bytes]
) -> None:
    first, second = (make_record(key) for key in keys[:2])
    frames = [
        _frame(first),
        _frame(second, 1, chunk=second[:100]),
        _frame(second, 1, chunk=second[100:], record_bytes=0),
    ]
    async with _connected(list(frames)) as (client, _):
        assert await _get(client, namespace, keys[:2]) == 2


async def test_a_damaged_record_is_refused_and_deleted(
    namespace: Namespace, keys: list[bytes], make_record: Callable[..., bytes]
) -> None:
    good, bad = make_record(keys[0]), bytearray(make_record(keys[1]))
    bad[200] ^= 4
    async with _connected([_frame(good), _frame(bytes(bad), 1)]) as (client, node):
        seen = []
        with pytest.raises(BlockCorrupt, match=r"block 1 of 2.*checksum"):
            async for record in client.get(keys[:2], namespace=namespace.digest()):
                seen.append(record.header.key)
        assert seen == keys[:1]
        assert node.deleted == [keys[1]]
        assert client.counters.corrupt == 1
        assert client.counters.bytes_read == len(good)
        assert client.breaker_state is BreakerState.CLOSED


async def test_a_genuine_record_of_another_block_is_refused(
    namespace: Namespace, keys: list[bytes], make_record: Callable[..., bytes]
) -> None:
    async with _connected([_frame(make_record(keys[1]))]) as (client, _):
        with pytest.raises(BlockCorrupt, match="another block key"):
            await _get(client, namespace, keys[:1])
    async with _connected([_frame(make_record(keys[0]))]) as (client, _):
        with pytest.raises(BlockCorrupt, match="another namespace"):
            [r async for r in client.get(keys[:1], namespace=bytes(32))]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"index": 1}, BlockCorrupt),
        ({"chunk": b""}, BlockCorrupt),
        ({"record_bytes": 10}, BlockCorrupt),
        ({"record_bytes": 0}, BlockCorrupt),
        ({"record_bytes": 1 << 63}, InvalidRequest),
        ({"record_bytes": 5000}, StoreUnavailable),  # the stream ends too early
        ({"missing": True}, BlockNotFound),
    ],
)
async def test_lies_are_refused(
    namespace: Namespace,
    keys: list[bytes],
    make_record: Callable[..., bytes],
    changes: dict[str, Any],
    kind: type[KVStoreError],
) -> None:
    async with _connected([_frame(make_record(keys[0]), **changes)]) as (client, _):
        with pytest.raises(kind):
            await _get(client, namespace, keys[:1])


async def test_a_stream_that_ends_early_is_unavailable(
    namespace: Namespace, keys: list[bytes], make_record: Callable[..., bytes]
) -> None:
    async with _connected([_frame(make_record(keys[0]))]) as (client, _):
        with pytest.raises(StoreUnavailable, match="ended before"):
            await _get(client, namespace, keys[:2])


@pytest.mark.parametrize("num_frames", [0, 1])
async def test_a_stalled_stream_is_given_up(
    namespace: Namespace, keys: list[bytes], make_record: Callable[..., bytes], num_frames: int
) -> None:
    record = make_record(keys[0])
    frames: list[pb.GetFrame | None] = [_frame(record, chunk=record[:50])][:num_frames]
    async with _connected([*frames, None], progress_timeout_s=0.3) as (client, _):
        start = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"sent nothing for 0.3 s"):
            await _get(client, namespace, keys[:1])
        assert time.monotonic() - start < 5.0
        assert client.counters.failures == 1


async def test_lookup_never_claims_more_than_was_asked(keys: list[bytes]) -> None:
    async with _connected([]) as (client, _):
        assert (await client.lookup(keys)).num_contiguous == len(keys)


async def test_the_breaker_opens_and_heals_in_the_background(keys: list[bytes]) -> None:
    options = {"lookup_timeout_s": 0.3, "cool_down_s": 0.1}
    async with _connected([], **options) as (client, node):
        await client.lookup(keys, timeout_s=5.0)
        node.hanging = True
        with pytest.raises(StoreUnavailable, match="DEADLINE_EXCEEDED"):
            await client.lookup(keys)
        assert client.breaker_state is BreakerState.OPEN
        start = time.monotonic()
        for _ in range(1000):
            with pytest.raises(StoreUnavailable, match="not asking"):
                await client.lookup(keys, timeout_s=5.0)
        assert time.monotonic() - start < 5.0
        assert client.counters.refused == 1000
        assert client.counters.failures == 1
        node.hanging = False
        async with asyncio.timeout(10):
            while client.breaker_state is not BreakerState.CLOSED:
                await asyncio.sleep(0.02)
        await client.lookup(keys, timeout_s=5.0)


async def test_nobody_listens(keys: list[bytes], namespace: Namespace) -> None:
    config = ClientConfig(address="127.0.0.1:1", failure_threshold=100)
    async with StoreClient(config) as client:
        for call in (client.lookup(keys), client.put(keys[0], b"record"), client.stats()):
            with pytest.raises(StoreUnavailable):
                await call
        with pytest.raises(StoreUnavailable):
            await _get(client, namespace, keys)
        assert client.counters.failures == 4


async def test_close_is_idempotent_and_stops_probing(keys: list[bytes]) -> None:
    client = StoreClient(ClientConfig(address="127.0.0.1:1"))
    with pytest.raises(StoreUnavailable):
        await client.lookup(keys)
    assert client.breaker_state is BreakerState.OPEN
    await client.close()
    await client.close()
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize(
    "change",
    [{"address": "nowhere"}, {"lookup_timeout_s": 0}, {"failure_threshold": 0}],
)
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ClientConfig(**{"address": "127.0.0.1:1", **change})


async def test_an_answer_without_a_message_is_a_lost_store() -> None:
    """What grpc.aio makes of an answer that was damaged on its way."""
    with pytest.raises(StoreUnavailable, match="without a message"):
        whole(None)
    assert whole(b"") == b""
