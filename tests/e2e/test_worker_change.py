"""A real worker that is drained, loses its lease, or is asked anew: nothing runs twice, nothing is left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from support.decode_calls import Inside, call, failure, read, request

from kvferry.deploy.worker_server import ModelRuntime
from kvferry.proto import worker_pb2
from kvferry.proto.attempts import is_draining

Code = grpc.StatusCode
PROMPT_TOKENS = 100
LONG = 200
LIMIT_S = 60.0


@pytest.fixture
async def workers(runtime: Callable[[str], ModelRuntime], serve_workers: Any) -> Any:
    return await serve_workers(runtime("llama"))


def ask(workers: Any, prompt: list[int], *, attempt: int = 0, max_tokens: int = LONG) -> Any:
    message = request(workers, prompt, attempt=attempt, sampling=worker_pb2.SamplingParams(max_tokens=max_tokens))
    return call(workers, message, timeout=LIMIT_S)


async def status(stream: Any) -> grpc.StatusCode:
    async with asyncio.timeout(LIMIT_S):
        return (await failure(read(stream))).code()


def counters(workers: Any) -> worker_pb2.CallStats:
    return workers.decode_server.stats().calls  # type: ignore[no-any-return]


async def test_a_newer_attempt_takes_over(workers: Any, make_prompt: Any) -> None:
    prompt = make_prompt(PROMPT_TOKENS)
    whole = await read(ask(workers, prompt))
    older = ask(workers, prompt, attempt=1)
    assert await read(older, 3) == whole[:3]
    newer = ask(workers, prompt, attempt=2)
    assert await read(newer) == whole
    assert await status(older) is Code.ABORTED
    assert await status(ask(workers, prompt, attempt=1)) is Code.ABORTED
    calls = counters(workers)
    assert (calls.num_superseded, calls.num_stale, calls.num_running) == (1, 1, 0)
    await Inside.of(workers).assert_all_free()


async def test_a_prefill_worker_ends_the_older_attempt_too(workers: Any, make_prompt: Any) -> None:
    """Two decode calls would fence each other before: so the prefill worker is asked directly."""
    prefill = workers.prefill_server.prefill_servicer.attempts
    started = asyncio.Event()

    async def hold() -> None:
        with prefill.running("default", "test", 7):
            started.set()
            await asyncio.Event().wait()

    holding = asyncio.create_task(hold())
    await started.wait()
    assert await status(ask(workers, make_prompt(PROMPT_TOKENS), attempt=6)) is Code.ABORTED
    assert len(await read(ask(workers, make_prompt(PROMPT_TOKENS), attempt=8, max_tokens=4))) == 4
    [ended] = await asyncio.gather(holding, return_exceptions=True)
    assert "newer attempt" in str(ended)
    stats = workers.prefill_server.stats().calls
    assert (stats.num_superseded, stats.num_stale) == (1, 1)


async def test_a_lost_lease_ends_what_runs(workers: Any, make_prompt: Any) -> None:
    prompt = make_prompt(PROMPT_TOKENS)
    running = ask(workers, prompt, attempt=1)
    await read(running, 2)
    workers.decode_server.end_running("this worker was away")
    assert await status(running) is Code.UNAVAILABLE
    assert counters(workers).num_fenced == 1
    await Inside.of(workers).assert_all_free()
    assert len(await read(ask(workers, prompt, attempt=2, max_tokens=4))) == 4


@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_a_draining_worker_takes_nothing_new(role: str, workers: Any, make_prompt: Any) -> None:
    """What runs ends as it would have; new requests are refused so that the gateway goes elsewhere."""
    prompt = make_prompt(PROMPT_TOKENS)
    whole = await read(ask(workers, prompt))
    running = ask(workers, prompt)
    tokens = await read(running, 2)
    server = workers.decode_server if role == "decode" else workers.prefill_server
    draining = asyncio.create_task(server.drain(LIMIT_S))
    await asyncio.sleep(0.05)
    error = await failure(read(ask(workers, make_prompt(PROMPT_TOKENS, seed=1), max_tokens=2)))
    assert error.code() is Code.UNAVAILABLE
    assert is_draining(error)
    assert tokens + await read(running) == whole
    async with asyncio.timeout(LIMIT_S):
        assert await draining
    # A prefill worker refuses the finished answer that decode asks it to publish, too.
    assert server.stats().calls.num_refused in ((1, 2) if role == "prefill" else (1,))
    assert server.stats().calls.num_fenced == 0
    await Inside.of(workers).assert_all_free()


async def test_draining_is_bounded(workers: Any, make_prompt: Any) -> None:
    running = ask(workers, make_prompt(PROMPT_TOKENS), max_tokens=1000)
    await read(running, 2)
    async with asyncio.timeout(LIMIT_S):
        assert not await workers.decode_server.drain(0.2)
    assert await status(running) is Code.UNAVAILABLE
    assert counters(workers).num_fenced == 1
    await Inside.of(workers).assert_all_free()
