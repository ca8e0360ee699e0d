"""The decode worker's end of a Prefill stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

import grpc

from kvferry.decode.prefill_peers import PrefillPeer
from kvferry.proto import worker_pb2, worker_pb2_grpc
from kvferry.proto.attempts import is_draining
from kvferry.proto.trailing_metadata import retry_after_ms


class PrefillFailed(Exception):
    """The prefill worker refused the request, failed or is gone. `code` is the status to pass on, `retry_after_ms` the
    worker's hint when it is full ("" without one). `draining`: it takes no new requests, as it is about to end."""

    def __init__(
        self, code: grpc.StatusCode, message: str, *, retry_after_ms: str = "", draining: bool = False
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_ms = retry_after_ms
        self.draining = draining


class PrefillStream(Protocol):
    """One request's exchange with a prefill worker, wherever that is. Close it.

    Every method raises PrefillFailed when the worker fails.
    """

    async def start(self) -> None:
        """Sends the request."""
        ...

    def close(self) -> None:
        """Ends the exchange, which releases the request's blocks on the worker. Safe to call twice."""
        ...

    async def ask(self, indices: list[int]) -> None:
        """Asks for blocks that the store does not give."""
        ...

    async def done(self) -> None:
        """Tells the worker that nothing more will be asked for."""
        ...

    def events(self) -> AsyncIterator[worker_pb2.PrefillEvent]:
        """The worker's events up to the last one."""
        ...


class RemotePrefillStream:
    """`PrefillStream` over gRPC. Ends with UNAVAILABLE when the worker falls silent, however long it computes."""

    def __init__(self, peer: PrefillPeer, start: worker_pb2.PrefillStart, *, timeout_s: float) -> None:
        self._peer = peer
        self._start = start
        stub = worker_pb2_grpc.PrefillStub(peer.channel)
        self._call = stub.Prefill(timeout=timeout_s)
        self._write_lock = asyncio.Lock()
        self._lost = False
        peer.watch(self._give_up)

    async def start(self) -> None:
        await self._write(worker_pb2.PrefillCommand(start=self._start))

    def close(self) -> None:
        self._peer.unwatch(self._give_up)
        self._call.cancel()

    async def ask(self, indices: list[int]) -> None:
        send = worker_pb2.SendBlocks(indices=indices)
        await self._write(worker_pb2.PrefillCommand(send_blocks=send))

    async def done(self) -> None:
        try:
            await self._call.done_writing()
        except asyncio.CancelledError as error:
            raise self._cancelled(error) from None

    async def events(self) -> AsyncIterator[worker_pb2.PrefillEvent]:
        try:
            async for event in self._call:
                yield event
        except asyncio.CancelledError as error:
            raise self._cancelled(error) from None
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from error

    async def _write(self, command: worker_pb2.PrefillCommand) -> None:
        try:
            async with self._write_lock:
                await self._call.write(command)
        except asyncio.CancelledError as error:
            raise self._cancelled(error) from None
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from error
        except asyncio.InvalidStateError as error:  # the call has ended; its status says why
            if self._lost:
                raise self._silent() from None
            code = await self._call.code()
            details = await self._call.details()
            raise PrefillFailed(code, f"prefill worker {self._peer.address}: {details}") from error

    def _give_up(self) -> None:
        self._lost = True
        self._call.cancel()

    def _cancelled(self, error: asyncio.CancelledError) -> BaseException:
        """Whether we gave up, or are cancelled ourselves."""
        task = asyncio.current_task()
        return self._silent() if self._lost and not (task and task.cancelling()) else error

    def _silent(self) -> PrefillFailed:
        message = f"prefill worker {self._peer.address}: it is silent"
        return PrefillFailed(grpc.StatusCode.UNAVAILABLE, message)

    def _failure(self, error: grpc.aio.AioRpcError) -> PrefillFailed:
        return PrefillFailed(
            error.code(),
            f"prefill worker {self._peer.address}: {error.details()}",
            retry_after_ms=retry_after_ms(error.trailing_metadata()),
            draining=is_draining(error),
        )
