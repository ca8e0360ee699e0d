"""Takes one prompt over from prefill: first token, blocks and tail, while prefill still runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

import grpc

from kvferry.decode.fetch import BlockFetcher
from kvferry.decode.prefill_stream import PrefillFailed, PrefillStream
from kvferry.decode.tail import IncomingTail
from kvferry.kvstore.errors import KVStoreError
from kvferry.proto import worker_pb2


class HandoffReceiver:
    """Reads a Prefill stream and feeds the fetcher. Entering the context starts the prefill; leaving it stops
    whatever of it is still running. Every method raises PrefillFailed when the prefill worker fails."""

    def __init__(
        self, stream: PrefillStream, fetcher: BlockFetcher, *, num_blocks: int, num_layers: int, tail_bytes: int
    ) -> None:
        """`num_blocks`: complete ones of the prompt; `tail_bytes`: of the incomplete one, in all layers."""
        self._num_blocks = num_blocks
        self._tail_bytes = tail_bytes
        self._incoming_tail = IncomingTail(num_layers=num_layers, tail_bytes=tail_bytes)
        self._stream = stream
        self._fetcher = fetcher
        self._first: asyncio.Future[list[worker_pb2.TokenChunk]] = asyncio.Future()
        self._tail: asyncio.Future[bytes] = asyncio.Future()
        self._handed_over_at = self._tail_at = 0.0
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

    async def complete(self) -> bytes:
        """Waits until every block is in the pool; returns the tail."""
        await self._until(self._tail)
        await self._until(self._tasks[1])
        await self._stream.done()
        return self._tail.result()

    @property
    def transfer_seconds(self) -> float:
        """How long this worker waited for blocks and tail after the handoff message; 0 when they came before it. Ask
        after `complete`."""
        done_at = max(self._fetcher.completed_at or 0.0, self._tail_at)
        return max(done_at - self._handed_over_at, 0.0)

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

    async def _read(self) -> None:
        async for event in self._stream.events():
            try:
                self._take(event)
            except KVStoreError as error:
                message = f"the prefill worker sent a damaged block: {error}"
                raise PrefillFailed(grpc.StatusCode.UNAVAILABLE, message) from error
            if not self._tail.done() and self._handed_over_at and (tail := self._incoming_tail.whole) is not None:
                self._tail_at = time.monotonic()
                self._tail.set_result(tail)

    def _take(self, event: worker_pb2.PrefillEvent) -> None:
        match event.WhichOneof("event"):
            case "block_ready":
                ready = event.block_ready
                self._fetcher.announce(ready.index, in_store=ready.in_store)
            case "block":
                self._fetcher.receive(event.block.index, event.block.record_bytes, event.block.chunk)
            case "pieces":
                for piece in event.pieces.pieces:
                    if piece.index == self._num_blocks:
                        with _tail_problem():
                            self._incoming_tail.append_piece(piece.offset, piece.data, piece.crc32)
                    else:
                        self._fetcher.receive_piece(piece.index, piece.offset, piece.data, piece.crc32)
            case "seal":
                if event.seal.index == self._num_blocks:
                    with _tail_problem():
                        self._incoming_tail.seal(event.seal.checksum)
                else:
                    self._fetcher.seal(event.seal.index, event.seal.checksum)
            case "handoff":
                self._handed_over_at = time.monotonic()
                if event.handoff.tail_bytes != self._tail_bytes:
                    message = "the prefill worker announced a tail of another length"
                    raise PrefillFailed(grpc.StatusCode.UNAVAILABLE, message)
                self._so_far.set_result(event.handoff.usage)
                self._first.set_result([event.handoff.first_token, *event.handoff.other_first_tokens])
            case "tail_chunk":
                with _tail_problem():
                    self._incoming_tail.append_chunk(event.tail_chunk)
            case "finished":
                self._finished.set_result(event.finished)


@contextmanager
def _tail_problem() -> Iterator[None]:
    """A tail is in no store, and prefill is asked for it once: what is wrong with it ends the request."""
    try:
        yield
    except ValueError as error:
        message = f"the prefill worker sent a damaged tail: {error}"
        raise PrefillFailed(grpc.StatusCode.UNAVAILABLE, message) from error
