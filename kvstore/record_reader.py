"""Reads the records of one Get ahead of the caller: the next ones come and are checked while it uses one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Protocol

import grpc.aio

from kvferry.kvstore.codec import Buffer, Record
from kvferry.kvstore.errors import BlockCorrupt, KVStoreError, StoreUnavailable
from kvferry.kvstore.record_stream import RecordAssembler

# A reader holds so many records beside the one that the caller has.
_RECORDS_AHEAD = 2


class Read(NamedTuple):
    """A record that has come."""

    num_bytes: int
    outcome: Record | BlockCorrupt | Awaitable[Record]
    """Of its check; one that is running still raises BlockCorrupt."""

    async def checked(self) -> Record:
        """The record. Raises BlockCorrupt."""
        if isinstance(self.outcome, BlockCorrupt):
            raise self.outcome
        return self.outcome if isinstance(self.outcome, Record) else await self.outcome


class Reader(Protocol):
    """One running get, over gRPC (`RecordReader`) or the bulk port (`BulkReader`)."""

    async def next(self) -> Sequence[Read]:
        """The next records in order, one or more. Raises what ended the get before them."""
        ...

    async def close(self) -> None:
        """Ends the get and forgets what was read ahead."""
        ...


class RecordReader:
    """One running Get call. `check` verifies a record, given its bytes and its key; close the reader when done."""

    def __init__(
        self,
        call: Any,
        keys: Sequence[bytes],
        check: Callable[[Buffer, bytes], Awaitable[Record]],
        *,
        max_record_bytes: int,
        progress_timeout_s: float,
    ) -> None:
        self._call = call
        self._keys = keys
        self._check = check
        self._assembler = RecordAssembler(num_keys=len(keys), max_record_bytes=max_record_bytes)
        self._progress_timeout_s = progress_timeout_s
        self._ahead: asyncio.Queue[Read | Exception] = asyncio.Queue(_RECORDS_AHEAD)
        self._task = asyncio.create_task(self._read_all(), name="kvstore-read-ahead")

    async def next(self) -> Sequence[Read]:
        """See `Reader`: one, with its running check."""
        item = await self._ahead.get()
        if isinstance(item, Exception):
            raise item
        return (item,)

    async def close(self) -> None:
        """Cancels the call and forgets what was read ahead."""
        self._call.cancel()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        while not self._ahead.empty():
            item = self._ahead.get_nowait()
            if isinstance(item, Read):
                assert isinstance(item.outcome, asyncio.Future)
                item.outcome.cancel()
                await asyncio.gather(item.outcome, return_exceptions=True)

    async def _read_all(self) -> None:
        try:
            for key in self._keys:
                buffer = await self._next_buffer()
                check = asyncio.ensure_future(self._check(buffer, key))
                try:
                    await self._ahead.put(Read(len(buffer), check))
                except asyncio.CancelledError:
                    check.cancel()
                    raise
        except (grpc.aio.AioRpcError, KVStoreError) as error:
            await self._ahead.put(error)

    async def _next_buffer(self) -> Buffer:
        while True:
            try:
                async with asyncio.timeout(self._progress_timeout_s):
                    frame = await self._call.read()
            except TimeoutError:
                raise StoreUnavailable(f"the store sent nothing for {self._progress_timeout_s} s") from None
            if frame is grpc.aio.EOF:
                raise StoreUnavailable("the node's stream ended before its last record")
            buffer = self._assembler.add(frame)
            if buffer is not None:
                return buffer
