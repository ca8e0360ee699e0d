"""How a client puts records into its node: over the bulk port where there is one, else over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial

import grpc.aio

from kvferry.kvstore.bulk_client import BulkConnections
from kvferry.kvstore.bulk_frames import MAX_RECORDS
from kvferry.kvstore.bulk_giving import Given, give_records
from kvferry.kvstore.client_channel import whole
from kvferry.kvstore.client_counters import ClientCounters
from kvferry.kvstore.config import FRAME_BYTES, MIB, ClientConfig
from kvferry.kvstore.errors import StoreUnavailable
from kvferry.kvstore.frames import encode_put_chunk
from kvferry.kvstore.interceptor import SERVICE_NAME
from kvferry.kvstore.node_answers import PutManyOutcome, put_many_frames, put_many_outcome
from kvferry.proto import kvstore_pb2 as pb
from kvferry.proto import kvstore_pb2_grpc
from kvferry.proto.request_id import current_request_id, request_id_metadata

MAX_PUTS = 4
"""Puts over the bulk port at one time, each with a thread and a connection; more go over gRPC."""
_PUT_BYTES = 8 * MIB
"""What one request over the bulk port puts, or a single record."""

Keyed = tuple[bytes, bytes]
"""A key and its record."""


class RecordPutter:
    """Puts records. Owns the bulk connections, not the channel. All methods raise AioRpcError and StoreUnavailable."""

    def __init__(
        self, channel: grpc.aio.Channel, config: ClientConfig, counters: ClientCounters, *, can_use_bulk: bool
    ) -> None:
        self._counters = counters
        self._stub = kvstore_pb2_grpc.KVStoreStub(channel)
        # With a codec of its own; see frames.py.
        self._put = channel.stream_unary(
            f"/{SERVICE_NAME}/Put", request_serializer=bytes, response_deserializer=pb.PutReply.FromString
        )

        async def open_session() -> pb.OpenBulkReply:
            return whole(await self._stub.OpenBulkPuts(pb.OpenBulkRequest(), timeout=config.lookup_timeout_s))

        self._bulk: BulkConnections | None = None
        if can_use_bulk and config.use_bulk:
            self._bulk = BulkConnections(config, open_session, max_running=MAX_PUTS, name="kvstore-bulk-put")

    async def put(self, key: bytes, record: bytes, *, timeout_s: float) -> Given:
        """What came of one record; over gRPC a refusal is an AioRpcError."""
        given = await self._over_bulk([(key, record)], timeout_s)
        if given is not None:
            return given
        reply = whole(await self._put(_put_frames(key, record), timeout=timeout_s, metadata=request_id_metadata()))
        stored = reply.outcome == pb.PutReply.STORED
        return Given([PutManyOutcome.STORED if stored else PutManyOutcome.EXISTED], "")

    async def put_many(self, records: Sequence[Keyed], *, timeout_s: float) -> dict[int, PutManyOutcome]:
        """By position, what came of those that go together; the others are to be put one by one."""
        deadline = time.monotonic() + timeout_s
        outcomes: dict[int, PutManyOutcome] = {}
        for start, end in _requests(records):
            given = await self._over_bulk(records[start:end], deadline - time.monotonic())
            if given is None:
                break
            outcomes |= zip(range(start, end), given.outcomes, strict=True)
        left = [i for i in range(len(outcomes), len(records)) if len(records[i][1]) <= FRAME_BYTES]
        if left:
            reply = whole(
                await self._stub.PutMany(
                    put_many_frames([records[i] for i in left]),
                    timeout=max(0.0, deadline - time.monotonic()),
                    metadata=request_id_metadata(),
                )
            )
            if len(reply.outcomes) != len(left):
                raise StoreUnavailable("the node did not say what came of every record")
            outcomes |= zip(left, map(put_many_outcome, reply.outcomes), strict=True)
        return outcomes

    def close(self) -> None:
        """Closes the connections that are idle, and lets the threads end."""
        if self._bulk is not None:
            self._bulk.close()

    async def _over_bulk(self, records: Sequence[Keyed], timeout_s: float) -> Given | None:
        """What came of them; None when gRPC has to do. Raises StoreUnavailable."""
        if self._bulk is None:
            return None
        deadline = time.monotonic() + timeout_s
        connection = await self._bulk.take()
        if connection is None:
            return None
        self._counters.bulk_puts += 1
        loop = asyncio.get_running_loop()
        giving = loop.run_in_executor(
            self._bulk.executor, give_records, connection, records, deadline, current_request_id()
        )
        giving.add_done_callback(partial(_given_back, self._bulk, connection))
        try:
            async with asyncio.timeout_at(loop.time() + max(0.0, deadline - time.monotonic())):
                return await asyncio.shield(giving)
        except (TimeoutError, BlockingIOError):
            raise StoreUnavailable(f"the put took longer than its {timeout_s:.3g} s") from None
        except (OSError, EOFError) as error:
            raise StoreUnavailable(f"the connection to the node ended during a put: {error}") from None
        finally:
            if not giving.done():
                with contextlib.suppress(OSError):  # the other side has gone already
                    connection.shutdown(socket.SHUT_RDWR)  # wakes the thread


def _given_back(bulk: BulkConnections, connection: socket.socket, giving: asyncio.Future[Given]) -> None:
    bulk.give_back(connection, not giving.cancelled() and giving.exception() is None)


def _requests(records: Sequence[Keyed]) -> Iterator[tuple[int, int]]:
    """Where those of one request begin and end."""
    start = num_bytes = 0
    for end, (_, record) in enumerate(records):
        if end > start and (num_bytes + len(record) > _PUT_BYTES or end - start == MAX_RECORDS):
            yield start, end
            start, num_bytes = end, 0
        num_bytes += len(record)
    yield start, len(records)


async def _put_frames(key: bytes, record: bytes) -> AsyncIterator[bytes]:
    begin = pb.PutBegin(key=key, record_bytes=len(record))
    yield pb.PutFrame(begin=begin).SerializeToString()
    view = memoryview(record)
    for start in range(0, len(record), FRAME_BYTES):
        yield encode_put_chunk(view[start : start + FRAME_BYTES])
    yield pb.PutFrame(commit=pb.PutCommit()).SerializeToString()
