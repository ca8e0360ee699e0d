"""Prefill workers that stop or die, stores that are slow, callers that leave: nothing wrong, nothing stuck."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.processes import PrefillProcess

from kvferry.deploy.worker_server import ModelRuntime
from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.codec import encode_record
from kvferry.kvstore.identity import namespace_of
from kvferry.kvstore.key import Namespace, block_keys

BLOCK_SIZE = 32
NUM_BLOCKS = 12
PROMPT_TOKENS = NUM_BLOCKS * BLOCK_SIZE + 9
LIMIT_S = 40.0


@pytest.fixture
def worker(runtime: Callable[[str], ModelRuntime]) -> ModelRuntime:
    return runtime("llama")


@pytest.fixture
def namespace(worker: ModelRuntime) -> Namespace:
    return namespace_of(worker.identity, tenant="default", block_size=BLOCK_SIZE)


@pytest.fixture
async def oracle(worker: ModelRuntime, serve_workers: Any, make_prompt: Any) -> list[int]:
    return (await (await serve_workers(worker)).generate(make_prompt(PROMPT_TOKENS))).tokens


@pytest.fixture
def start_prefill(tmp_path: Path, worker: ModelRuntime) -> Iterator[Callable[..., PrefillProcess]]:
    started: list[PrefillProcess] = []

    def start(*, threads: int = 1, store_address: str | None = None) -> PrefillProcess:
        log = tmp_path / f"prefill-{len(started)}.log"
        path = worker.loaded.source.path
        started.append(PrefillProcess(log, path, block_size=BLOCK_SIZE, threads=threads, store_address=store_address))
        return started[-1]

    yield start
    for process in started:
        process.kill()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.01)


async def stored(store: Any, keys: list[bytes]) -> int:
    return sum(record is not None for record in await store.records(keys))


async def test_prefill_in_another_process_with_another_thread_count(
    worker: ModelRuntime,
    oracle: list[int],
    namespace: Namespace,
    serve_workers: Any,
    make_store: Any,
    make_prompt: Any,
    start_prefill: Callable[..., PrefillProcess],
) -> None:
    """It is of the same numerics class, packs the same bytes and gives the same tokens."""
    token_ids = make_prompt(PROMPT_TOKENS)
    here, there = await make_store(), await make_store()
    await (await serve_workers(worker, here.address)).generate(token_ids)
    workers = await serve_workers(worker, there.address)
    workers.prefill_address = start_prefill(threads=1, store_address=there.address).address
    answer = await workers.generate(token_ids)  # refused with FAILED_PRECONDITION were the identity another one
    assert answer.tokens == oracle
    keys = block_keys(namespace, token_ids)
    assert await stored(there, keys) == NUM_BLOCKS
    assert await there.records(keys) == await here.records(keys)


@pytest.mark.parametrize("fault", ["kill", "stop"])
async def test_prefill_lost_before_the_handoff(
    fault: str,
    worker: ModelRuntime,
    oracle: list[int],
    serve_workers: Any,
    make_prompt: Any,
    start_prefill: Callable[..., PrefillProcess],
) -> None:
    """UNAVAILABLE long before the deadline; the decode worker is free and serves the next request."""
    workers = await serve_workers(worker)
    own_prefill = workers.prefill_address
    process = start_prefill()
    workers.prefill_address = process.address
    token_ids = make_prompt(PROMPT_TOKENS)
    assert (await workers.generate(token_ids)).tokens == oracle  # the control: it works, and the channel is up
    process.signal(signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await workers.generate(make_prompt(PROMPT_TOKENS, seed=1), timeout=10 * LIMIT_S)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    workers.prefill_address = own_prefill
    assert (await workers.generate(token_ids)).tokens == oracle
    assert workers.decode_server.decode_worker.admission.num_requests == 0


@pytest.mark.parametrize("fault", ["kill", "stop"])
async def test_prefill_lost_after_the_handoff(
    fault: str,
    worker: ModelRuntime,
    serve_workers: Any,
    make_prompt: Any,
    start_prefill: Callable[..., PrefillProcess],
) -> None:
    """Decode has everything: the answer goes on to its end."""
    token_ids = make_prompt(PROMPT_TOKENS)
    workers = await serve_workers(worker)
    whole = await workers.generate(token_ids, max_tokens=100)
    process = start_prefill()
    workers.prefill_address = process.address
    stream = workers.stream(token_ids, max_tokens=100, timeout=LIMIT_S)
    tokens = []
    async for chunk in stream:
        tokens.append(chunk.token_id)
        if len(tokens) == 4:
            process.signal(signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
    assert tokens == whole.tokens


async def test_a_slow_store_does_not_hold_up_the_answer(
    worker: ModelRuntime,
    oracle: list[int],
    namespace: Namespace,
    serve_workers: Any,
    make_store: Any,
    make_prompt: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Puts that succeed, slowly: decode takes the blocks from prefill, and publishing goes on behind the answer."""
    put = StoreClient.put
    gate = asyncio.Event()

    async def slow(self: StoreClient, key: bytes, record: bytes, **options: Any) -> bool:
        await gate.wait()
        return await put(self, key, record, **options)

    monkeypatch.setattr(StoreClient, "put", slow)
    store = await make_store()
    token_ids = make_prompt(PROMPT_TOKENS)
    answer = await (await serve_workers(worker, store.address)).generate(token_ids, timeout=LIMIT_S)
    assert answer.tokens == oracle
    assert answer.usage.handoff_tokens == PROMPT_TOKENS
    keys = block_keys(namespace, token_ids)
    assert await stored(store, keys) == 0  # the control: nothing was put while the answer was made
    gate.set()
    async with asyncio.timeout(LIMIT_S):
        while await stored(store, keys) < NUM_BLOCKS:
            await asyncio.sleep(0.01)


