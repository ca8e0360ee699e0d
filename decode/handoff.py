"""Takes one prompt over from prefill: first token, blocks and tail, while prefill still runs."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import grpc

from kvferry.decode.fetch import BlockFetcher
from kvferry.decode.prefill_stream import PrefillFailed, PrefillStream
from kvferry.kvstore.errors import KVStoreError
from kvferry.proto import worker_pb2


class HandoffReceiver:
    """Reads a Prefill stream and feeds the fetcher. Entering the context starts the prefill; leaving it stops
    whatever of it is still running. Every method raises PrefillFailed when the prefill worker fails."""

    def __init__(self, stream: PrefillStream, fetcher: BlockFetcher) -> None:
        self._stream = stream
        self._fetcher = fetcher
        self._first: asyncio.Future[list[worker_pb2.TokenChunk]] = asyncio.Future()
        self._tail: asyncio.Future[bytes] = asyncio.Future()
        self._so_far: asyncio.Future[worker_pb2.PrefillUsage] = asyncio.Future()
        self._finished: asyncio.Future[worker_pb2.PrefillUsage] = asyncio.Future()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        try:
            await self._stream.start()
        except BaseException:
            self._stream.close()
            raise
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._fetcher.run())]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def first_tokens(self, n: int) -> list[worker_pb2.TokenChunk]:
        """The tokens that prefill sampled, one for each answer; the blocks may still be on the way."""
        await self._until(self._first)
        tokens = self._first.result()
        if len(tokens) != n:
            message = f"the prefill worker sampled {len(tokens)} first tokens where {n} were asked for"
            raise PrefillFailed(grpc.StatusCode.INTERNAL, message)
        return tokens

    async def complete(self, tail_bytes: int) -> bytes:
        """Waits until every block is in the pool; returns the tail, which must have `tail_bytes`."""
        await self._until(self._tail)
        if len(self._tail.result()) != tail_bytes:
            raise PrefillFailed(grpc.StatusCode.UNAVAILABLE, "the prefill worker sent a tail of another length")
        await self._until(self._tasks[1])
        await self._stream.done()
        return self._tail.result()

    def account(self) -> worker_pb2.PrefillUsage:
        """Prefill's account of the request as far as it is known now; what is still being published may lack."""
        for known in (self._finished, self._so_far):
            if known.done() and not known.cancelled() and known.exception() is None:
                return known.result()
        return worker_pb2.PrefillUsage()

    async def finished(self, timeout_s: float) -> worker_pb2.PrefillUsage:
        """Prefill's whole account, or after `timeout_s`, or when prefill is gone, what is known of it: the answer
        is complete and must neither wait nor fail for want of an account."""
        with suppress(TimeoutError, PrefillFailed):
            async with asyncio.timeout(timeout_s):
                await self._until(self._finished)
        return self.account()

    async def _until(self, wanted: asyncio.Future[Any]) -> None:
        """Waits for `wanted`; raises instead when one of the tasks fails before, or nothing more can come."""
        reader, _ = self._tasks
        while not wanted.done():
            pending = [task for task in self._tasks if not task.done()]
            await asyncio.wait([wanted, *pending], return_when=asyncio.FIRST_COMPLETED)
            for task in self._tasks:
                if task.done():
                    task.result()
            if reader.done() and not wanted.done():
                raise PrefillFailed(grpc.StatusCode.UNAVAILABLE, "the prefill worker ended its stream too early")

    def _receive(self, frame: worker_pb2.BlockFrame) -> None:
        try:
            self._fetcher.receive(frame.index, frame.record_bytes, frame.chunk)
        except KVStoreError as error:
            message = f"the prefill worker sent a damaged block: {error}"
            raise PrefillFailed(grpc.StatusCode.UNAVAILABLE, message) from error

    async def _read(self) -> None:
        tail, tail_bytes = bytearray(), -1
        async for event in self._stream.events():
            match event.WhichOneof("event"):
                case "block_ready":
                    ready = event.block_ready
                    self._fetcher.announce(ready.index, in_store=ready.in_store)
                case "block":
                    self._receive(event.block)
                case "handoff":
                    tail_bytes = event.handoff.tail_bytes
                    self._so_far.set_result(event.handoff.usage)
                    self._first.set_result([event.handoff.first_token, *event.handoff.other_first_tokens])
                case "tail_chunk":
                    tail += event.tail_chunk
                    if len(tail) > tail_bytes:
                        raise PrefillFailed(grpc.StatusCode.UNAVAILABLE, "the prefill worker sent too long a tail")
                case "finished":
                    self._finished.set_result(event.finished)
            if len(tail) == tail_bytes and not self._tail.done():
                self._tail.set_result(bytes(tail))
