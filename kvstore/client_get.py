"""How a client gets records from its node: over the bulk port where there is one, else over gRPC."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Sequence
from functools import partial

import grpc.aio

from kvferry.kvstore.bulk_client import BulkConnections
from kvferry.kvstore.bulk_reader import BulkReader
from kvferry.kvstore.client_channel import whole
from kvferry.kvstore.client_counters import ClientCounters
from kvferry.kvstore.codec import Buffer, Record, decode_moved_record
from kvferry.kvstore.config import ClientConfig
from kvferry.kvstore.frames import parse_get_frame
from kvferry.kvstore.interceptor import SERVICE_NAME
from kvferry.kvstore.record_reader import Reader, RecordReader
from kvferry.kvstore.verifier import Verifier
from kvferry.proto import kvstore_pb2 as pb
from kvferry.proto.request_id import request_id_metadata

MAX_GETS = 16
"""Gets over the bulk port at one time, each with a thread and a connection; more go over gRPC."""


class RecordGetter:
    """Begins gets. Owns the bulk connections and the verifying threads, not the channel."""

    def __init__(
        self, channel: grpc.aio.Channel, config: ClientConfig, counters: ClientCounters, *, can_use_bulk: bool
    ) -> None:
        self._config = config
        self._counters = counters
        # With a codec of its own; see frames.py.
        self._get = channel.unary_stream(
            f"/{SERVICE_NAME}/Get",
            request_serializer=pb.GetRequest.SerializeToString,
            response_deserializer=parse_get_frame,
        )
        open_bulk = channel.unary_unary(
            f"/{SERVICE_NAME}/OpenBulk",
            request_serializer=pb.OpenBulkRequest.SerializeToString,
            response_deserializer=pb.OpenBulkReply.FromString,
        )

        async def open_session() -> pb.OpenBulkReply:
            reply: pb.OpenBulkReply = whole(await open_bulk(pb.OpenBulkRequest(), timeout=config.lookup_timeout_s))
            return reply

        self._verifier = Verifier()
        self._bulk: BulkConnections | None = None
        if can_use_bulk and config.use_bulk:
            self._bulk = BulkConnections(config, open_session, max_running=MAX_GETS, name="kvstore-bulk-get")

    async def begin(self, keys: Sequence[bytes], *, namespace: bytes, lease_id: int, timeout_s: float) -> Reader:
        """A running get; close it."""
        if self._bulk is not None:
            started = time.monotonic()
            connection = await self._bulk.take()
            if connection is not None:
                self._counters.bulk_gets += 1
                return BulkReader(
                    connection,
                    self._bulk.executor,
                    keys,
                    namespace=namespace,
                    lease_id=lease_id,
                    timeout_s=timeout_s - (time.monotonic() - started),
                    progress_timeout_s=self._config.progress_timeout_s,
                    max_record_bytes=self._config.max_record_bytes,
                    done=self._bulk.give_back,
                )
            self._counters.bulk_fallbacks += 1

        def check(buffer: Buffer, key: bytes) -> Awaitable[Record]:
            decode = partial(
                decode_moved_record,
                buffer,
                expected_key=key,
                expected_namespace=namespace,
                max_record_bytes=self._config.max_record_bytes,
            )
            return self._verifier.run(len(buffer), decode)

        return RecordReader(
            self._get(pb.GetRequest(keys=keys, lease_id=lease_id), timeout=timeout_s, metadata=request_id_metadata()),
            keys,
            check,
            max_record_bytes=self._config.max_record_bytes,
            progress_timeout_s=self._config.progress_timeout_s,
        )

    def close(self) -> None:
        """Closes the connections that are idle, and lets the threads end."""
        if self._bulk is not None:
            self._bulk.close()
        self._verifier.close()
