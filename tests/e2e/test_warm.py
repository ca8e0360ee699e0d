"""`Warm`: a prompt's blocks are computed and stored ahead, and the request that comes later finds them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from kvferry.deploy.assembly import make_gateway
from kvferry.deploy.client import AsyncClient, DeadlineExceeded, InvalidRequest, Unavailable
from kvferry.deploy.settings import GatewaySettings, Settings
from kvferry.deploy.worker_server import ModelRuntime

BLOCK_SIZE = 32
LENGTH = 6 * BLOCK_SIZE + 9


@pytest.fixture
async def serve(runtime: Callable[[str], ModelRuntime], serve_workers: Any) -> AsyncIterator[Callable[..., Any]]:
    """Starts workers and a gateway: `client, address, workers = await serve(store_address)`."""
    started: list[Any] = []

    async def start(store_address: str | None) -> Any:
        worker = runtime("llama")
        workers = await serve_workers(worker, store_address)
        settings = Settings(
            model=worker.loaded.source.path,
            served_model_name=worker.info(roles=["decode"]).model_name,
            gateway=GatewaySettings(port=0),
        )
        gateway = await make_gateway(settings, prefill=[workers.prefill_address], decode=[workers.decode_address])
        port = await gateway.start()
        await gateway.wait_until_serving(30)
        client = AsyncClient(f"127.0.0.1:{port}")
        started.append((gateway, client))
        return client, f"127.0.0.1:{port}", workers

    yield start
    for gateway, client in started:
        await client.close()
        await gateway.stop(0)


async def test_the_next_request_finds_the_blocks(serve: Any, make_store: Any, make_prompt: Any) -> None:
    """On other workers, too; the answer is that of a deployment without a store."""
    token_ids = make_prompt(LENGTH)
    expected = await (await serve(None))[0].generate(token_ids=token_ids, max_tokens=8)
    store = await make_store()
    client, _, _ = await serve(store.address)
    done = await client.warm(token_ids=token_ids)
    assert (done.prompt_tokens, done.block_tokens) == (LENGTH, 6 * BLOCK_SIZE)
    assert (done.cached_tokens, done.stored_tokens) == (0, 6 * BLOCK_SIZE)
    again = await client.warm(token_ids=token_ids)
    assert (again.cached_tokens, again.stored_tokens) == (6 * BLOCK_SIZE, 0)
    other, _, _ = await serve(store.address)
    answer = await other.generate(token_ids=token_ids, max_tokens=8)
    assert answer.usage.cached_tokens == 6 * BLOCK_SIZE
    assert answer.token_ids == expected.token_ids


async def test_a_conversation_is_warmed_by_its_messages(serve: Any, make_store: Any) -> None:
    client, _, _ = await serve((await make_store()).address)
    messages = [{"role": "user", "content": " ".join(f"word{i}" for i in range(60))}]
    done = await client.warm(messages=messages)
    assert done.stored_tokens == done.block_tokens > 0
    answer = await client.generate(messages=messages, max_tokens=4)
    assert answer.usage.prompt_tokens == done.prompt_tokens
    assert answer.usage.cached_tokens == done.block_tokens


async def test_prompts_that_cannot_be_warmed(serve: Any, make_store: Any, make_prompt: Any) -> None:
    client, _, workers = await serve((await make_store()).address)
    short = await client.warm(token_ids=make_prompt(5))
    assert (short.prompt_tokens, short.block_tokens, short.stored_tokens) == (5, 0, 0)
    with pytest.raises(InvalidRequest, match="5,000 tokens; the model takes 2,047"):
        await client.warm(token_ids=make_prompt(5000))
    with pytest.raises(InvalidRequest):
        await client.warm("")
    with pytest.raises(DeadlineExceeded):
        await client.warm(token_ids=make_prompt(2000, seed=5), timeout=0.02)
    servicer = workers.prefill_server.prefill_servicer
    async with asyncio.timeout(30):
        while servicer.num_requests:
            await asyncio.sleep(0.01)
    await workers.prefill_server.stop(0)
    with pytest.raises(Unavailable):
        await client.warm(token_ids=make_prompt(LENGTH))


async def test_the_command(serve: Any, make_store: Any) -> None:
    _, address, _ = await serve((await make_store()).address)
    text = " ".join(f"word{i}" for i in range(60))
    command = [
        sys.executable,
        "-m",
        "kvferry.deploy.cli",
        "generate",
        text,
        "--raw",
        "--address",
        address,
        "--prefetch",
    ]
    process = await asyncio.create_subprocess_exec(
        *command, "--json", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, error = await asyncio.wait_for(process.communicate(), 100)
    assert process.returncode == 0, error
    done = json.loads(out)
    assert done["stored_tokens"] == done["block_tokens"] > 0
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await asyncio.wait_for(process.communicate(), 100)
    assert f"{done['block_tokens']} were in the store, 0 were stored now" in out.decode()
