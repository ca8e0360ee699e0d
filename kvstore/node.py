"""The KVStore service: the proto's promises on top of a backend. Errors leave as KVStoreError."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from typing import Any

from kvferry.kvstore.backend import Backend, BackendStats
from kvferry.kvstore.bulk_server import BulkServer
from kvferry.kvstore.bulk_sessions import Purpose
from kvferry.kvstore.codec import peek_header, verify_record
from kvferry.kvstore.config import FRAME_BYTES, NodeConfig
from kvferry.kvstore.errors import BlockCorrupt, InvalidRequest, StoreFull
from kvferry.kvstore.frames import encode_get_frame
from kvferry.kvstore.key import KEY_BYTES
from kvferry.kvstore.node_answers import PutManyOutcome
from kvferry.kvstore.node_counters import NodeCounters
from kvferry.kvstore.record_sink import RecordSink
from kvferry.kvstore.record_source import RecordSource
from kvferry.kvstore.staging import StagedRecord, Staging
from kvferry.kvstore.verifier import Verifier
from kvferry.proto import kvstore_pb2 as pb
from kvferry.proto import kvstore_pb2_grpc

_DEFAULT_PAGE_SIZE = 100
_MAX_PAGE_SIZE = 1000


class KVStoreNode(kvstore_pb2_grpc.KVStoreServicer):
    """Serves one backend. Owns staging and counters, not the backend."""

    def __init__(self, backend: Backend, config: NodeConfig) -> None:
        self.counters = NodeCounters()
        self._backend = backend
        self._config = config
        self._staging = Staging(max_bytes=config.max_staged_bytes)
        self._verifier = Verifier()
        self._bulk: BulkServer | None = None
        self.records = RecordSource(backend, self._verifier, self.counters, max_record_bytes=config.max_record_bytes)
        self.sink = RecordSink(backend, self._staging, self.counters, max_record_bytes=config.max_record_bytes)

    def offer_bulk(self, bulk: BulkServer) -> None:
        """From now on clients are told of this bulk port."""
        self._bulk = bulk

    @property
    def staged_bytes(self) -> int:
        """Bytes reserved by puts in progress."""
        return self._staging.staged_bytes

    def close(self) -> None:
        """Ends the verifying thread."""
        self._verifier.close()

    async def Lookup(self, request: pb.LookupRequest, context: Any) -> pb.LookupReply:
        """Counts the contiguous prefix; leases it where the backend can pin records."""
        keys = self._checked_keys(request.keys)
        self.counters.lookups += 1
        leases = self._backend.leases
        lease_s = min(request.lease_ms / 1000, self._config.max_lease_s)
        lease_id = 0
        # Leased before they are counted: nothing that is counted can be evicted in between.
        if leases is not None and lease_s > 0:
            lease_id = leases.grant(keys, lease_s)
        try:
            present = await self._backend.contains(keys)
        except BaseException:
            if leases is not None and lease_id:
                leases.release(lease_id)
            raise
        num_contiguous = present.index(False) if False in present else len(present)
        if leases is not None and lease_id:
            leases.narrow(lease_id, num_contiguous)
        if lease_id == 0 or num_contiguous == 0:
            return pb.LookupReply(num_contiguous=num_contiguous)
        return pb.LookupReply(num_contiguous=num_contiguous, lease_id=lease_id, lease_ms=int(lease_s * 1000))

    async def Get(  # type: ignore[override]  # some frames come encoded; see ErrorInterceptor
        self, request: pb.GetRequest, context: Any
    ) -> AsyncIterator[pb.GetFrame | bytes]:
        """Streams verified records; a damaged one is deleted and reported as missing."""
        keys = self._checked_keys(request.keys)
        index = 0
        async with contextlib.aclosing(self.records.read(keys, request.lease_id)) as batches:
            async for records in batches:
                for record in records:
                    if record is None:
                        yield pb.GetFrame(index=index, missing=True)
                        return
                    for frame in _frames(index, record):
                        yield frame
                    index += 1

    async def OpenBulk(self, request: pb.OpenBulkRequest, context: Any) -> pb.OpenBulkReply:
        """A session for gets on the bulk port, where there is one with room."""
        return self._open_bulk(Purpose.GETS)

    async def OpenBulkPuts(self, request: pb.OpenBulkRequest, context: Any) -> pb.OpenBulkReply:
        """The same for puts."""
        return self._open_bulk(Purpose.PUTS)

    async def Put(self, request_iterator: AsyncIterator[pb.PutFrame | memoryview], context: Any) -> pb.PutReply:
        """Stages, verifies, then makes the record visible with one backend call."""
        try:
            stored = await self._put(request_iterator)
        except (StoreFull, BlockCorrupt):
            self.counters.rejected += 1
            raise
        if not stored:
            return pb.PutReply(outcome=pb.PutReply.EXISTED)
        self.counters.puts += 1
        return pb.PutReply(outcome=pb.PutReply.STORED)

    async def PutMany(self, request_iterator: AsyncIterator[pb.PutManyFrame], context: Any) -> pb.PutManyReply:
        """Stores record by record; what one of them meets does not touch the others."""
        outcomes: list[pb.PutManyReply.Outcome.ValueType] = []
        timeout_s = self._config.staging_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                async for frame in request_iterator:
                    if len(outcomes) + len(frame.records) > self._config.max_keys_per_request:
                        raise InvalidRequest(f"a call puts at most {self._config.max_keys_per_request} records")
                    outcomes += await self._put_frame([(one.key, one.record) for one in frame.records])
        except TimeoutError:
            raise InvalidRequest(
                f"the records did not all come within {timeout_s} s; those that came were stored"
            ) from None
        return pb.PutManyReply(outcomes=outcomes)

    async def Pin(self, request: pb.PinRequest, context: Any) -> pb.PinReply:
        """Pins or unpins; says by key what came of it."""
        keys = self._checked_keys(request.keys)
        changed = await (self._backend.unpin(keys) if request.unpin else self._backend.pin(keys))
        return pb.PinReply(changed=changed)

    async def List(self, request: pb.ListRequest, context: Any) -> pb.ListReply:
        """One page of the backend's listing, with what the records' headers say."""
        if request.page_size > _MAX_PAGE_SIZE:
            raise InvalidRequest(f"page_size must be at most {_MAX_PAGE_SIZE}, not {request.page_size}")
        page = await self._backend.page(request.page_token, request.page_size or _DEFAULT_PAGE_SIZE)
        reply = pb.ListReply(next_page_token=page.next_cursor)
        for entry in page.entries:
            told = reply.entries.add(
                key=entry.key, record_bytes=entry.record_bytes, tier=entry.tier, pinned=entry.pinned
            )
            if entry.age_s is not None:
                told.age_s = entry.age_s
            header = peek_header(entry.head, max_record_bytes=self._config.max_record_bytes)
            if header is not None:
                told.num_tokens, told.block_index = header.num_tokens, header.block_index
                told.namespace = header.namespace
        return reply

    async def Release(self, request: pb.ReleaseRequest, context: Any) -> pb.ReleaseReply:
        """Ends a lease; unknown ones are ignored."""
        if self._backend.leases is not None:
            self._backend.leases.release(request.lease_id)
        return pb.ReleaseReply()

    async def Delete(self, request: pb.DeleteRequest, context: Any) -> pb.DeleteReply:
        """Removes the given keys, or everything."""
        if request.all and request.keys:
            raise InvalidRequest("a delete names keys or sets all, not both")
        keys = None if request.all else self._checked_keys(request.keys)
        return pb.DeleteReply(deleted=await self._backend.delete(keys))

    async def Stats(self, request: pb.StatsRequest, context: Any) -> pb.StatsReply:
        """Counters of this node, sizes of its backend."""
        backend = await self._backend.stats()
        return pb.StatsReply(
            records=backend.records,
            bytes=backend.bytes,
            capacity_bytes=backend.capacity_bytes,
            lookups=self.counters.lookups,
            hits=self.counters.hits,
            misses=self.counters.misses,
            puts=self.counters.puts,
            evictions=backend.evictions,
            rejected=self.counters.rejected,
            corrupt=self.counters.corrupt + backend.corrupt,
            backend=backend.name,
            tiers=[_tier_stats(tier) for tier in backend.tiers or (backend,)],
        )

    def _open_bulk(self, purpose: Purpose) -> pb.OpenBulkReply:
        offer = None if self._bulk is None else self._bulk.open_session(purpose)
        return pb.OpenBulkReply() if offer is None else pb.OpenBulkReply(**offer._asdict())

    async def _put_frame(self, records: list[tuple[bytes, bytes]]) -> list[pb.PutManyReply.Outcome.ValueType]:
        """One frame of PutMany. All its checks are one hop to another thread."""
        num_bytes = sum(len(record) for _, record in records)
        if not records or num_bytes > FRAME_BYTES:
            raise InvalidRequest(f"a frame holds 1 or more records of {FRAME_BYTES} bytes together, at most")
        self._checked_keys([key for key, _ in records])

        def check() -> list[bool]:
            return [self.sink.passes(key, record) for key, record in records]

        outcomes: list[pb.PutManyReply.Outcome.ValueType] = []
        with self._staging.stage(records[0][0], num_bytes):
            for (key, record), is_intact in zip(records, await self._verifier.run(num_bytes, check), strict=True):
                outcomes.append(await self._put_checked(key, record) if is_intact else pb.PutManyReply.CORRUPT)
        self.counters.rejected += outcomes.count(pb.PutManyReply.CORRUPT)
        return outcomes

    async def _put_checked(self, key: bytes, record: bytes) -> pb.PutManyReply.Outcome.ValueType:
        try:
            outcome = await self.sink.put(key, record)
        except StoreFull:
            return pb.PutManyReply.FULL
        return pb.PutManyReply.STORED if outcome is PutManyOutcome.STORED else pb.PutManyReply.EXISTED

    async def _put(self, frames: AsyncIterator[pb.PutFrame | memoryview]) -> bool:
        timeout_s = self._config.staging_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                key, record_bytes = self._checked_begin(await anext(frames, None))
                if (await self._backend.contains([key]))[0]:
                    return False  # spares the sender the rest of its record
                with self._staging.stage(key, record_bytes) as staged:
                    await _receive(frames, staged)
                    record = staged.join()
                    check = partial(verify_record, record, key, max_record_bytes=self._config.max_record_bytes)
                    await self._verifier.run(len(record), check)
                    return await self._backend.put(key, record)
        except TimeoutError:
            raise InvalidRequest(
                f"the put did not commit within {timeout_s} s of its start; nothing was stored"
            ) from None

    def _checked_keys(self, keys: Sequence[bytes]) -> list[bytes]:
        limit = self._config.max_keys_per_request
        if not 1 <= len(keys) <= limit:
            raise InvalidRequest(f"a request must name 1 to {limit} keys, not {len(keys)}")
        if any(len(key) != KEY_BYTES for key in keys):
            raise InvalidRequest(f"every key must be {KEY_BYTES} bytes")
        return list(keys)

    def _checked_begin(self, frame: pb.PutFrame | memoryview | None) -> tuple[bytes, int]:
        if frame is None or isinstance(frame, memoryview) or frame.WhichOneof("frame") != "begin":
            raise InvalidRequest("a put must start with a begin frame")
        key, record_bytes = frame.begin.key, frame.begin.record_bytes
        if len(key) != KEY_BYTES:
            raise InvalidRequest(f"the key must be {KEY_BYTES} bytes, not {len(key)}")
        limit = self._config.max_record_bytes
        if not 1 <= record_bytes <= limit:
            raise InvalidRequest(
                f"a record must have 1 to {limit} bytes, not {record_bytes}; "
                "use a smaller block size or raise max_record_bytes on node and clients"
            )
        return key, record_bytes


async def _receive(frames: AsyncIterator[pb.PutFrame | memoryview], staged: StagedRecord) -> None:
    """Appends chunks until the commit frame. Raises InvalidRequest when it does not come."""
    async for frame in frames:
        if isinstance(frame, memoryview):
            staged.append(frame)
            continue
        kind = frame.WhichOneof("frame")
        if kind == "commit":
            return
        if kind != "chunk":
            raise InvalidRequest("after its begin frame a put may send chunks and one commit only")
        staged.append(frame.chunk)
    raise InvalidRequest("the put ended without a commit; nothing was stored")


def _frames(index: int, record: bytes) -> Iterator[bytes]:
    view = memoryview(record)
    for start in range(0, len(record), FRAME_BYTES):
        yield encode_get_frame(index, len(record) if start == 0 else 0, view[start : start + FRAME_BYTES])


def _tier_stats(stats: BackendStats) -> pb.TierStats:
    fields = [field.name for field in pb.TierStats.DESCRIPTOR.fields]
    return pb.TierStats(**{name: getattr(stats, name) for name in fields})
