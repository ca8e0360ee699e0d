"""Several answers from one prefill: each is the answer of a request alone, and the prompt's blocks are there once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from support.decode_calls import Inside, call, request

from kvferry.decode.config import DecodeConfig
from kvferry.deploy.worker_server import ModelRuntime
from kvferry.proto import worker_pb2

BLOCK_SIZE = 32
BLOCK_BYTES = 3 * 2 * 24 * 64
SEED = 2**64 - 2
"""Answer i has seed + i, which wraps."""
OPTIONS = {"temperature": 0.9, "frequency_penalty": 0.3}

Serve = Callable[..., Any]


@pytest.fixture
def serve(runtime: Callable[..., ModelRuntime], serve_workers: Any) -> Serve:
    def start(blocks: int, **config: Any) -> Any:
        return serve_workers(runtime(), None, DecodeConfig(kv_memory=blocks * BLOCK_BYTES, **config))

    return start


async def alone(workers: Any, prompt: list[int], n: int, **options: Any) -> list[list[int]]:
    seeds = [(SEED + i) % 2**64 for i in range(n)]
    return [(await workers.generate(prompt, seed=seed, **OPTIONS, **options)).tokens for seed in seeds]


async def together(workers: Any, prompt: list[int], n: int, at: int = 0, then: Any = None, **options: Any) -> Any:
    """The answers' tokens; after `at` chunks `then()` is called."""
    sampling = worker_pb2.SamplingParams(n=n, seed=SEED, **OPTIONS, **options)
    answers: list[list[int]] = [[] for _ in range(n)]
    num_chunks = 0
    async for chunk in call(workers, request(workers, prompt, sampling=sampling), timeout=60):
        assert chunk.index == len(answers[chunk.choice])
        answers[chunk.choice].append(chunk.token_id)
        num_chunks += 1
        if num_chunks == at:
            then()
    return answers


@pytest.mark.parametrize(("length", "n"), [(1, 2), (BLOCK_SIZE, 3), (4 * BLOCK_SIZE + 3, 5), (5 * BLOCK_SIZE - 1, 2)])
async def test_each_answer_is_that_of_a_request_alone(serve: Serve, make_prompt: Any, length: int, n: int) -> None:
    workers = await serve(64)
    inside = Inside.of(workers)
    prompt = make_prompt(length, seed=length)
    expected = await alone(workers, prompt, n, max_tokens=40)
    assert len({tuple(tokens) for tokens in expected}) == n, "the control: they differ"
    used: list[int] = []
    answers = await together(
        workers, prompt, n, at=n * 36, then=lambda: used.append(inside.admission.pool.num_used), max_tokens=40
    )
    assert answers == expected
    # 36 tokens into each answer: the prompt's whole blocks once, and what each answer has filled of its own.
    own = (length + 40) // BLOCK_SIZE - length // BLOCK_SIZE
    assert length // BLOCK_SIZE <= used[0] <= length // BLOCK_SIZE + n * own
    await inside.assert_all_free()


async def test_answers_that_end_at_different_times(serve: Serve, make_prompt: Any) -> None:
    """A stop token of one is an ordinary token of another."""
    workers = await serve(64)
    prompt = make_prompt(70)
    free = await alone(workers, prompt, 4, max_tokens=60)
    stops = [free[1][20], free[3][33]]
    expected = await alone(workers, prompt, 4, max_tokens=60, stop_token_ids=stops)
    assert len({len(tokens) for tokens in expected}) >= 3
    assert await together(workers, prompt, 4, max_tokens=60, stop_token_ids=stops) == expected
    await Inside.of(workers).assert_all_free()


async def test_answers_survive_a_swap(serve: Serve, make_prompt: Any) -> None:
    """Two requests of three answers each in a pool for hardly more than one of them."""
    workers = await serve(12)
    inside = Inside.of(workers)
    prompts = [make_prompt(70, seed=1), make_prompt(40, seed=2)]
    expected = [await alone(workers, prompt, 3, max_tokens=80) for prompt in prompts]
    assert inside.admission.num_swaps == 0
    results = await asyncio.gather(*(together(workers, prompt, 3, max_tokens=80) for prompt in prompts))
    assert results == expected
    assert inside.admission.num_swaps > 0
    await inside.assert_all_free()


@pytest.mark.parametrize("after", [1, 5, 40])
async def test_a_cancel_frees_all_of_them(serve: Serve, make_prompt: Any, after: int) -> None:
    workers = await serve(64)
    sampling = worker_pb2.SamplingParams(n=4, seed=SEED, max_tokens=200, **OPTIONS)
    stream = call(workers, request(workers, make_prompt(100), sampling=sampling))
    for _ in range(after):
        await stream.read()
    assert Inside.of(workers).admission.pool.num_used > 0
    stream.cancel()
    await Inside.of(workers).assert_all_free()


async def test_more_answers_than_slots(serve: Serve, make_prompt: Any) -> None:
    workers = await serve(64, max_num_seqs=3)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await together(workers, make_prompt(10), 4, max_tokens=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "4 answers" in (caught.value.details() or "")
    assert len(await together(workers, make_prompt(10), 3, max_tokens=5)) == 3
    await Inside.of(workers).assert_all_free()
