"""Workers whose way to the store leads through a relay."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from support.fault_relay import FaultRelay
from support.store_requests import PROMPT_TOKENS, Requests

from kvferry.deploy.worker_server import ModelRuntime


@pytest.fixture
def worker(runtime: Callable[[str], ModelRuntime]) -> ModelRuntime:
    return runtime("llama")


@pytest.fixture
async def relay() -> AsyncIterator[FaultRelay]:
    relay = FaultRelay()
    await relay.start()
    yield relay
    await relay.stop()


@pytest.fixture
async def requests(worker: ModelRuntime, relay: FaultRelay, serve_workers: Any, make_prompt: Any) -> Requests:
    token_ids = make_prompt(PROMPT_TOKENS)
    oracle = (await (await serve_workers(worker)).generate(token_ids)).tokens
    return Requests(worker, await serve_workers(worker, relay.address), token_ids, oracle)
