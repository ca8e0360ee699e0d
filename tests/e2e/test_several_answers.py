"""`n` answers from one prefill: each is what a request of its own with its seed gives, and the prompt is held once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from support.decode_calls import Inside, call, request

from kvferry.decode.config import DecodeConfig
from kvferry.deploy.worker_server import ModelRuntime
from kvferry.proto import worker_pb2

BLOCK_SIZE = 32
BLOCK_BYTES = 3 * 2 * 24 * 64


async def answers(workers: Any, prompt: list[int], n: int, **sampling: Any) -> list[list[int]]:
    """The tokens of each answer; indexes have no gap and no repeat."""
    tokens: list[list[int]] = [[] for _ in range(n)]
    ended = [""] * n
    message = request(workers, prompt, sampling=worker_pb2.SamplingParams(n=n, **sampling))
    async for chunk in call(workers, message, timeout=60):
        assert chunk.index == len(tokens[chunk.choice]) and not ended[chunk.choice]
        tokens[chunk.choice].append(chunk.token_id)
        ended[chunk.choice] = chunk.finish_reason
    assert all(ended)
    return tokens


@pytest.mark.parametrize(
    ("family", "length"),
    [("llama", 10), ("llama", 2 * BLOCK_SIZE), ("llama", 5 * BLOCK_SIZE + 7), ("gemma3_text", 5 * BLOCK_SIZE + 7)],
    ids=["no block", "no tail", "both", "rings"],
)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "seed": 2**64 - 2},  # seeds go on at 0
        {"temperature": 0.8, "seed": 5, "frequency_penalty": 0.7, "stop_token_ids": list(range(0, 49152, 9))},
    ],
    ids=["plain", "some end early"],
)
async def test_each_is_that_of_a_request_of_its_own(
    runtime: Callable[..., ModelRuntime],
    serve_workers: Any,
    make_prompt: Any,
    family: str,
    options: dict[str, Any],
    length: int,
) -> None:
    workers = await serve_workers(runtime(family))
    prompt, seed = make_prompt(length), options["seed"]
    together = await answers(workers, prompt, 4, max_tokens=50, **options)
    alone = [
        (await workers.generate(prompt, max_tokens=50, **{**options, "seed": (seed + i) % 2**64})).tokens
        for i in range(4)
    ]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) == 4
    await Inside.of(workers).assert_all_free()


async def test_the_prompt_is_held_once(
    runtime: Callable[..., ModelRuntime], serve_workers: Any, make_prompt: Any
) -> None:
    workers = await serve_workers(runtime())
    inside = Inside.of(workers)
    sampling = worker_pb2.SamplingParams(n=8, max_tokens=40, temperature=1.0)
    stream = call(workers, request(workers, make_prompt(6 * BLOCK_SIZE + 1), sampling=sampling))
    for _ in range(9):  # the first tokens come from prefill
        await stream.read()
    assert inside.admission.pool.num_used == 6 + 8
    stream.cancel()
    await inside.assert_all_free()


async def test_they_are_swapped_out_together(
    runtime: Callable[..., ModelRuntime], serve_workers: Any, make_prompt: Any
) -> None:
    workers = await serve_workers(runtime(), None, DecodeConfig(kv_memory=64 * BLOCK_BYTES, max_num_seqs=3))
    inside = Inside.of(workers)
    prompt, options = make_prompt(70), {"max_tokens": 90, "temperature": 1.0, "seed": 1}
    expected = await answers(workers, prompt, 3, **options)
    task = asyncio.create_task(answers(workers, prompt, 3, **options))
    async with asyncio.timeout(20):
        while inside.engine.num_running < 3:
            await asyncio.sleep(0.005)
    await workers.generate(make_prompt(20, seed=2), max_tokens=20, priority=-1)
    assert inside.admission.num_swaps == 1
    assert await task == expected
    await inside.assert_all_free()


async def test_more_than_the_worker_decodes_at_once(
    runtime: Callable[..., ModelRuntime], serve_workers: Any, make_prompt: Any
) -> None:
    workers = await serve_workers(runtime(), None, DecodeConfig(kv_memory=64 * BLOCK_BYTES, max_num_seqs=3))
    with pytest.raises(Exception, match="asks for 4 answers and this worker decodes 3 sequences"):
        await answers(workers, make_prompt(20), 4, max_tokens=5)
    await Inside.of(workers).assert_all_free()
