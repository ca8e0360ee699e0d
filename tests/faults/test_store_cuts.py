"""The way to the store broken after every number of bytes: its node killed, its connections cut, a bit of it flipped.

A few places in every run; with `KVFERRY_DEEP` (`make test-deep`) hundreds. The oracle is the request without a store.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from support.decode_calls import Inside
from support.fault_relay import Direction, FaultRelay
from support.processes import NodeProcess

from kvferry.deploy.worker_server import ModelRuntime
from kvferry.kvstore.breaker import BreakerState
from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.codec import verify_record
from kvferry.kvstore.config import ClientConfig, NodeConfig
from kvferry.kvstore.identity import namespace_of
from kvferry.kvstore.key import block_keys
from kvferry.kvstore.lease import LeaseTable
from kvferry.kvstore.memory_backend import MemoryBackend
from kvferry.kvstore.server import KVStoreServer

IS_DEEP = "KVFERRY_DEEP" in os.environ
BLOCK_SIZE = 32
NUM_BLOCKS = 12
PROMPT_TOKENS = NUM_BLOCKS * BLOCK_SIZE + 9
LIMIT_S = 30.0
"""Generous: a request that hangs fails, a slow machine does not."""
PHASES: tuple[tuple[bool, Direction], ...] = ((False, "up"), (True, "down"), (True, "up"), (False, "down"))
"""Whether the store has the prefix before the request, and whose bytes are counted: what a put sends, what a get sends,
what a look-up and a get ask, what a put is answered."""


@pytest.fixture
def worker(runtime: Callable[[str], ModelRuntime]) -> ModelRuntime:
    return runtime("llama")


@pytest.fixture
async def relay() -> AsyncIterator[FaultRelay]:
    relay = FaultRelay()
    await relay.start()
    yield relay
    await relay.stop()


def store_client(address: str) -> StoreClient:
    return StoreClient(ClientConfig(address=address, lookup_timeout_s=5.0))


class Requests:
    """The same request again and again, to workers that reach their store through a relay."""

    def __init__(self, worker: ModelRuntime, workers: Any, token_ids: list[int], oracle: list[int]) -> None:
        self._workers, self._token_ids, self._oracle = workers, token_ids, oracle
        namespace = namespace_of(worker.identity, tenant="default", block_size=BLOCK_SIZE)
        self.namespace, self.keys = namespace.digest(), block_keys(namespace, token_ids)

    async def ask(self) -> Any:
        """One request: right, in time, and nothing left of it in the workers."""
        async with asyncio.timeout(2 * LIMIT_S):
            answer = await self._workers.generate(self._token_ids, timeout=LIMIT_S)
            assert answer.tokens == self._oracle
            while self._workers.prefill_server.prefill_servicer.num_requests:
                await asyncio.sleep(0.01)  # it goes on publishing for a moment
        await Inside.of(self._workers).assert_all_free()
        return answer

    @property
    def clients(self) -> list[StoreClient]:
        return [self._workers.prefill_server._store, self._workers.decode_server._store]

    @property
    def num_corrupt(self) -> int:
        """Records that the workers refused."""
        return sum(client.counters.corrupt for client in self.clients)

    async def until_the_store_is_used(self) -> None:
        """The breakers close by themselves."""
        async with asyncio.timeout(LIMIT_S):
            while any(client.breaker_state is not BreakerState.CLOSED for client in self.clients):
                await asyncio.sleep(0.02)


@pytest.fixture
async def requests(worker: ModelRuntime, relay: FaultRelay, serve_workers: Any, make_prompt: Any) -> Requests:
    token_ids = make_prompt(PROMPT_TOKENS)
    oracle = (await (await serve_workers(worker)).generate(token_ids)).tokens
    return Requests(worker, await serve_workers(worker, relay.address), token_ids, oracle)


async def bytes_by_phase(
    relay: FaultRelay, requests: Requests, prepare: Callable[[bool], Any]
) -> dict[tuple[bool, Direction], int]:
    """The control: what each phase moves while nothing breaks, and that it moves it."""
    sizes = {}
    for is_warm in (False, True):
        await prepare(is_warm)
        relay.watch()
        answer = await requests.ask()
        assert answer.num_cached_tokens == (NUM_BLOCKS * BLOCK_SIZE if is_warm else 0)
        for direction in ("up", "down"):
            sizes[is_warm, direction] = relay.passed[direction]
    return sizes


def places(size: int, count: int, rng: random.Random) -> list[int]:
    """Byte positions: one in each of `count` even parts."""
    return [int((number + rng.random()) * size * 0.95 / count) for number in range(count)]


@pytest.mark.timeout(1800 if IS_DEEP else 300)
async def test_node_killed_after_any_byte(
    worker: ModelRuntime,
    relay: FaultRelay,
    requests: Requests,
    tmp_path: Path,
    start_node: Callable[..., NodeProcess],
) -> None:
    """SIGKILL in every step of puts and gets. What is on its disk afterwards is whole records, and is used again."""
    kills = (36, 36, 18, 18) if IS_DEEP else (3, 3, 1, 1)
    tiers = ("--memory", "64MiB", "--disk", str(tmp_path / "disk"), "--disk-bytes", "64MiB")
    rng = random.Random(1)
    node = start_node(*tiers)
    relay.target = node.address

    async def prepare(is_warm: bool) -> None:
        await requests.until_the_store_is_used()
        if is_warm:
            await requests.ask()
            return
        async with store_client(node.address) as direct:
            await direct.delete_all()

    sizes = await bytes_by_phase(relay, requests, prepare)
    killed = survived = 0
    for phase, count in zip(PHASES, kills, strict=True):
        is_warm, direction = phase
        for place in places(sizes[phase], count, rng):
            await prepare(is_warm)
            fired = relay.fired
            relay.arm(direction, place, node.kill)
            await requests.ask()
            relay.watch()
            if relay.fired == fired:  # bytes of a request without a prefix vary with who was first
                continue
            killed += 1
            assert node.popen.returncode == -signal.SIGKILL
            node = start_node(*tiers)
            relay.target = node.address
            async with store_client(node.address) as direct:
                found = [record async for record in direct.list_records()]
                for one in found:
                    records = direct.get([one.key], namespace=requests.namespace)
                    assert [record.header.key async for record in records] == [one.key]
                assert {one.key for one in found} <= set(requests.keys)
                assert (await direct.stats()).corrupt == 0, "a record is there whole or not at all"
                survived += len(found)
                if is_warm:
                    assert len(found) == NUM_BLOCKS, "what was stored before outlives the kill"
    assert killed == relay.fired >= 0.8 * sum(kills), "the control: the kills were in the middle of requests"
    assert survived > 0


@pytest.mark.timeout(1800 if IS_DEEP else 300)
@pytest.mark.parametrize("fault", ["cut", "flip"])
async def test_connections_broken_after_any_byte(fault: str, relay: FaultRelay, requests: Requests) -> None:
    """Connections reset, or a bit flipped on its way, where no checksum of TCP finds it. The node lives on: it keeps no
    lease, no half put and no record that is not what it should be."""
    counts = (60, 60, 30, 30) if IS_DEEP else (4, 4, 2, 2)
    rng = random.Random(2)
    leases = LeaseTable()
    backend = MemoryBackend(capacity_bytes=64 << 20, leases=leases)
    server = KVStoreServer(backend, NodeConfig())
    await server.start()
    relay.target = server.address
    num_leased = 0

    def cut() -> None:
        nonlocal num_leased
        num_leased += len(leases) > 0
        relay.cut()

    async def prepare(is_warm: bool) -> None:
        await requests.until_the_store_is_used()
        if not is_warm:
            await backend.delete(None)
            return
        async with asyncio.timeout(LIMIT_S):
            while not all(await backend.contains(requests.keys)):
                await requests.ask()
                await requests.until_the_store_is_used()

    try:
        sizes = await bytes_by_phase(relay, requests, prepare)
        genuine = dict(zip(requests.keys, await backend.get(requests.keys), strict=True))
        for phase, count in zip(PHASES, counts, strict=True):
            is_warm, direction = phase
            for place in places(sizes[phase], count, rng):
                await prepare(is_warm)
                relay.arm(direction, place, cut if fault == "cut" else None)
                await requests.ask()
                relay.watch()
                for key in sorted(backend.keys()):
                    (record,) = await backend.get([key])
                    assert record is not None
                    verify_record(record, key)
                    assert record == genuine[key]
        assert relay.fired >= 0.8 * sum(counts), "the control: the faults were in the middle of requests"
        assert fault == "flip" or num_leased > 0, "and some of them while a lease was held"
        assert fault == "cut" or server.counters.rejected + requests.num_corrupt > 0, "and some of them inside records"
        assert server.staged_bytes == 0
        async with asyncio.timeout(LIMIT_S):
            while len(leases):  # one whose release was lost ends by itself
                await asyncio.sleep(0.05)
    finally:
        await server.stop(0.2)
