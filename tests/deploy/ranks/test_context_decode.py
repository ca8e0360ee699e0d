"""A decode worker of several ranks that divide each context, in real processes, against one of a single rank."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import torch
from support.decode_calls import Inside

from kvferry.decode.config import DecodeConfig
from kvferry.deploy.ranks.context_memory import ContextMemory
from kvferry.deploy.worker_server import ModelRuntime

BLOCK_SIZE = 32
LOGPROB_ERROR = 2e-3
"""Of a natural logarithm; measured on these models: below 4e-4."""
PACKED_LOGPROB_ERROR = 3e-2
"""Once decode has packed a block itself: K and V that differ in their last bits may get another code. Measured:
6e-3."""
Start = Callable[..., Any]


@pytest.fixture(scope="module")
def divided(load_runtime: Callable[..., ModelRuntime]) -> Iterator[Callable[..., ModelRuntime]]:
    """The runtime of a worker of so many ranks; kept for the module."""
    made: dict[tuple[str, int], ModelRuntime] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def get(size: int, family: str = "llama") -> ModelRuntime:
        if (family, size) not in made:
            made[family, size] = load_runtime(family, context_parallel=size)
        return made[family, size]

    yield get
    for runtime in made.values():
        runtime.close()
    torch.set_num_threads(threads)


@pytest.fixture
def serve(serve_workers: Start, runtime: Callable[[str], ModelRuntime], divided: Callable[..., ModelRuntime]) -> Start:
    """Prefill by one rank, decode by `size` of them."""

    async def start(size: int, family: str = "llama", **config: Any) -> Any:
        return await serve_workers(
            runtime(family),
            decode_config=DecodeConfig(**{"kv_memory": 32 * 2**20} | config),
            decode_runtime=divided(size, family) if size > 1 else runtime(family),
        )

    return start


def logprobs(answer: Any) -> torch.Tensor:
    return torch.tensor([chunk.logprob for chunk in answer.chunks])


@pytest.mark.parametrize(
    ("size", "family"),
    [
        (3, "llama"),
        (2, "gemma3_text"),
        *(pytest.param(2, family, marks=pytest.mark.deep) for family in ("llama", "mistral", "gemma2", "qwen3")),
    ],
)
async def test_the_tokens_are_those_of_one_rank(serve: Start, make_prompt: Any, size: int, family: str) -> None:
    """Contexts without a block, of one and of many, which grow over several blocks; windows and a soft cap."""
    one, several = await serve(1, family), await serve(size, family)
    for length in (20, 301):
        asked: Any = dict(max_tokens=BLOCK_SIZE + 15, logprobs=True)
        expected = await one.generate(make_prompt(length), **asked)
        answer = await several.generate(make_prompt(length), **asked)
        assert answer.tokens == expected.tokens
        assert logprobs(expected).all()
        error = (logprobs(answer) - logprobs(expected)).abs()
        until_packed = BLOCK_SIZE - length % BLOCK_SIZE
        assert error[:until_packed].max() < LOGPROB_ERROR
        assert error.max() < PACKED_LOGPROB_ERROR
    await Inside.of(several).assert_all_free()


async def test_what_one_rank_cannot_hold_two_do(serve: Start, make_prompt: Any) -> None:
    """Six blocks a rank: a context of ten fits two ranks and not one, and on two one of thirteen does not fit."""
    block = 3 * 2 * 24 * 64
    one, two = await serve(1, kv_memory=6 * block), await serve(2, kv_memory=2 * 6 * block)
    whole = await serve(1)
    prompt = make_prompt(9 * BLOCK_SIZE + 7)
    expected = await whole.generate(prompt, max_tokens=BLOCK_SIZE)
    assert (await two.generate(prompt, max_tokens=BLOCK_SIZE)).tokens == expected.tokens
    await Inside.of(two).assert_all_free()
    for workers, refused, problem in (
        (one, prompt, "10 blocks"),
        (two, make_prompt(13 * BLOCK_SIZE), "7 blocks on its"),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=problem) as error:
            await workers.generate(refused, max_tokens=BLOCK_SIZE)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_company_swaps_and_the_pool_change_no_bit(serve: Start, make_prompt: Any) -> None:
    """Alone with an empty pool; then all at once, in a pool for half of them, so that they are swapped out and in on
    all ranks, and some find their prompt's blocks there."""
    block = 3 * 2 * 24 * 64
    workers = await serve(2, kv_memory=2 * 9 * block)
    inside = Inside.of(workers)
    prompts = [make_prompt(40 + 31 * i, seed=i) for i in range(5)]
    asked: Any = dict(max_tokens=3 * BLOCK_SIZE, logprobs=True)
    alone = [await workers.generate(prompt, **asked) for prompt in prompts]
    assert inside.admission.num_swaps == 0
    together = await asyncio.gather(*(workers.generate(prompt, **asked) for prompt in prompts))
    assert inside.admission.num_swaps > 0
    for a, b in zip(alone, together, strict=True):
        assert a.tokens == b.tokens
        assert torch.equal(logprobs(a), logprobs(b))
    await workers.generate(prompts[0], **asked)
    again = await workers.generate(prompts[0], **asked)
    assert again.usage.num_local_tokens > 0 and again.tokens == alone[0].tokens
    await inside.assert_all_free()


