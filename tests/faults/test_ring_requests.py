"""Requests over several store nodes: the same tokens with one node, with three, with one of them killed, and wiped.

The oracle of every test is the same request served without a store.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import pytest
from support.processes import NodeProcess

from kvferry.deploy.worker_server import ModelRuntime
from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.ring import StoreRing
from kvferry.kvstore.ring_config import RingConfig

BLOCK_SIZE = 32
NUM_BLOCKS = 20
PROMPT_TOKENS = NUM_BLOCKS * BLOCK_SIZE + 9
LIMIT_S = 30.0


@pytest.fixture
def worker(runtime: Callable[[str], ModelRuntime]) -> ModelRuntime:
    return runtime("llama")


@pytest.fixture
async def oracle(worker: ModelRuntime, serve_workers: Any, make_prompt: Any) -> list[int]:
    return (await (await serve_workers(worker)).generate(make_prompt(PROMPT_TOKENS))).tokens


def ring_of(nodes: Sequence[NodeProcess], replication: int) -> RingConfig:
    """Patient: these tests look at what comes, test_ring_faults.py at the bounds."""
    addresses = tuple(node.address for node in nodes)
    return RingConfig(nodes=addresses, replication=replication)


async def records_of(nodes: Sequence[NodeProcess]) -> list[int]:
    async with StoreRing(RingConfig(nodes=tuple(node.address for node in nodes))) as ring:
        told = await ring.stats_by_node(timeout_s=5.0)
        return [-1 if stats is None else stats.records for stats in told.values()]


def ring_in(server: Any) -> StoreRing:
    ring: StoreRing = server._nodes
    return ring


@pytest.mark.parametrize(("count", "replication"), [(1, 1), (3, 1), (3, 2)])
async def test_the_same_tokens_with_any_number_of_nodes(
    count: int,
    replication: int,
    worker: ModelRuntime,
    oracle: list[int],
    serve_workers: Any,
    make_prompt: Any,
    start_node: Callable[..., NodeProcess],
) -> None:
    token_ids = make_prompt(PROMPT_TOKENS)
    nodes = [start_node() for _ in range(count)]
    ring = ring_of(nodes, replication)
    assert (await (await serve_workers(worker, ring)).generate(token_ids)).tokens == oracle
    assert sum(await records_of(nodes)) == NUM_BLOCKS * replication  # the control: the nodes were in use
    hit = await (await serve_workers(worker, ring)).generate(token_ids)
    assert (hit.tokens, hit.num_cached_tokens) == (oracle, NUM_BLOCKS * BLOCK_SIZE)
    async with StoreRing(ring) as store:
        assert await store.delete_all() == NUM_BLOCKS * replication
    wiped = await (await serve_workers(worker, ring)).generate(token_ids)
    assert (wiped.tokens, wiped.num_cached_tokens) == (oracle, 0)


@pytest.mark.parametrize("fault", ["kill", "stop"])
@pytest.mark.parametrize("replication", [1, 2])
async def test_a_node_lost_while_a_prefix_is_fetched(
    fault: str,
    replication: int,
    worker: ModelRuntime,
    oracle: list[int],
    serve_workers: Any,
    make_prompt: Any,
    start_node: Callable[..., NodeProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The node that is asked first in the get is lost before it sends anything."""
    token_ids = make_prompt(PROMPT_TOKENS)
    nodes = [start_node() for _ in range(3)]
    ring = ring_of(nodes, replication)
    await (await serve_workers(worker, ring)).generate(token_ids)
    fresh = await serve_workers(worker, ring)
    get, lost = StoreClient.get, ""

    async def lose(self: StoreClient, keys: list[bytes], **options: Any) -> AsyncIterator[Any]:
        nonlocal lost
        if not lost:
            lost = self.address
            node = next(node for node in nodes if node.address == lost)
            node.signal(signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        async with aclosing(get(self, keys, **options)) as records:
            async for record in records:
                yield record

    monkeypatch.setattr(StoreClient, "get", lose)
    answer = await fresh.generate(token_ids, timeout=LIMIT_S)
    assert answer.tokens == oracle
    ring_used = ring_in(fresh.prefill_server)
    clients = {member.address: member.client for member in ring_used.members}
    assert clients[lost].counters.failures == 1
    if replication == 2:
        assert answer.num_cached_tokens == NUM_BLOCKS * BLOCK_SIZE  # nothing was computed again
        assert ring_used.counters.failovers >= 1
    else:
        assert answer.num_cached_tokens < NUM_BLOCKS * BLOCK_SIZE


@pytest.mark.parametrize("replication", [1, 2])
async def test_a_node_killed_while_prefill_publishes(
    replication: int,
    worker: ModelRuntime,
    oracle: list[int],
    serve_workers: Any,
    make_prompt: Any,
    start_node: Callable[..., NodeProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token_ids = make_prompt(PROMPT_TOKENS)
    nodes = [start_node() for _ in range(3)]
    ring = ring_of(nodes, replication)
    workers = await serve_workers(worker, ring)
    put, lost, puts = StoreClient.put, "", 0

    async def lose(self: StoreClient, *arguments: Any, **options: Any) -> bool:
        nonlocal lost, puts
        puts += 1
        if puts == 6:
            lost = self.address
            next(node for node in nodes if node.address == lost).kill()
        return await put(self, *arguments, **options)

    monkeypatch.setattr(StoreClient, "put", lose)
    answer = await workers.generate(token_ids, timeout=LIMIT_S)
    assert answer.tokens == oracle
    ring_used = ring_in(workers.prefill_server)
    assert {m.address: m.client.counters.failures for m in ring_used.members}[lost] >= 1
    if replication == 2:
        assert ring_used.counters.copies_lost >= 1
    # The next one finds what is left, computes the rest and publishes it to the others.
    for _ in range(2):
        assert (await workers.generate(token_ids, timeout=LIMIT_S)).tokens == oracle
    last = await (await serve_workers(worker, ring_of([n for n in nodes if n.address != lost], 1))).generate(token_ids)
    assert last.tokens == oracle


async def test_nodes_join_and_leave_without_a_restart(
    worker: ModelRuntime,
    oracle: list[int],
    serve_workers: Any,
    make_prompt: Any,
    start_node: Callable[..., NodeProcess],
) -> None:
    token_ids = make_prompt(PROMPT_TOKENS)
    nodes = [start_node() for _ in range(3)]
    workers = await serve_workers(worker, ring_of(nodes[:2], 1))
    assert (await workers.generate(token_ids)).tokens == oracle
    addresses = [node.address for node in nodes]
    for wanted in (addresses, addresses[1:], addresses[2:]):
        for server in (workers.prefill_server, workers.decode_server):
            server.set_store_nodes(wanted)
        assert (await workers.generate(token_ids)).tokens == oracle
        async with asyncio.timeout(LIMIT_S):  # what moved was a miss and is published again
            while (await workers.generate(token_ids)).num_cached_tokens < NUM_BLOCKS * BLOCK_SIZE:
                await asyncio.sleep(0.05)
    assert (await records_of(nodes))[2] == NUM_BLOCKS
    with pytest.raises(ValueError, match="host:port"):
        workers.prefill_server.set_store_nodes(["nowhere"])
    single = await serve_workers(worker, addresses[0])
    with pytest.raises(ValueError, match="give it a ring"):
        single.prefill_server.set_store_nodes(addresses)


@pytest.mark.parametrize("cache_bytes", [None, 64 << 20])
async def test_what_a_prefill_worker_reads_again(
    cache_bytes: int | None,
    worker: ModelRuntime,
    oracle: list[int],
    serve_workers: Any,
    make_prompt: Any,
    start_node: Callable[..., NodeProcess],
) -> None:
    """Without the cache, a prompt that comes again crosses again to prefill: requests share blocks while they run."""
    token_ids = make_prompt(PROMPT_TOKENS)
    ring = ring_of([start_node() for _ in range(2)], 1)
    await (await serve_workers(worker, ring)).generate(token_ids)
    workers = await serve_workers(worker, ring, store_cache_bytes=cache_bytes)
    reads = []
    for _ in range(2):
        answer = await workers.generate(token_ids)
        assert (answer.tokens, answer.num_cached_tokens) == (oracle, NUM_BLOCKS * BLOCK_SIZE)
        reads.append(answer.usage.prefill.store_bytes_read)
    assert reads[0] > 0
    assert reads[1] == (reads[0] if cache_bytes is None else 0)
