"""Both roles in one process: a Prefill call that stays in memory.

The decode worker talks to the `PrefillServicer` beside it as to any other, with the same messages, limits and statuses;
only the socket is missing. Blocks come from here even when the store has them, too: that is nearer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc

from kvferry.decode.prefill_stream import PrefillFailed
from kvferry.prefill.server import PrefillServicer
from kvferry.proto import worker_pb2
from kvferry.proto.attempts import DRAINING_KEY
from kvferry.proto.trailing_metadata import Metadata, retry_after_ms

MAX_EVENTS_AHEAD = 64
"""Events, of at most 1 MiB each, that prefill may be ahead of decode."""


class _Aborted(Exception):
    def __init__(self, code: grpc.StatusCode, details: str, trailing_metadata: Metadata) -> None:
        super().__init__(details)
        self.code = code
        self.retry_after_ms = retry_after_ms(trailing_metadata)
        self.draining = any(key == DRAINING_KEY for key, _ in trailing_metadata or ())


class _Context:
    """The server's side of the call: what `PrefillServicer.Prefill` uses of a gRPC context."""

    def __init__(self, timeout_s: float) -> None:
        self._ends = time.monotonic() + timeout_s
        self.commands: asyncio.Queue[object] = asyncio.Queue()
        self.events: asyncio.Queue[worker_pb2.PrefillEvent | None] = asyncio.Queue(MAX_EVENTS_AHEAD)

    def time_remaining(self) -> float:
        return max(self._ends - time.monotonic(), 0.0)

    async def read(self) -> object:
        return await self.commands.get()

    async def write(self, event: worker_pb2.PrefillEvent) -> None:
        if event.WhichOneof("event") == "block_ready":
            event = worker_pb2.PrefillEvent(block_ready=worker_pb2.BlockReady(index=event.block_ready.index))
        await self.events.put(event)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        raise _Aborted(code, details, trailing_metadata)

    async def send_initial_metadata(self, metadata: object) -> None:
        """There is none here."""


class LocalPrefillStream:
    """`PrefillStream` to a servicer in this process and on this event loop."""

    def __init__(self, servicer: PrefillServicer, start: worker_pb2.PrefillStart, timeout_s: float) -> None:
        self._servicer = servicer
        self._start = start
        self._timeout_s = timeout_s
        self._context = _Context(timeout_s)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._context.commands.put_nowait(worker_pb2.PrefillCommand(start=self._start))
        self._task = asyncio.create_task(self._run())

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def ask(self, indices: list[int]) -> None:
        send = worker_pb2.SendBlocks(indices=indices)
        self._context.commands.put_nowait(worker_pb2.PrefillCommand(send_blocks=send))

    async def done(self) -> None:
        self._context.commands.put_nowait(grpc.aio.EOF)

    async def events(self) -> AsyncIterator[worker_pb2.PrefillEvent]:
        assert self._task is not None, "start first"
        while (event := await self._next(self._task)) is not None:
            yield event
        try:
            await self._task
        except _Aborted as error:
            raise PrefillFailed(
                error.code, f"prefill: {error}", retry_after_ms=error.retry_after_ms, draining=error.draining
            ) from error
        except TimeoutError as error:
            message = f"prefill: not done within {self._timeout_s:.1f} s"
            raise PrefillFailed(grpc.StatusCode.DEADLINE_EXCEEDED, message) from error

    async def _next(self, task: asyncio.Task[None]) -> worker_pb2.PrefillEvent | None:
        """The next event; None when the call has ended and all its events are taken."""
        if self._context.events.empty() and not task.done():
            event = asyncio.ensure_future(self._context.events.get())
            try:
                await asyncio.wait([event, task], return_when=asyncio.FIRST_COMPLETED)
                if event.done():
                    return event.result()
            finally:
                event.cancel()
        return None if self._context.events.empty() else self._context.events.get_nowait()

    async def _run(self) -> None:
        context: Any = self._context
        async with asyncio.timeout(self._timeout_s):
            await self._servicer.Prefill(_no_messages(), context)


async def _no_messages() -> AsyncIterator[worker_pb2.PrefillCommand]:
    """The servicer reads from its context."""
    return
    yield
