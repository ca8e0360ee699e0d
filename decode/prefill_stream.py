"""The decode worker's end of a Prefill stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

import grpc

from kvferry.proto import worker_pb2, worker_pb2_grpc
from kvferry.proto.grpc_options import channel_options
from kvferry.proto.trailing_metadata import retry_after_ms


class PrefillFailed(Exception):
    """The prefill worker refused the request, failed or is gone. `code` is the status to pass on, `retry_after_ms` the
    worker's hint when it is full ("" without one)."""

    def __init__(self, code: grpc.StatusCode, message: str, *, retry_after_ms: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_ms = retry_after_ms


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


class PrefillChannels:
    """One channel for each prefill worker address, kept open."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    def get(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(address, options=channel_options(ping_while_idle=True))
        return self._channels[address]

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()


class RemotePrefillStream:
    """`PrefillStream` over gRPC."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        address: str,
        start: worker_pb2.PrefillStart,
        *,
        timeout_s: float,
    ) -> None:
        self._address = address
        self._start = start
        stub = worker_pb2_grpc.PrefillStub(channel)
        self._call = stub.Prefill(timeout=timeout_s)
        self._write_lock = asyncio.Lock()

    async def start(self) -> None:
        await self._write(worker_pb2.PrefillCommand(start=self._start))

    def close(self) -> None:
        self._call.cancel()

    async def ask(self, indices: list[int]) -> None:
        send = worker_pb2.SendBlocks(indices=indices)
        await self._write(worker_pb2.PrefillCommand(send_blocks=send))

    async def done(self) -> None:
        await self._call.done_writing()

    async def events(self) -> AsyncIterator[worker_pb2.PrefillEvent]:
        try:
            async for event in self._call:
                yield event
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from error

    async def _write(self, command: worker_pb2.PrefillCommand) -> None:
        try:
            async with self._write_lock:
                await self._call.write(command)
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from error
        except asyncio.InvalidStateError as error:  # the call has ended; its status says why
            code = await self._call.code()
            details = await self._call.details()
            raise PrefillFailed(code, f"prefill worker {self._address}: {details}") from error

    def _failure(self, error: grpc.aio.AioRpcError) -> PrefillFailed:
        message = f"prefill worker {self._address}: {error.details()}"
        return PrefillFailed(error.code(), message, retry_after_ms=retry_after_ms(error.trailing_metadata()))
