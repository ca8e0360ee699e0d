"""A prefill worker that falls silent is told from one that computes for long, with the connection up in both cases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from kvferry.decode.prefill_peers import PrefillPeers
from kvferry.decode.prefill_stream import PrefillFailed, RemotePrefillStream
from kvferry.proto import worker_pb2, worker_pb2_grpc
from kvferry.proto.grpc_options import server_options

LIMIT_S = 30.0


class SilentPrefill(worker_pb2_grpc.PrefillServicer, worker_pb2_grpc.WorkerServicer):
    """Computes until `done`; whether it says that it is there is up to `answers`."""

    def __init__(self) -> None:
        self.answers = True
        self.done = asyncio.Event()
        self.num_asked = 0
        self.num_cancelled = 0

    async def Describe(self, request: Any, context: Any) -> worker_pb2.WorkerInfo:
        self.num_asked += 1
        if not self.answers:
            await asyncio.Event().wait()
        return worker_pb2.WorkerInfo()

    async def Prefill(self, commands: Any, context: Any) -> AsyncIterator[worker_pb2.PrefillEvent]:  # type: ignore[override]
        try:
            await self.done.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        yield worker_pb2.PrefillEvent(finished=worker_pb2.PrefillUsage())


@pytest.fixture
async def worker() -> AsyncIterator[tuple[SilentPrefill, str]]:
    servicer = SilentPrefill()
    server = grpc.aio.server(options=server_options())
    worker_pb2_grpc.add_PrefillServicer_to_server(servicer, server)
    worker_pb2_grpc.add_WorkerServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield servicer, f"127.0.0.1:{port}"
    await server.stop(0)


async def read(stream: RemotePrefillStream) -> list[str | None]:
    await stream.start()
    return [event.WhichOneof("event") async for event in stream.events()]


async def test_a_silent_worker_is_given_up(worker: tuple[SilentPrefill, str]) -> None:
    servicer, address = worker
    servicer.answers = False
    peers = PrefillPeers()
    stream = RemotePrefillStream(peers.get(address), worker_pb2.PrefillStart(), timeout_s=10 * LIMIT_S)
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(PrefillFailed, match="silent") as caught:
            await read(stream)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert peers.num_lost == 1
    stream.close()
    async with asyncio.timeout(LIMIT_S):
        while not servicer.num_cancelled:
            await asyncio.sleep(0.01)
    await peers.close()


async def test_a_long_computation_is_waited_for(worker: tuple[SilentPrefill, str]) -> None:
    servicer, address = worker
    peers = PrefillPeers()
    stream = RemotePrefillStream(peers.get(address), worker_pb2.PrefillStart(), timeout_s=10 * LIMIT_S)
    reading = asyncio.create_task(read(stream))
    async with asyncio.timeout(LIMIT_S):
        while servicer.num_asked < 5:  # the control: it was asked for longer than a silent one is waited for
            await asyncio.sleep(0.05)
    assert not reading.done()
    servicer.done.set()
    assert await reading == ["finished"]
    stream.close()
    assert peers.num_lost == 0
    asked = servicer.num_asked
    await asyncio.sleep(1.2)
    assert servicer.num_asked == asked  # nobody waits, nobody asks
    await peers.close()


async def test_our_own_cancel_is_no_silence(worker: tuple[SilentPrefill, str]) -> None:
    _, address = worker
    peers = PrefillPeers()
    stream = RemotePrefillStream(peers.get(address), worker_pb2.PrefillStart(), timeout_s=10 * LIMIT_S)
    reading = asyncio.create_task(read(stream))
    await asyncio.sleep(0.3)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    stream.close()
    await peers.close()
