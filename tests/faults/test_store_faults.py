"""A lost store means slower, never wrong, never stuck: a real node process, killed, stopped, wiped, full or damaged.

The oracle of every test is the same request served without a store.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest
import redis
from support.processes import NodeProcess, RedisProcess

from kvferry.deploy.worker_server import ModelRuntime
from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.config import ClientConfig

BLOCK_SIZE = 32
PROMPT_TOKENS = 12 * BLOCK_SIZE + 9
LIMIT_S = 30.0
"""Generous: a request that hangs fails, a slow machine does not."""


@pytest.fixture
def worker(runtime: Callable[[str], ModelRuntime]) -> ModelRuntime:
    return runtime("llama")


@pytest.fixture
async def oracle(worker: ModelRuntime, serve_workers: Any, make_prompt: Any) -> list[int]:
    return (await (await serve_workers(worker)).generate(make_prompt(PROMPT_TOKENS))).tokens


async def stats_of(address: str) -> Any:
    async with StoreClient(ClientConfig(address=address, lookup_timeout_s=5.0)) as client:
        return await client.stats()


async def break_store(node: NodeProcess, fault: str) -> None:
    if fault == "wipe":
        async with StoreClient(ClientConfig(address=node.address, lookup_timeout_s=5.0)) as client:
            await client.delete_all()
    else:
        node.signal(signal.SIGKILL if fault == "kill" else signal.SIGSTOP)


@pytest.mark.parametrize("fault", ["kill", "stop"])
async def test_store_lost_before_the_request(
    fault: str,
    worker: ModelRuntime,
    oracle: list[int],
    serve_workers: Any,
    make_prompt: Any,
    start_node: Callable[..., NodeProcess],
) -> None:
    node = start_node()
    workers = await serve_workers(worker, node.address)
    token_ids = make_prompt(PROMPT_TOKENS)
    assert (await workers.generate(token_ids)).tokens == oracle
    async with asyncio.timeout(LIMIT_S):  # the control: the store was in use
        while (await stats_of(node.address)).puts != 12:
            await asyncio.sleep(0.02)
    node.signal(signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
    fresh = await serve_workers(worker, node.address)
    answer = await fresh.generate(token_ids, timeout=LIMIT_S)
    assert answer.tokens == oracle
    assert answer.num_cached_tokens == 0
    assert answer.usage.prefill.store_tokens_written == 0
    assert answer.usage.handoff_tokens == PROMPT_TOKENS  # every block came straight from prefill
    if fault == "stop":
        # A store that comes back is used again, without a restart of anything.
        node.signal(signal.SIGCONT)
        async with asyncio.timeout(LIMIT_S):
            while (await fresh.generate(token_ids)).num_cached_tokens == 0:
                await asyncio.sleep(0.1)
        assert (await fresh.generate(token_ids)).tokens == oracle


@pytest.mark.parametrize("fault", ["kill", "stop", "wipe"])
@pytest.mark.parametrize("after_puts", [0, 1, 5])
async def test_store_lost_while_prefill_publishes(
    fault: str,
    after_puts: int,
    worker: ModelRuntime,
    oracle: list[int],
    serve_workers: Any,
    make_prompt: Any,
    start_node: Callable[..., NodeProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = start_node()
    workers = await serve_workers(worker, node.address)
    reached, go_on = asyncio.Event(), asyncio.Event()
    put, puts = StoreClient.put, 0

    async def paused(self: StoreClient, *arguments: Any, **options: Any) -> bool:
        nonlocal puts
        if puts == after_puts:
            reached.set()
            await go_on.wait()
        puts += 1
        return await put(self, *arguments, **options)

    monkeypatch.setattr(StoreClient, "put", paused)
    request = asyncio.create_task(workers.generate(make_prompt(PROMPT_TOKENS), timeout=LIMIT_S))
    async with asyncio.timeout(LIMIT_S):
        await reached.wait()
    assert (await stats_of(node.address)).puts == after_puts  # the control: the fault comes in the middle
    await break_store(node, fault)
    go_on.set()
    answer = await request
    assert answer.tokens == oracle
    if fault != "wipe":
        assert answer.usage.handoff_tokens >= PROMPT_TOKENS - after_puts * BLOCK_SIZE


@pytest.mark.parametrize("fault", ["kill", "stop", "wipe"])
@pytest.mark.parametrize("after_records", [0, 1, 5])
async def test_store_lost_while_a_prefix_is_fetched(
    fault: str,
    after_records: int,
    worker: ModelRuntime,
    oracle: list[int],
    serve_workers: Any,
    make_prompt: Any,
    start_node: Callable[..., NodeProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token_ids = make_prompt(PROMPT_TOKENS)
    node = start_node()
    await (await serve_workers(worker, node.address)).generate(token_ids)
    fresh = await serve_workers(worker, node.address)
    reached, go_on = asyncio.Event(), asyncio.Event()
    get = StoreClient.get

    async def paused(self: StoreClient, keys: list[bytes], **options: Any) -> AsyncIterator[Any]:
        """What the fault leaves of the stream comes from a new call for the rest of the keys."""
        if after_records and not reached.is_set():
            async with aclosing(get(self, keys[:after_records], **options)) as records:
                async for record in records:
                    yield record
            keys = keys[after_records:]
        if not reached.is_set():
            reached.set()
            await go_on.wait()
        async with aclosing(get(self, keys, **options)) as records:
            async for record in records:
                yield record

    monkeypatch.setattr(StoreClient, "get", paused)
    request = asyncio.create_task(fresh.generate(token_ids, timeout=LIMIT_S))
    async with asyncio.timeout(LIMIT_S):
        await reached.wait()
    await break_store(node, fault)
    go_on.set()
    answer = await request
    assert answer.tokens == oracle
    assert answer.num_cached_tokens == after_records * BLOCK_SIZE  # the control: the rest was lost


async def test_every_block_of_a_chain_deleted_in_turn(
    worker: ModelRuntime, oracle: list[int], serve_workers: Any, make_prompt: Any, make_store: Any
) -> None:
    """Only the contiguous prefix before the hole is used; blocks after it are there and not touched."""
    from kvferry.kvstore.identity import namespace_of
    from kvferry.kvstore.key import block_keys

    token_ids = make_prompt(PROMPT_TOKENS)
    store = await make_store()
    await (await serve_workers(worker, store.address)).generate(token_ids)
    keys = block_keys(namespace_of(worker.identity, tenant="default", block_size=BLOCK_SIZE), token_ids)
    for hole in range(len(keys)):
        await store.backend.delete([keys[hole]])
        answer = await (await serve_workers(worker, store.address)).generate(token_ids)
        assert answer.tokens == oracle
        assert answer.num_cached_tokens == hole * BLOCK_SIZE


async def test_full_store(
    worker: ModelRuntime,
    oracle: list[int],
    serve_workers: Any,
    make_prompt: Any,
    start_node: Callable[..., NodeProcess],
) -> None:
    """A store that holds three blocks evicts, and one that holds none refuses: both answer right."""
    token_ids = make_prompt(PROMPT_TOKENS)
    three_blocks = 3 * (worker.layout.block_bytes + 1024) + worker.layout.sink_bytes
    for memory, keeps in ((three_blocks, True), (worker.layout.block_bytes // 2, False)):
        node = start_node("--memory", str(memory))
        workers = await serve_workers(worker, node.address)
        for _ in range(2):
            assert (await workers.generate(token_ids, timeout=LIMIT_S)).tokens == oracle
        stats = await stats_of(node.address)
        assert stats.bytes <= memory
        assert (stats.evictions > 0, stats.records > 0) == (keeps, keeps)
        assert keeps or stats.rejected > 0


async def test_block_damaged_in_redis_is_refused_and_computed_again(
    worker: ModelRuntime,
    oracle: list[int],
    serve_workers: Any,
    make_prompt: Any,
    start_node: Callable[..., NodeProcess],
    start_redis: Callable[..., RedisProcess],
) -> None:
    server = start_redis()
    node = start_node("--redis", server.url)
    token_ids = make_prompt(PROMPT_TOKENS)
    await (await serve_workers(worker, node.address)).generate(token_ids)
    with redis.Redis(port=server.port) as direct:
        names = sorted(direct.keys("*"))
        assert len(names) == 12
        originals = {name: direct.get(name) for name in names}
        for round_number, offset in enumerate((0, 40, 200, -1)):
            damaged = bytearray(originals[names[round_number]])
            damaged[offset] ^= 1
            direct.set(names[round_number], bytes(damaged))
            answer = await (await serve_workers(worker, node.address)).generate(token_ids)
            assert answer.tokens == oracle
            assert answer.num_cached_tokens < 12 * BLOCK_SIZE
            assert {name: direct.get(name) for name in names} == originals  # computed again, to the same bytes
    assert (await stats_of(node.address)).corrupt == 4


@pytest.mark.parametrize("fault", ["kill", "stop", "flush", "full"])
async def test_redis_behind_the_store_is_lost(
    fault: str,
    worker: ModelRuntime,
    oracle: list[int],
    serve_workers: Any,
    make_prompt: Any,
    start_node: Callable[..., NodeProcess],
    start_redis: Callable[..., RedisProcess],
) -> None:
    server = start_redis(*(["--maxmemory", "2mb", "--maxmemory-policy", "noeviction"] if fault == "full" else []))
    node = start_node("--redis", server.url)
    workers = await serve_workers(worker, node.address)
    token_ids = make_prompt(PROMPT_TOKENS)
    if fault != "full":
        assert (await workers.generate(token_ids)).tokens == oracle
    with redis.Redis(port=server.port) as direct:
        if fault == "flush":
            direct.flushall()
        elif fault == "full":
            while True:
                try:
                    direct.set(f"filler-{direct.dbsize()}", b"x" * 50_000)
                except redis.exceptions.OutOfMemoryError:
                    break
        else:
            server.signal(signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
    fresh = await serve_workers(worker, node.address)
    answer = await fresh.generate(token_ids, timeout=LIMIT_S)
    assert answer.tokens == oracle
    assert answer.num_cached_tokens == 0
