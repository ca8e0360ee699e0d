"""When a finished block is put: at once where decode waits for it, else when its prompt is computed, or in a while."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kvferry.deploy.worker_server import ModelRuntime
from kvferry.kernels.sampling import SamplingParams
from kvferry.kvstore.client import LookupResult
from kvferry.kvstore.identity import namespace_of
from kvferry.prefill.config import PrefillConfig
from kvferry.prefill.fetch_policy import AlwaysFetch
from kvferry.prefill.pieces import Seal
from kvferry.prefill.session import BlockReady, PrefillSession, PrefillUsage

BLOCK_SIZE = 32
NUM_BLOCKS = 3
LIMIT_S = 60.0


class EmptyStore:
    """Has nothing, and takes everything."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.changed = asyncio.Event()

    def of_chain(self, keys: Sequence[bytes]) -> EmptyStore:
        return self

    async def lookup(self, keys: Sequence[bytes], **options: Any) -> LookupResult:
        return LookupResult(0, 0, 0.0)

    async def put(self, key: bytes, record: bytes, **options: Any) -> bool:
        self.keys.append(key)
        self.changed.set()
        return True


@pytest.mark.parametrize(
    ("pieces_of", "delay_s", "is_at_once"),
    [(None, 600.0, True), ([], 600.0, True), ([0, 1, 2], 600.0, False), ([0, 1, 2], 0.0, True), ([1, 2], 600.0, True)],
    ids=["decode asks the store", "it has them", "in pieces", "in pieces, no delay", "the first one not in pieces"],
)
async def test_when_the_first_block_is_put(
    pieces_of: list[int] | None,
    delay_s: float,
    is_at_once: bool,
    runtime: Callable[[str], ModelRuntime],
    make_prompt: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second pass is held: only what does not wait for the prompt's end can be put before it."""
    worker, store = runtime("llama"), EmptyStore()
    executor, may_go_on = worker.engine._executor, threading.Event()
    inner, num_passes = executor.run, 0

    def run(*arguments: Any) -> Any:
        nonlocal num_passes
        num_passes += 1
        assert num_passes == 1 or may_go_on.wait(LIMIT_S)
        return inner(*arguments)

    monkeypatch.setattr(executor, "run", run)
    monkeypatch.setattr(worker.engine, "_max_pass_blocks", 1)
    tenant = f"{pieces_of} {delay_s}"  # or the engine has the blocks of the last case still
    session = PrefillSession(
        token_ids=make_prompt(NUM_BLOCKS * BLOCK_SIZE + 5, seed=11),
        sampling=SamplingParams(),
        namespace=namespace_of(worker.identity, tenant=tenant, block_size=BLOCK_SIZE),
        engine=worker.engine,
        store=store,  # type: ignore[arg-type]  # what a session calls
        fetch_policy=AlwaysFetch(),
        config=PrefillConfig(publish_delay_s=delay_s),
        remaining_s=LIMIT_S,
        pieces_of=pieces_of,
    )
    running = asyncio.create_task(session.run())
    try:
        async with asyncio.timeout(LIMIT_S):
            if is_at_once:
                await store.changed.wait()
            else:
                assert session.pieces is not None
                while not any(isinstance(part, Seal) for part in await session.pieces.next()):
                    pass
                await asyncio.sleep(0.1)
            assert len(store.keys) == is_at_once
            may_go_on.set()
            events = []
            while not isinstance(event := await session.next_event(), PrefillUsage):
                events.append(event)
            await running
    finally:
        may_go_on.set()
        running.cancel()
    assert store.keys == session._keys and event.store_tokens_written == NUM_BLOCKS * BLOCK_SIZE
    announced = {block.index for block in events if isinstance(block, BlockReady)}
    assert announced == set(range(NUM_BLOCKS)) - set(pieces_of or ())
