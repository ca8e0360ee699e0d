"""A cache hit never changes an answer with int8 weights either."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from kvferry.deploy.int8_linear import sums_are_exact
from kvferry.deploy.worker_server import ModelRuntime
from kvferry.kvstore.identity import namespace_of
from kvferry.kvstore.key import block_keys

BLOCK_SIZE = 32
NUM_BLOCKS = 3


@pytest.mark.parametrize("family", ["llama", "qwen2"])
async def test_cold_hit_and_partial_hit_agree(
    family: str, load_runtime: Callable[..., ModelRuntime], serve_workers: Any, make_store: Any, make_prompt: Any
) -> None:
    if not sums_are_exact():
        pytest.skip("this CPU's int8 matmul saturates")
    token_ids = make_prompt(NUM_BLOCKS * BLOCK_SIZE + 7)
    runtime, other = (load_runtime(family, weight_quantization="int8") for _ in range(2))
    assert runtime.rows_invariant and runtime.identity == other.identity
    keys = block_keys(namespace_of(runtime.identity, tenant="default", block_size=BLOCK_SIZE), token_ids)
    store, empty = await make_store(), await make_store()
    alone = await (await serve_workers(runtime)).generate(token_ids)
    cold = await (await serve_workers(runtime, store.address)).generate(token_ids)
    records = await store.records(keys)
    assert cold.num_cached_tokens == 0 and cold.tokens == alone.tokens
    assert all(record is not None for record in records)
    hit = await (await serve_workers(runtime, store.address)).generate(token_ids)
    assert hit.num_cached_tokens == NUM_BLOCKS * BLOCK_SIZE and hit.tokens == alone.tokens
    for boundary in range(NUM_BLOCKS):
        await store.backend.delete(keys[boundary:])
        partial = await (await serve_workers(runtime, store.address)).generate(token_ids)
        assert partial.num_cached_tokens == boundary * BLOCK_SIZE and partial.tokens == alone.tokens
        assert await store.records(keys) == records
    elsewhere = await (await serve_workers(other, empty.address)).generate(token_ids)
    assert elsewhere.tokens == alone.tokens and await empty.records(keys) == records

    prompts = [make_prompt(20 + 13 * i, seed=i) for i in range(5)]
    workers = await serve_workers(runtime)
    one_by_one = [await workers.generate(p, max_tokens=20) for p in prompts]
    together = await asyncio.gather(*(workers.generate(p, max_tokens=20) for p in prompts))
    assert [a.tokens for a in together] == [a.tokens for a in one_by_one]
    for each in (runtime, other):
        each.close()


async def test_other_weights_share_no_block(
    load_runtime: Callable[..., ModelRuntime], serve_workers: Any, make_store: Any, make_prompt: Any
) -> None:
    if not sums_are_exact():
        pytest.skip("this CPU's int8 matmul saturates")
    token_ids, store = make_prompt(2 * BLOCK_SIZE + 3), await make_store()
    runtimes = [load_runtime("llama"), load_runtime("llama", weight_quantization="int8")]
    for runtime in runtimes:
        answer = await (await serve_workers(runtime, store.address)).generate(token_ids)
        assert answer.num_cached_tokens == 0
        runtime.close()