async def test_a_caller_that_leaves_while_the_store_stalls_stops_the_computation(
    worker: ModelRuntime,
    serve_workers: Any,
    make_store: Any,
    make_prompt: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stalled = asyncio.Event()

    async def stall(self: StoreClient, keys: list[bytes], **_: Any) -> AsyncIterator[Any]:
        stalled.set()
        await asyncio.Event().wait()
        yield

    store = await make_store()
    workers = await serve_workers(worker, store.address)
    token_ids = make_prompt(PROMPT_TOKENS)
    await workers.generate(token_ids)
    monkeypatch.setattr(StoreClient, "get", stall)
    chunks = 0
    hidden = worker.loaded.model.hidden

    def counting(*arguments: Any) -> Any:
        nonlocal chunks
        chunks += 1
        return hidden(*arguments)

    monkeypatch.setattr(worker.loaded.model, "hidden", counting)
    call = asyncio.create_task(workers.generate(token_ids))
    async with asyncio.timeout(LIMIT_S):
        await stalled.wait()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    servicer = workers.prefill_server.prefill_servicer
    await until(lambda: servicer.num_requests == 0)
    await asyncio.sleep(0.3)  # a computation that went on would have begun by now
    assert chunks == 0
    assert store.backend.leases is None or not len(store.backend.leases)


async def test_one_token_publishes_the_whole_prompt(
    worker: ModelRuntime, namespace: Namespace, serve_workers: Any, make_store: Any, make_prompt: Any
) -> None:
    store = await make_store()
    workers = await serve_workers(worker, store.address)
    token_ids = make_prompt(PROMPT_TOKENS)
    answer = await workers.generate(token_ids, max_tokens=1)
    keys = block_keys(namespace, token_ids)
    async with asyncio.timeout(LIMIT_S):
        while await stored(store, keys) < NUM_BLOCKS:
            await asyncio.sleep(0.01)
    again = await (await serve_workers(worker, store.address)).generate(token_ids, max_tokens=1)
    assert again.tokens == answer.tokens
    assert again.num_cached_tokens == NUM_BLOCKS * BLOCK_SIZE


async def test_what_was_there_is_not_counted_as_written(
    worker: ModelRuntime, serve_workers: Any, make_store: Any, make_prompt: Any
) -> None:
    """A prompt that ends on the grid computes its last block again, and finds it in the store."""
    store = await make_store()
    token_ids = make_prompt(3 * BLOCK_SIZE)
    first = await (await serve_workers(worker, store.address)).generate(token_ids)
    assert first.usage.prefill.store_tokens_written == 3 * BLOCK_SIZE
    again = await (await serve_workers(worker, store.address)).generate(token_ids)
    assert again.num_cached_tokens == 2 * BLOCK_SIZE
    assert again.usage.prefill.store_bytes_written == 0
    assert again.tokens == first.tokens


async def test_a_forged_block_with_a_good_checksum_is_not_used(
    worker: ModelRuntime,
    oracle: list[int],
    namespace: Namespace,
    serve_workers: Any,
    make_store: Any,
    make_prompt: Any,
) -> None:
    """Scales that are not finite are refused although the record is in order."""
    store = await make_store()
    token_ids = make_prompt(PROMPT_TOKENS)
    keys = block_keys(namespace, token_ids)
    payload = bytearray(worker.layout.payload_bytes(3))
    scale = 8 * worker.layout.head_dim
    payload[scale : scale + 2] = b"\x00\x7e"  # fp16 NaN
    forged = encode_record(
        key=keys[3],
        namespace=namespace.digest(),
        block_index=3,
        num_tokens=BLOCK_SIZE,
        payload=[bytes(payload)],
    )
    await store.backend.put(keys[3], forged)
    workers = await serve_workers(worker, store.address)
    assert (await workers.generate(token_ids)).tokens == oracle
    again = await (await serve_workers(worker, store.address)).generate(token_ids)
    assert again.tokens == oracle
    assert again.num_cached_tokens == 3 * BLOCK_SIZE
