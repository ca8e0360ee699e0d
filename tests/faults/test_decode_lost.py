"""A decode worker that is lost in the middle of an answer: the answer goes on elsewhere, token by token the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from support.decode_calls import Inside
from support.relay import Relay

from kvferry.deploy.assembly import make_gateway
from kvferry.deploy.client import AsyncClient, Chunk
from kvferry.deploy.gateway_server import GatewayServer
from kvferry.deploy.settings import Settings
from kvferry.deploy.worker_server import ModelRuntime

NUM_TOKENS = 40
LIMIT_S = 60.0


class Cluster:
    """A gateway, two decode workers of which the first is reached through a relay, and their prefill worker."""

    def __init__(self, one: Any, other: Any, settings: Settings) -> None:
        self._one, self._other, self._settings = one, other, settings
        self._stack = AsyncExitStack()

    async def close(self) -> None:
        await self._stack.aclose()

    async def gateway(self) -> tuple[GatewayServer, AsyncClient, Relay]:
        """A new one; the one before is closed."""
        await self.close()
        relay = Relay()
        await relay.start(self._one.decode_address)
        self._stack.push_async_callback(relay.stop)
        gateway = await make_gateway(
            self._settings, prefill=[self._one.prefill_address], decode=[relay.address, self._other.decode_address]
        )
        port = await gateway.start()
        self._stack.push_async_callback(gateway.stop, 0)
        await gateway.wait_until_serving(30)
        async with asyncio.timeout(30):
            while len(gateway._pool.pairs()) < 2:
                await asyncio.sleep(0.01)
        client = await self._stack.enter_async_context(AsyncClient(f"127.0.0.1:{port}"))
        return gateway, client, relay


@pytest.fixture
async def cluster(runtime: Callable[..., ModelRuntime], serve_workers: Any) -> AsyncIterator[Cluster]:
    worker = runtime("llama")
    one, other = await serve_workers(worker), await serve_workers(worker)
    settings = Settings.load(model=worker.loaded.source.path, gateway={"port": 0})
    cluster = Cluster(one, other, settings)
    yield cluster
    await cluster.close()
    for workers in (one, other):
        await Inside.of(workers).assert_all_free()


async def collect(client: AsyncClient, at: int, then: Callable[[], None], **options: Any) -> list[Chunk]:
    chunks = []
    async with asyncio.timeout(LIMIT_S):
        async for chunk in client.stream("Once upon a time", max_tokens=NUM_TOKENS, ignore_eos=True, **options):
            chunks.append(chunk)
            if len(chunks) == at:
                then()
    return chunks


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="greedy", marks=pytest.mark.deep),
        pytest.param({"temperature": 0.9, "seed": 4, "frequency_penalty": 0.5}, id="sampled"),
    ],
)
async def test_decode_lost_at_any_token(cluster: Cluster, options: dict[str, Any]) -> None:
    """Nobody chose the worker that is lost, so both are tried: about half of the rounds lose it."""
    gateway, client, _ = await cluster.gateway()
    oracle = await collect(client, 0, lambda: None, **options)
    expected = [token for chunk in oracle for token in chunk.token_ids]
    text = "".join(chunk.text for chunk in oracle)
    num_moved = 0
    for at in (1, 2, 3, 7, 16, 31, 32, 33, NUM_TOKENS - 1):
        for _ in range(4):  # until the answer was on the worker behind the relay
            gateway, client, relay = await cluster.gateway()
            used = [w for w in gateway._pool._workers.values() if w.address == relay.address]
            lost: list[bool] = []

            def cut(relay: Relay = relay, used: list[Any] = used, lost: list[bool] = lost) -> None:
                lost.append(used[0].num_outstanding > 0)
                relay.cut()

            chunks = await collect(client, at, cut, **options)
            assert [token for chunk in chunks for token in chunk.token_ids] == expected
            assert [chunk.index for chunk in chunks] == list(range(NUM_TOKENS))
            assert "".join(chunk.text for chunk in chunks) == text
            if lost == [True]:
                num_moved += 1
                break
    assert num_moved >= 7
