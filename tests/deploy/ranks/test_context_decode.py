"""A decode worker of several ranks that divide each context, in real processes, against one of a single rank."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import torch
from support.decode_calls import Inside

from kvferry.decode.config import DecodeConfig
from kvferry.deploy.worker_server import ModelConfig, ModelRuntime

BLOCK_SIZE = 32
LOGPROB_ERROR = 2e-3
"""Measured on these models: below 4e-4."""
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
    ("size", "family"), [(2, "llama"), (3, "llama"), (2, "mistral"), (2, "gemma2"), (2, "gemma3_text"), (2, "qwen3")]
)
async def test_the_tokens_are_those_of_one_rank(serve: Start, make_prompt: Any, size: int, family: str) -> None:
    """Contexts without a block, of one and of many, which grow over several blocks; windows and a soft cap."""
    one, several = await serve(1, family), await serve(size, family)
    for length in (20, 301):
        asked: Any = dict(max_tokens=BLOCK_SIZE + 15, top_logprobs=1)
        expected = await one.generate(make_prompt(length), **asked)
        answer = await several.generate(make_prompt(length), **asked)
        assert answer.tokens == expected.tokens
        assert (logprobs(answer) - logprobs(expected)).abs().max() < LOGPROB_ERROR
    await Inside.of(several).assert_all_free()
