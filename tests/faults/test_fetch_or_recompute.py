"""Slow, fast and turning links between prefill and a real store node: the way changes, the tokens never."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from support.relay import Relay

from kvferry.deploy.worker_server import ModelRuntime
from kvferry.prefill.chooser import MeasuredChooser
from kvferry.prefill.chunk_step import ChunkStep

BLOCK_SIZE = 32
NUM_BLOCKS = 12
PROMPT_TOKENS = NUM_BLOCKS * BLOCK_SIZE + 9
LIMIT_S = 60.0
CRAWL = 20_000.0
"""Bytes a second: a block takes half a second, a few hundred times what computing it takes."""


@pytest.fixture
def worker(runtime: Callable[[str], ModelRuntime]) -> ModelRuntime:
    return runtime("llama")


@pytest.fixture
def slow_model(worker: ModelRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1 s a pass: no link to this machine is slower."""
    hidden = worker.loaded.model.hidden

    def slow(ids: Any, positions: Any, step: Any) -> Any:
        if isinstance(step, ChunkStep):
            time.sleep(0.1)
        return hidden(ids, positions, step)

    monkeypatch.setattr(worker.loaded.model, "hidden", slow)


@pytest.fixture
async def relay() -> AsyncIterator[Relay]:
    relay = Relay()
    yield relay
    await relay.stop()


@pytest.fixture
async def fresh_workers(
    worker: ModelRuntime, serve_workers: Any, make_store: Any, make_prompt: Any, relay: Relay
) -> Callable[[], Any]:
    """The prompt is in the store, and prefill reaches it over the relay; each pair of workers has an empty pool."""
    store = await make_store(bulk_port=None)  # which would lead past the relay
    first = await (await serve_workers(worker, store.address)).generate(make_prompt(PROMPT_TOKENS))
    await relay.start(store.address)
    chooser = MeasuredChooser()

    async def start() -> Any:
        workers = await serve_workers(worker, relay.address)
        workers.prefill_server.prefill_servicer.fetch_policy = chooser
        workers.store, workers.oracle, workers.chooser = store, first.tokens, chooser
        return workers

    return start


async def test_a_slow_link_is_left_and_then_not_taken(
    fresh_workers: Callable[[], Any], relay: Relay, make_prompt: Any
) -> None:
    """Known only after it was tried; then blocks that are found are computed, or not even looked up."""
    relay.slow_down(CRAWL)
    async with asyncio.timeout(LIMIT_S):
        while True:
            workers = await fresh_workers()
            counters = workers.chooser.counters
            answer = await workers.generate(make_prompt(PROMPT_TOKENS), timeout=LIMIT_S)
            assert answer.tokens == workers.oracle
            if counters.num_recomputed + counters.num_lookups_skipped:
                break
    assert answer.usage.prefill.fetch_choice.startswith("compute")
    assert answer.num_cached_tokens == 0
    assert counters.num_abandoned >= 1  # the control: the link was tried
    await _no_leases(workers.store)


async def test_a_fast_link_is_taken(
    slow_model: None, fresh_workers: Callable[[], Any], relay: Relay, make_prompt: Any
) -> None:
    workers = await fresh_workers()
    answer = await workers.generate(make_prompt(PROMPT_TOKENS), timeout=LIMIT_S)
    usage = answer.usage.prefill
    assert answer.tokens == workers.oracle
    assert usage.fetch_choice.startswith("fetch") and not usage.fetch_abandoned
    assert (usage.num_blocks_fetched, usage.num_blocks_recomputed) == (NUM_BLOCKS, 0)
    stats = workers.prefill_server.stats().prefill
    assert (stats.num_fetches, stats.num_blocks_fetched, stats.num_fetches_abandoned) == (1, NUM_BLOCKS, 0)
    assert stats.fetch_bytes_per_second > 0 and stats.block_compute_seconds > 0
    await _no_leases(workers.store)


async def test_a_link_that_turns_slow_in_the_middle(
    slow_model: None, fresh_workers: Callable[[], Any], relay: Relay, make_prompt: Any, worker: ModelRuntime
) -> None:
    """What came is used, the rest is computed. When the link is fast again it is used again."""
    workers = await fresh_workers()
    relay.slow_down(1000.0, after=4 * worker.layout.block_bytes)
    answer = await workers.generate(make_prompt(PROMPT_TOKENS), timeout=LIMIT_S)
    usage = answer.usage.prefill
    assert answer.tokens == workers.oracle
    assert usage.fetch_abandoned
    assert 0 < usage.num_blocks_fetched < NUM_BLOCKS
    assert usage.num_blocks_fetched + usage.num_blocks_recomputed == NUM_BLOCKS
    assert answer.num_cached_tokens == usage.num_blocks_fetched * BLOCK_SIZE
    await _no_leases(workers.store)
    relay.speed_up()
    async with asyncio.timeout(LIMIT_S):
        while answer.usage.prefill.num_blocks_fetched < NUM_BLOCKS:
            workers = await fresh_workers()
            answer = await workers.generate(make_prompt(PROMPT_TOKENS), timeout=LIMIT_S)
            assert answer.tokens == workers.oracle


async def test_a_caller_that_leaves_during_a_slow_fetch(
    slow_model: None, fresh_workers: Callable[[], Any], relay: Relay, make_prompt: Any, worker: ModelRuntime
) -> None:
    workers = await fresh_workers()
    relay.slow_down(10_000.0, after=2 * worker.layout.block_bytes)
    call = asyncio.create_task(workers.generate(make_prompt(PROMPT_TOKENS)))
    await asyncio.sleep(0.3)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    servicer = workers.prefill_server.prefill_servicer
    async with asyncio.timeout(LIMIT_S):
        while servicer.num_requests:
            await asyncio.sleep(0.01)
    await _no_leases(workers.store)


async def _no_leases(store: Any) -> None:
    """Released, or ended by themselves where the link is too slow for the release."""
    async with asyncio.timeout(LIMIT_S):
        while len(store.backend.leases):
            await asyncio.sleep(0.05)
