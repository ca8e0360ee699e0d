"""Layers with a sliding window keep a ring of blocks: less memory, the same tokens on every way into the pool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from support.decode_calls import Inside

from kvferry.decode.config import DecodeConfig
from kvferry.deploy.worker_server import ModelRuntime

FAMILIES = ("mistral", pytest.param("gemma2", marks=pytest.mark.deep), "gemma3_text")
WINDOW, BLOCK_SIZE = 75, 32
PROMPT, ANSWER = 7 * BLOCK_SIZE + 5, 150


@pytest.fixture
def serve(runtime: Callable[..., ModelRuntime], serve_workers: Any) -> Any:
    def start(family: str, store: str | None = None, *, kv_memory: int = 32 * 2**20, **config: Any) -> Any:
        return serve_workers(runtime(family), store, DecodeConfig(kv_memory=kv_memory, **config))

    return start


async def without_rings(workers: Any, prompt: list[int], **options: Any) -> list[int]:
    """The tokens of a worker that keeps every block of every layer."""
    return (await workers.generate(prompt, **options)).tokens


@pytest.fixture
async def expected(
    runtime: Callable[..., ModelRuntime], serve_workers: Any, make_prompt: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Any]:
    async def compute(family: str) -> list[int]:
        with monkeypatch.context() as patch:
            for holder in (runtime(family), runtime(family).rank):
                patch.setattr(holder, "windows", (None,) * 3)
            workers = await serve_workers(runtime(family))
        assert Inside.of(workers).cache.ring_blocks == 0
        return (await workers.generate(make_prompt(PROMPT), max_tokens=ANSWER)).tokens

    return compute


@pytest.mark.parametrize("family", FAMILIES)
async def test_rings_change_no_token(serve: Any, expected: Any, make_store: Any, make_prompt: Any, family: str) -> None:
    """Computed, from the store, from this worker's pool, two at once."""
    store = await make_store()
    workers = await serve(family, store.address)
    inside = Inside.of(workers)
    assert inside.cache.ring_blocks == 3
    tokens = await expected(family)
    prompt = make_prompt(PROMPT)
    assert (await workers.generate(prompt, max_tokens=ANSWER)).tokens == tokens
    again = await workers.generate(prompt, max_tokens=ANSWER)
    assert again.tokens == tokens
    assert again.num_cached_tokens == again.usage.num_local_tokens == 7 * BLOCK_SIZE
    assert again.usage.store_tokens_read == 3 * BLOCK_SIZE  # what layers with a window see
    both = await asyncio.gather(*(workers.generate(prompt, max_tokens=ANSWER) for _ in range(2)))
    assert [answer.tokens for answer in both] == [tokens, tokens]
    other = await serve(family, store.address)
    assert (await other.generate(prompt, max_tokens=ANSWER)).tokens == tokens
    await inside.assert_all_free()


@pytest.mark.parametrize("family", FAMILIES)
async def test_rings_survive_a_swap(serve: Any, expected: Any, make_prompt: Any, family: str) -> None:
    tokens = await expected(family)
    workers = await serve(family, max_num_seqs=1)
    displaced = asyncio.create_task(workers.generate(make_prompt(PROMPT), max_tokens=ANSWER, priority=1))
    inside = Inside.of(workers)
    async with asyncio.timeout(30):
        while not inside.engine.num_running:
            await asyncio.sleep(0.005)
    await workers.generate(make_prompt(50, seed=1), max_tokens=40)
    assert inside.admission.num_swaps == 1
    assert (await displaced).tokens == tokens


@pytest.mark.parametrize(("family", "windowed"), [("mistral", 3), ("gemma2", 2), ("gemma3_text", 2)])
async def test_what_rings_save(serve: Any, runtime: Any, family: str, windowed: int) -> None:
    """A block in the pool takes only the layers that see everything."""
    workers = await serve(family)
    cache = Inside.of(workers).cache
    layer_bytes = runtime(family).layout.block_bytes // 3
    assert cache.pool.shape[1] == (3 - windowed) * layer_bytes
    assert cache.rings.shape[1:] == (3, windowed * layer_bytes)
