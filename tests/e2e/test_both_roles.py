"""One worker with both roles gives the tokens of two workers, and its refusals are theirs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from support.decode_calls import Inside, call, failure, read, request

from kvferry.decode.config import DecodeConfig
from kvferry.deploy.assembly import make_gateway
from kvferry.deploy.client import AsyncClient
from kvferry.deploy.settings import Settings
from kvferry.deploy.worker_server import ModelRuntime, WorkerServer
from kvferry.prefill.config import PrefillConfig
from kvferry.proto.trailing_metadata import retry_after_ms

BLOCK_SIZE = 32


@pytest.fixture
async def serve_both(runtime: Callable[..., ModelRuntime], serve_workers: Any) -> AsyncIterator[Callable[..., Any]]:
    """Starts one worker with both roles; what it returns sends requests that name no prefill worker."""
    async with AsyncExitStack() as stack:

        async def start(store: str | None = None, **prefill: Any) -> Any:
            server = WorkerServer(
                runtime(),
                config=DecodeConfig(kv_memory=32 * 2**20),
                store_address=store,
                own_prefill=PrefillConfig(fetch="always", **prefill),
            )
            address = await server.start()
            stack.push_async_callback(server.stop, 0.2)
            workers = await serve_workers(runtime())
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
            workers.channel, workers.prefill_address, workers.decode_server = channel, "", server
            workers.decode_address = address
            return workers

        yield start


@pytest.mark.parametrize("store", [False, True], ids=["no store", "store"])
async def test_the_tokens_of_two_workers(
    serve_both: Any, serve_workers: Any, runtime: Any, make_store: Any, make_prompt: Any, store: bool
) -> None:
    """Cold, from the pool, and with a store that both share; prompts of every kind of end."""
    address = (await make_store()).address if store else None
    both = await serve_both(address)
    two = await serve_workers(runtime(), address)
    for length in (1, 31, 32, 33, 100, 5 * BLOCK_SIZE, 5 * BLOCK_SIZE + 7):
        prompt = make_prompt(length, seed=length)
        first = await both.generate(prompt, max_tokens=40)
        again = await both.generate(prompt, max_tokens=40)
        assert first.tokens == again.tokens == (await two.generate(prompt, max_tokens=40)).tokens
        blocks = length // BLOCK_SIZE
        assert again.usage.num_local_tokens == blocks * BLOCK_SIZE
        assert first.usage.store_bytes_read == 0, "blocks are handed over in memory"
    await Inside.of(both).assert_all_free()


async def test_many_at_once_and_cancels(serve_both: Any, make_prompt: Any) -> None:
    both = await serve_both()
    prompts = [make_prompt(40 + 9 * i, seed=i) for i in range(8)]
    expected = [(await both.generate(prompt, max_tokens=20)).tokens for prompt in prompts]
    leavers = [call(both, request(both, make_prompt(300 + i, seed=50 + i))) for i in range(6)]
    answers = [asyncio.create_task(both.generate(prompt, max_tokens=20)) for prompt in prompts]
    for i, stream in enumerate(leavers):
        await asyncio.sleep(0.01 * i)
        stream.cancel()
    assert [(await answer).tokens for answer in answers] == expected
    await Inside.of(both).assert_all_free()
    async with asyncio.timeout(10):
        while both.decode_server.prefill_servicer.num_requests:
            await asyncio.sleep(0.01)


async def test_refusals_are_those_of_a_prefill_worker(serve_both: Any, make_prompt: Any) -> None:
    both = await serve_both(max_prompt_tokens_in_flight=100)
    error = await failure(read(call(both, request(both, make_prompt(101)))))
    assert error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT)
    assert (await both.generate(make_prompt(100), max_tokens=3)).tokens
    await Inside.of(both).assert_all_free()


@pytest.mark.parametrize("roles", ["both", "two"])
async def test_a_full_prefill_says_when_to_come_again(
    serve_both: Any, serve_workers: Any, runtime: Any, make_prompt: Any, monkeypatch: pytest.MonkeyPatch, roles: str
) -> None:
    """The hint goes through decode to whoever asked."""
    workers = await serve_both() if roles == "both" else await serve_workers(runtime())
    server = workers.decode_server if roles == "both" else workers.prefill_server
    monkeypatch.setattr(server.prefill_servicer, "_config", PrefillConfig(max_requests=1))
    first = call(workers, request(workers, make_prompt(1900)))
    async with asyncio.timeout(10):
        while not server.prefill_servicer.num_requests:
            await asyncio.sleep(0.005)
    error = await failure(read(call(workers, request(workers, make_prompt(40)))))
    first.cancel()
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert int(retry_after_ms(error.trailing_metadata())) > 0
    await Inside.of(workers).assert_all_free()


async def test_a_deadline_in_prefill(serve_both: Any, make_prompt: Any) -> None:
    both = await serve_both()
    error = await failure(read(call(both, request(both, make_prompt(1500)), timeout=0.1)))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await Inside.of(both).assert_all_free()


async def test_behind_a_gateway(serve_both: Any, tiny_model: Any) -> None:
    both = await serve_both()
    settings = Settings.load(model=str(tiny_model("llama")), gateway={"port": 0})
    gateway = await make_gateway(settings, prefill=[], decode=[both.decode_address])
    port = await gateway.start()
    try:
        await gateway.wait_until_serving(30)
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            answer = await client.generate("one worker does it all", max_tokens=8, ignore_eos=True, n=1)
        assert len(answer.token_ids) == 8
    finally:
        await gateway.stop(1)
