"""After an answer its own blocks are computed as prefill computes them: the next turn finds the whole conversation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from support.decode_calls import Inside

from kvferry.decode.config import DecodeConfig
from kvferry.deploy.worker_server import ModelRuntime
from kvferry.kvstore.identity import namespace_of
from kvferry.kvstore.key import block_keys

BLOCK_SIZE = 32


async def published(workers: Any, count: int) -> None:
    """At least `count` answers are, and none is on its way."""
    async with asyncio.timeout(30):
        while (
            workers.decode_server.stats().decode.num_answers_published < count
            or workers.decode_server._decode[1].warmer._tasks
        ):
            await asyncio.sleep(0.01)


async def test_the_next_turn_computes_only_what_is_new(
    runtime: Callable[..., ModelRuntime], serve_workers: Any, make_store: Any, make_prompt: Any
) -> None:
    store = await make_store()
    workers = await serve_workers(runtime(), store.address)
    conversation = make_prompt(3 * BLOCK_SIZE + 10)
    for turn in range(1, 4):
        answer = await workers.generate(conversation, max_tokens=100)
        conversation += [*answer.tokens, *make_prompt(5, seed=turn)]
        await published(workers, turn)
        cold = await serve_workers(runtime())
        following = await workers.generate(conversation, max_tokens=8)
        assert following.num_cached_tokens == len(conversation) // BLOCK_SIZE * BLOCK_SIZE
        assert following.tokens == (await cold.generate(conversation, max_tokens=8)).tokens
    await Inside.of(workers).assert_all_free()


async def test_the_blocks_are_those_of_a_prompt(
    runtime: Callable[..., ModelRuntime], serve_workers: Any, make_store: Any, make_prompt: Any
) -> None:
    """Byte by byte what prefill stores when the conversation comes as a prompt."""
    one, other = await make_store(), await make_store()
    workers = await serve_workers(runtime(), one.address)
    prompt = make_prompt(40)
    conversation = prompt + (await workers.generate(prompt, max_tokens=120)).tokens
    await published(workers, 1)
    await (await serve_workers(runtime(), other.address)).generate(conversation, max_tokens=1)
    keys = block_keys(namespace_of(runtime().identity, tenant="default", block_size=BLOCK_SIZE), conversation)
    records = await one.records(keys)
    assert None not in records
    assert records == await other.records(keys)


async def test_not_without_a_new_block_and_not_when_it_is_off(
    runtime: Callable[..., ModelRuntime], serve_workers: Any, make_store: Any, make_prompt: Any
) -> None:
    store = await make_store()
    workers = await serve_workers(runtime(), store.address)
    await workers.generate(make_prompt(40), max_tokens=10)
    off = await serve_workers(runtime(), store.address, DecodeConfig(kv_memory=2**25, publish_answers=False))
    await off.generate(make_prompt(41), max_tokens=60)
    for each in (workers, off):
        assert not each.decode_server._decode[1].warmer._tasks
        assert each.decode_server.stats().decode.num_answers_published == 0
