"""One request again and again, to workers whose store is about to break; and where in its bytes to break it."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from kvferry.deploy.worker_server import ModelRuntime
from kvferry.kvstore.breaker import BreakerState
from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.config import ClientConfig
from kvferry.kvstore.errors import StoreUnavailable
from kvferry.kvstore.identity import namespace_of
from kvferry.kvstore.key import block_keys
from support.decode_calls import Inside
from support.fault_relay import Direction, FaultRelay

T = TypeVar("T")
IS_DEEP = "KVFERRY_DEEP" in os.environ
BLOCK_SIZE = 32
NUM_BLOCKS = 12
PROMPT_TOKENS = NUM_BLOCKS * BLOCK_SIZE + 9
LIMIT_S = 30.0
"""Generous: a request that hangs fails, a slow machine does not."""
PHASES: tuple[tuple[bool, Direction], ...] = ((False, "up"), (True, "down"), (True, "up"), (False, "down"))
"""Whether the store has the prefix before the request, and whose bytes are counted: what a put sends, what a get sends,
what a look-up and a get ask, what a put is answered."""


@asynccontextmanager
async def store_client(address: str, *, use_bulk: bool = True) -> AsyncIterator[StoreClient]:
    """A client of a node that answers: on a busy machine the first connection may take more than gRPC gives it."""
    async with StoreClient(ClientConfig(address=address, lookup_timeout_s=5.0, use_bulk=use_bulk)) as client:
        await answered(client.stats)
        yield client


async def answered(call: Callable[[], Awaitable[T]]) -> T:
    """What the call gives once the store, and every tier that it needs, answers."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                return await call()
            except StoreUnavailable:
                await asyncio.sleep(0.1)


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
        assert answer.usage.num_local_tokens == 0
        inside = Inside.of(self._workers)
        await inside.assert_all_free()
        pool = inside.admission.pool  # which forgets the prefix: the next request fetches it again
        pool.release(pool.allocate(pool.num_available))
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


async def bytes_by_phase(
    relay: FaultRelay, requests: Requests, prepare: Callable[[bool], Any]
) -> dict[tuple[bool, Direction], int]:
    """The control: what each phase moves while nothing breaks, and that it moves it."""
    sizes = {}
    for is_warm in (False, True):
        async with asyncio.timeout(LIMIT_S):
            while True:  # a look-up of 0.2 s may fail on a busy machine
                await prepare(is_warm)
                relay.watch()
                answer = await requests.ask()
                if answer.num_cached_tokens == (NUM_BLOCKS * BLOCK_SIZE if is_warm else 0):
                    break
        for direction in ("up", "down"):
            sizes[is_warm, direction] = relay.passed[direction]
    return sizes


def places(size: int, count: int, rng: random.Random) -> list[int]:
    """Byte positions: one in each of `count` even parts."""
    return [int((number + rng.random()) * size * 0.95 / count) for number in range(count)]
