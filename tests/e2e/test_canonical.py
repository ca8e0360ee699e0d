"""A cache hit never changes an answer: block bytes and tokens, for every way in which a prompt's blocks can come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvferry.deploy.causal_lm import SUPPORTED_FAMILIES
from kvferry.deploy.worker_server import ModelRuntime
from kvferry.kvstore.identity import namespace_of
from kvferry.kvstore.key import block_keys

BLOCK_SIZE = 32
NUM_BLOCKS = 5
PROMPT_TOKENS = NUM_BLOCKS * BLOCK_SIZE + 7


def keys_of(runtime: ModelRuntime, token_ids: list[int], tenant: str = "default") -> list[bytes]:
    namespace = namespace_of(runtime.identity, tenant=tenant, block_size=BLOCK_SIZE)
    return block_keys(namespace, token_ids)


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
async def test_same_bytes_and_tokens_however_the_blocks_come(
    family: str,
    runtime: Callable[[str], ModelRuntime],
    load_runtime: Callable[..., ModelRuntime],
    serve_workers: Any,
    make_store: Any,
    make_prompt: Any,
) -> None:
    token_ids = make_prompt(PROMPT_TOKENS)
    worker = runtime(family)
    keys = keys_of(worker, token_ids)

    alone = await (await serve_workers(worker)).generate(token_ids)
    store = await make_store()
    cold = await (await serve_workers(worker, store.address)).generate(token_ids)
    assert cold.num_cached_tokens == 0
    assert cold.tokens == alone.tokens
    records = await store.records(keys)
    assert all(record is not None for record in records)

    # Full hit, on a decode worker with an empty pool.
    hit = await (await serve_workers(worker, store.address)).generate(token_ids)
    assert hit.num_cached_tokens == NUM_BLOCKS * BLOCK_SIZE
    assert hit.usage.prefill.store_tokens_written == 0
    assert hit.usage.store_tokens_read == NUM_BLOCKS * BLOCK_SIZE
    assert hit.tokens == alone.tokens

    # Partial hit at every block boundary: the rest is computed again, to the same bytes.
    for boundary in range(NUM_BLOCKS):
        await store.backend.delete(keys[boundary:])
        partial = await (await serve_workers(worker, store.address)).generate(token_ids)
        assert partial.num_cached_tokens == boundary * BLOCK_SIZE
        assert partial.tokens == alone.tokens
        assert await store.records(keys) == records

    # Another worker, loaded by itself, on an empty store.
    other = load_runtime(family)
    assert other.identity == worker.identity
    empty = await make_store()
    elsewhere = await (await serve_workers(other, empty.address)).generate(token_ids)
    assert elsewhere.tokens == alone.tokens
    assert await empty.records(keys) == records

    # Recompute after the loss of everything.
    await store.backend.delete(None)
    lost = await (await serve_workers(worker, store.address)).generate(token_ids)
    assert lost.num_cached_tokens == 0
    assert lost.tokens == alone.tokens
    assert await store.records(keys) == records
    other.engine.close()


@pytest.mark.parametrize("length", [1, 2, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 3 * BLOCK_SIZE])
async def test_every_length_around_the_grid(
    length: int, runtime: Callable[[str], ModelRuntime], serve_workers: Any, make_store: Any, make_prompt: Any
) -> None:
    """Answers long enough to fill blocks during decode, from prompts that end on and beside the grid."""
    token_ids = make_prompt(length, seed=length)
    worker = runtime("llama")
    alone = await (await serve_workers(worker)).generate(token_ids, max_tokens=2 * BLOCK_SIZE + 3)
    assert len(alone.tokens) == 2 * BLOCK_SIZE + 3
    store = await make_store()
    for expected in (0, (length - 1) // BLOCK_SIZE * BLOCK_SIZE):
        answer = await (await serve_workers(worker, store.address)).generate(token_ids, max_tokens=2 * BLOCK_SIZE + 3)
        assert answer.num_cached_tokens == expected
        assert answer.tokens == alone.tokens


async def test_a_shared_prefix_is_a_hit_for_another_prompt(
    runtime: Callable[[str], ModelRuntime], serve_workers: Any, make_store: Any, make_prompt: Any
) -> None:
    prefix = make_prompt(4 * BLOCK_SIZE)
    first, second = prefix + make_prompt(20, seed=1), prefix + make_prompt(25, seed=2)
    worker = runtime("llama")
    oracle = await (await serve_workers(worker)).generate(second)
    workers = await serve_workers(worker, (await make_store()).address)
    await workers.generate(first)
    answer = await workers.generate(second)
    assert answer.num_cached_tokens == 4 * BLOCK_SIZE
    assert answer.usage.num_local_tokens == 4 * BLOCK_SIZE  # the decode worker still has them, too
    assert answer.usage.store_tokens_read == 0
    assert answer.tokens == oracle.tokens


async def test_tenants_do_not_share_blocks(
    runtime: Callable[[str], ModelRuntime], serve_workers: Any, make_store: Any, make_prompt: Any
) -> None:
    token_ids = make_prompt(3 * BLOCK_SIZE + 5)
    workers = await serve_workers(runtime("llama"), (await make_store()).address)
    first = await workers.generate(token_ids, tenant="one")
    other = await workers.generate(token_ids, tenant="two")
    again = await workers.generate(token_ids, tenant="two")
    assert (first.num_cached_tokens, other.num_cached_tokens, again.num_cached_tokens) == (0, 0, 3 * BLOCK_SIZE)
    assert other.usage.num_local_tokens == 0
    assert first.tokens == other.tokens == again.tokens


async def test_company_in_the_batch_changes_nothing(
    runtime: Callable[[str], ModelRuntime], serve_workers: Any, make_prompt: Any
) -> None:
    import asyncio

    worker = runtime("llama")
    prompts = [make_prompt(20 + 37 * i, seed=i) for i in range(9)]
    options = [
        {"temperature": 0.9, "seed": i, "top_p": 0.9} if i % 2 else {"repetition_penalty": 1.2} for i in range(9)
    ]
    workers = await serve_workers(worker)
    alone = [await workers.generate(p, max_tokens=40, **o) for p, o in zip(prompts, options, strict=True)]
    together = await asyncio.gather(
        *(workers.generate(p, max_tokens=40, **o) for p, o in zip(prompts, options, strict=True))
    )
    assert [a.tokens for a in together] == [a.tokens for a in alone]