async def test_several_answers_share_the_prompt(serve: Start, make_prompt: Any) -> None:
    """Three sampled answers, each with blocks of its own on another rank than the prompt's last. They are not compared
    with one rank's: a draw from 49,152 tokens that are nearly as likely shows the last bits."""
    workers = await serve(2)
    prompt, asked = make_prompt(3 * BLOCK_SIZE + 5), dict(max_tokens=BLOCK_SIZE + 9, temperature=0.8, seed=3)
    together: dict[int, list[int]] = {}
    async for chunk in workers.stream(prompt, **asked, n=3):
        together.setdefault(chunk.choice, []).append(chunk.token_id)
    assert len(set(map(tuple, together.values()))) == 3
    assert (await workers.generate(prompt, **asked)).tokens == together[0]
    await Inside.of(workers).assert_all_free()


@pytest.mark.parametrize("where", ["leader", "follower"])
async def test_what_fails_on_one_rank_fails_the_step_only(
    serve: Start, make_prompt: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The request ends with an error, on whichever rank it was; the worker goes on with the tokens that it had."""
    workers = await serve(2)
    prompt = make_prompt(3 * BLOCK_SIZE + 5)
    expected = await workers.generate(prompt, max_tokens=8)
    memory = Inside.of(workers).engine._executor.memory
    assert isinstance(memory, ContextMemory)
    tables_of, kernels = memory.tables_of, memory.own._kernels
    share_attention = kernels.share_attention
    num_faults = 0

    def faulty_tables(rank: int, block_tables: list[list[int]]) -> list[Any]:
        nonlocal num_faults
        tables = tables_of(rank, block_tables)
        if rank == 1 and not num_faults:
            num_faults += 1
            return [["no block"] for _ in tables]
        return tables

    def faulty_attention(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal num_faults
        if options["layer"] == 1 and not num_faults:
            num_faults += 1
            raise ValueError("no attention")
        return share_attention(*args, **options)

    if where == "follower":
        monkeypatch.setattr(memory, "tables_of", faulty_tables)
    else:
        monkeypatch.setattr(kernels, "share_attention", faulty_attention)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await workers.generate(prompt, max_tokens=8)
    assert error.value.code() is grpc.StatusCode.INTERNAL
    assert num_faults == 1
    assert (await workers.generate(prompt, max_tokens=8)).tokens == expected.tokens
    await Inside.of(workers).assert_all_free()


def test_ranks_change_no_key(runtime: Callable[[str], ModelRuntime], divided: Callable[..., ModelRuntime]) -> None:
    """What is published comes from prefill, which knows nothing of shares."""
    assert divided(2).identity == runtime("llama").identity
