"""A request's blocks are freed when it ends, not when Python next looks for cycles: they may be hundreds of MB."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.decode_calls import call, read, request

from kvferry.deploy.worker_server import ModelRuntime
from kvferry.prefill.prompt_blocks import LocalPromptBlocks
from kvferry.proto import worker_pb2


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def no_blocks_left() -> None:
    async with asyncio.timeout(20):
        while any(type(thing) is LocalPromptBlocks for thing in gc.get_objects()):
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("store", [False, True], ids=["no store", "store"])
async def test_blocks_are_freed(
    runtime: Callable[..., ModelRuntime],
    serve_workers: Any,
    make_store: Any,
    make_prompt: Any,
    no_gc: None,
    store: bool,
) -> None:
    workers = await serve_workers(runtime(), (await make_store()).address if store else None)
    await workers.generate(make_prompt(200), tenant="freed")
    await no_blocks_left()
    for delay_s in (0.0, 0.02, 0.1):
        stream = call(workers, request(workers, make_prompt(1500, seed=1), tenant="freed"))
        await asyncio.sleep(delay_s)
        stream.cancel()
    stream = call(workers, request(workers, make_prompt(300), sampling=worker_pb2.SamplingParams(max_tokens=500)))
    await read(stream, 2)
    stream.cancel()
    await no_blocks_left()
