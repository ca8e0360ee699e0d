"""A request's tokens do not depend on its company: hundreds of compositions of a batch, some with swaps."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from support.decode_calls import Inside

from kvferry.decode.config import DecodeConfig
from kvferry.deploy.worker_server import ModelRuntime

BLOCK_BYTES = 3 * 2 * 24 * 64
NUM_BLOCKS = 40
NUM_REQUESTS, NUM_COMPOSITIONS = (100, 500) if "KVFERRY_DEEP" in os.environ else (40, 200)


async def test_no_composition_changes_a_token(
    runtime: Callable[..., ModelRuntime],
    serve_workers: Any,
    make_prompt: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = await serve_workers(
        runtime(), None, DecodeConfig(kv_memory=NUM_BLOCKS * BLOCK_BYTES, max_num_seqs=9, max_waiting=200)
    )
    inside = Inside.of(workers)
    rng = random.Random(0)
    kinds: list[tuple[list[int], dict[str, Any]]] = [
        (
            make_prompt(rng.choice((3, 31, 32, 33, 70, 150, 300)), seed=i),
            {"max_tokens": rng.randint(30, 70), "temperature": rng.choice((0.0, 0.8)), "seed": i},
        )
        for i in range(16)
    ]
    expected = [(await workers.generate(prompt, **options)).tokens for prompt, options in kinds]

    compositions: set[tuple[tuple[int, int], ...]] = set()
    batch = inside.cache.batch

    def record(**arguments: Any) -> Any:
        contexts = zip(map(len, arguments["block_tables"]), arguments["tail_lens"], strict=True)
        compositions.add(tuple(contexts))
        return batch(**arguments)

    monkeypatch.setattr(inside.cache, "batch", record)

    async def ask() -> None:
        await asyncio.sleep(rng.random() * NUM_REQUESTS / 25)
        which = rng.randrange(len(kinds))
        prompt, options = kinds[which]
        answer = await workers.generate(prompt, **options, priority=rng.randint(0, 2), timeout=200)
        assert answer.tokens == expected[which]

    async with asyncio.timeout(240), asyncio.TaskGroup() as group:
        for _ in range(NUM_REQUESTS):
            group.create_task(ask())
    assert len(compositions) > NUM_COMPOSITIONS, len(compositions)
    assert inside.admission.num_swaps > 0
    await inside.assert_all_free()
