"""A client of one KV store node. Every call is bounded, and a dead node costs one timeout once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import NamedTuple, Self

import grpc
import grpc.aio

from kvferry.kvstore.breaker import Breaker, BreakerState
from kvferry.kvstore.client_channel import store_channel_options, translate, whole
from kvferry.kvstore.client_counters import ClientCounters
from kvferry.kvstore.client_get import RecordGetter
from kvferry.kvstore.client_put import RecordPutter
from kvferry.kvstore.codec import Record
from kvferry.kvstore.config import DEFAULT_MAX_KEYS, ClientConfig
from kvferry.kvstore.errors import (
    BlockCorrupt,
    BlockNotFound,
    InvalidRequest,
    KVStoreError,
    StoreFull,
    StoreUnavailable,
)
from kvferry.kvstore.key import KEY_BYTES
from kvferry.kvstore.node_answers import (
    ListedRecord,
    NodeStats,
    PutManyOutcome,
    listed_record,
    node_stats,
)
from kvferry.kvstore.record_reader import Reader
from kvferry.proto import kvstore_pb2 as pb
from kvferry.proto import kvstore_pb2_grpc
from kvferry.proto.peer_security import PeerSecurity
from kvferry.proto.request_id import request_id_metadata


class LookupResult(NamedTuple):
    """How much of a chain is in the store now."""

    num_contiguous: int  # blocks, from the first key on
    lease_id: int  # 0: nothing is leased
    lease_s: float  # granted, counted from the node's answer


class StoreClient:
    """Moves records to and from one node. Make it on the event loop that uses it; close it there.

    Every method raises StoreUnavailable when the node does not answer in time, at once while the
    breaker is open. Nothing is retried: the caller recomputes. After a failure the client probes
    the node in the background and closes the breaker by itself when the node is back.
    """

    def __init__(
        self,
        config: ClientConfig,
        *,
        security: PeerSecurity | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counters = ClientCounters()
        self._config = config
        self._breaker = Breaker(
            failure_threshold=config.failure_threshold,
            cool_down_s=config.cool_down_s,
            clock=clock,
        )
        security = security or PeerSecurity()
        self._channel = security.channel(config.address, store_channel_options())
        self._stub = kvstore_pb2_grpc.KVStoreStub(self._channel)
        # The bulk port speaks plain text: beside an encrypted channel it is not used.
        can_use_bulk = security.tls is None
        self._getter = RecordGetter(self._channel, config, self.counters, can_use_bulk=can_use_bulk)
        self._putter = RecordPutter(self._channel, config, self.counters, can_use_bulk=can_use_bulk)
        self._prober: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """host:port of the node."""
        return self._config.address

    @property
    def breaker_state(self) -> BreakerState:
        """CLOSED: the store is used. Otherwise calls fail at once."""
        return self._breaker.state

    def of_chain(self, keys: Sequence[bytes]) -> Self:
        """This client: one node holds all blocks. See `Store`."""
        return self

    async def lookup(
        self, keys: Sequence[bytes], *, lease_s: float = 0.0, timeout_s: float | None = None
    ) -> LookupResult:
        """How many of the first keys are present; leases them for `lease_s` if that is not 0.

        A backend that cannot pin records (Redis) grants no lease.
        """
        request = pb.LookupRequest(keys=_checked_keys(keys), lease_ms=int(lease_s * 1000))
        with self._answering():
            reply = whole(
                await self._stub.Lookup(request, timeout=self._unary_timeout(timeout_s), metadata=request_id_metadata())
            )
        return LookupResult(
            num_contiguous=min(reply.num_contiguous, len(keys)),
            lease_id=reply.lease_id,
            lease_s=reply.lease_ms / 1000,
        )

    async def get(
        self,
        keys: Sequence[bytes],
        *,
        namespace: bytes,
        lease_id: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Record]:
        """Yields the verified record of every key, in order.

        `namespace` is Namespace.digest(). Raises BlockNotFound at the first missing key (records
        before it were yielded and are good), BlockCorrupt at a damaged one after asking the node
        to delete it, StoreUnavailable when no bytes come for `progress_timeout_s`. Close the
        iterator (contextlib.aclosing) when leaving it early.
        """
        keys = _checked_keys(keys)
        timeout = self._config.get_timeout_s if timeout_s is None else timeout_s
        reader: Reader | None = None
        index = 0
        try:
            while index < len(keys):
                with self._answering():
                    if reader is None:
                        reader = await self._getter.begin(
                            keys, namespace=namespace, lease_id=lease_id, timeout_s=timeout
                        )
                    reads = await reader.next()
                for read in reads:
                    num_bytes, record = read
                    try:
                        if type(record) is not Record:
                            record = await read.checked()
                    except BlockCorrupt as error:
                        self.counters.corrupt += 1
                        await reader.close()
                        await self._delete_damaged(keys[index])
                        raise BlockCorrupt(f"block {index} of {len(keys)}: {error}") from error
                    self.counters.bytes_read += num_bytes
                    index += 1
                    yield record
        finally:
            if reader is not None:
                await reader.close()

    async def put(self, key: bytes, record: bytes, *, timeout_s: float | None = None) -> bool:
        """Stores one encoded record; True when this call stored it, False when it was there.

        Raises StoreFull when the node has no room, BlockCorrupt when the node's checks fail,
        InvalidRequest when the record breaks a limit. In all cases nothing was changed.
        """
        _checked_keys([key])
        if len(record) > self._config.max_record_bytes:
            raise InvalidRequest(
                f"the record has {len(record)} bytes, over max_record_bytes = {self._config.max_record_bytes}"
            )
        timeout = self._config.put_timeout_s if timeout_s is None else timeout_s
        with self._answering(exhausted=StoreFull):
            (outcome,), message = await self._putter.put(key, record, timeout_s=timeout)
            if outcome is PutManyOutcome.FULL:
                raise StoreFull(message)
            if outcome is PutManyOutcome.CORRUPT:
                raise BlockCorrupt(message)
        if outcome is PutManyOutcome.EXISTED:
            return False
        self.counters.bytes_written += len(record)
        return True

    async def release(self, lease_id: int, *, timeout_s: float | None = None) -> None:
        """Ends a lease before its time; unknown ones are ignored."""
        with self._answering():
            await self._stub.Release(pb.ReleaseRequest(lease_id=lease_id), timeout=self._unary_timeout(timeout_s))

    async def delete(self, keys: Sequence[bytes], *, timeout_s: float | None = None) -> int:
        """Removes records; returns how many there were."""
        request = pb.DeleteRequest(keys=_checked_keys(keys))
        with self._answering():
            reply = whole(await self._stub.Delete(request, timeout=self._unary_timeout(timeout_s)))
        return reply.deleted

    async def delete_all(self, *, timeout_s: float | None = None) -> int:
        """Removes every record of the node; returns how many there were."""
        timeout = self._config.get_timeout_s if timeout_s is None else timeout_s
        with self._answering():
            reply = whole(await self._stub.Delete(pb.DeleteRequest(all=True), timeout=timeout))
        return reply.deleted

    async def stats(self, *, timeout_s: float | None = None) -> NodeStats:
        """Counters and sizes of the node."""
        with self._answering():
            reply = whole(await self._stub.Stats(pb.StatsRequest(), timeout=self._unary_timeout(timeout_s)))
        return node_stats(reply)

    async def put_many(
        self, records: Sequence[tuple[bytes, bytes]], *, timeout_s: float | None = None
    ) -> list[PutManyOutcome]:
        """Stores encoded records, given as (key, record); by record, what came of it.

        Small ones go several in a message, in one call; those over 1 MiB one by one. Unlike `put`, a record
        that is refused raises nothing. Raises StoreUnavailable when the node does not answer: then some of the
        records may have been stored.
        """
        _checked_keys([key for key, _ in records])
        timeout = self._config.put_timeout_s if timeout_s is None else timeout_s
        with self._answering():
            outcomes = await self._putter.put_many(records, timeout_s=timeout)
        for index, (key, record) in enumerate(records):
            if outcomes.get(index) is PutManyOutcome.STORED:
                self.counters.bytes_written += len(record)
            elif index not in outcomes:
                outcomes[index] = await self._put_one(key, record, timeout)
        return [outcomes[index] for index in range(len(records))]

    async def pin(self, keys: Sequence[bytes], *, timeout_s: float | None = None) -> list[bool]:
        """Keeps records from eviction until `unpin`; by key, whether it is pinned now.

        False where the record is not in the store, or the pins' share of the node is used up. Raises
        InvalidRequest when the node's backend cannot pin.
        """
        return await self._pin(keys, unpin=False, timeout_s=timeout_s)

    async def unpin(self, keys: Sequence[bytes], *, timeout_s: float | None = None) -> list[bool]:
        """Ends pins; by key, whether there was one."""
        return await self._pin(keys, unpin=True, timeout_s=timeout_s)

    async def list_records(self, *, page_size: int = 0, timeout_s: float | None = None) -> AsyncGenerator[ListedRecord]:
        """Every record of the node, page by page, tier by tier; one that two tiers hold comes twice."""
        token = b""
        while True:
            request = pb.ListRequest(page_token=token, page_size=page_size)
            with self._answering():
                reply = whole(
                    await self._stub.List(
                        request, timeout=self._config.put_timeout_s if timeout_s is None else timeout_s
                    )
                )
            for entry in reply.entries:
                yield listed_record(entry)
            token = reply.next_page_token
            if not token:
                return

    async def close(self) -> None:
        """Cancels running calls and closes the connection. Safe to call twice."""
        if self._prober is not None:
            self._prober.cancel()
            await asyncio.gather(self._prober, return_exceptions=True)
        await self._channel.close()
        self._getter.close()
        self._putter.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _unary_timeout(self, timeout_s: float | None) -> float:
        return self._config.lookup_timeout_s if timeout_s is None else timeout_s

    @contextmanager
    def _answering(self, *, exhausted: type[KVStoreError] = StoreUnavailable) -> Iterator[None]:
        """Asks the breaker before a call, tells it the outcome, and translates status codes."""
        if not self._breaker.allows_call():
            self.counters.refused += 1
            raise StoreUnavailable(f"the store at {self._config.address} did not answer lately; not asking it")
        try:
            yield
        except grpc.aio.AioRpcError as error:
            translated = translate(error, self._config.address, exhausted)
            self._record(translated)
            raise translated from error
        except KVStoreError as error:
            self._record(error)
            raise
        else:
            self._breaker.record_success()

    def _record(self, error: KVStoreError) -> None:
        if isinstance(error, BlockNotFound):
            self.counters.not_found += 1
        if isinstance(error, BlockCorrupt):
            self.counters.corrupt += 1
        if not isinstance(error, StoreUnavailable):
            self._breaker.record_success()
            return
        self.counters.failures += 1
        self._breaker.record_failure()
        if not self._breaker.allows_call() and (self._prober is None or self._prober.done()):
            self._prober = asyncio.create_task(self._probe(), name="kvstore-probe")

    async def _probe(self) -> None:
        """Asks for stats once a cool-down until the node answers: that reaches its backend, too."""
        while not self._breaker.allows_call():
            await asyncio.sleep(self._config.cool_down_s)
            if not self._breaker.try_probe():
                continue
            try:
                await self._stub.Stats(pb.StatsRequest(), timeout=self._config.lookup_timeout_s)
            except grpc.aio.AioRpcError:
                self._breaker.record_failure()
            else:
                self._breaker.record_success()

    async def _put_one(self, key: bytes, record: bytes, timeout_s: float) -> PutManyOutcome:
        try:
            stored = await self.put(key, record, timeout_s=timeout_s)
        except StoreFull:
            return PutManyOutcome.FULL
        except BlockCorrupt:
            return PutManyOutcome.CORRUPT
        return PutManyOutcome.STORED if stored else PutManyOutcome.EXISTED

    async def _pin(self, keys: Sequence[bytes], *, unpin: bool, timeout_s: float | None) -> list[bool]:
        request = pb.PinRequest(keys=_checked_keys(keys), unpin=unpin)
        timeout = self._config.put_timeout_s if timeout_s is None else timeout_s
        with self._answering():
            reply = whole(await self._stub.Pin(request, timeout=timeout))
            if len(reply.changed) != len(keys):
                raise StoreUnavailable("the node did not say what came of every key")
        return list(reply.changed)

    async def _delete_damaged(self, key: bytes) -> None:
        with suppress(StoreUnavailable):  # then the next reader finds it damaged again
            await self.delete([key])


def _checked_keys(keys: Sequence[bytes]) -> list[bytes]:
    if not 1 <= len(keys) <= DEFAULT_MAX_KEYS:
        raise InvalidRequest(f"a call must name 1 to {DEFAULT_MAX_KEYS} keys, not {len(keys)}")
    if any(type(key) is not bytes or len(key) != KEY_BYTES for key in keys):
        raise InvalidRequest(f"every key must be {KEY_BYTES} bytes")
    return list(keys)
