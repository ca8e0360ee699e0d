"""Client to gateway to workers to store and back, over real sockets, with the client library."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from kvferry.deploy.assembly import make_gateway
from kvferry.deploy.client import AsyncClient, DeadlineExceeded, InvalidRequest
from kvferry.deploy.gateway_server import GatewayServer
from kvferry.deploy.models import find_model, load_tokenizer
from kvferry.deploy.settings import GatewaySettings, Settings
from kvferry.deploy.worker_server import ModelRuntime

WINDOW = 2048


@dataclass
class Stack:
    client: AsyncClient
    gateway: GatewayServer
    workers: Any
    store: Any
    tokenizer: PreTrainedTokenizerBase


@pytest.fixture
async def stack(runtime: Callable[[str], ModelRuntime], serve_workers: Any, make_store: Any) -> AsyncIterator[Stack]:
    worker = runtime("llama")
    store = await make_store()
    workers = await serve_workers(worker, store.address)
    settings = Settings(
        model=worker.loaded.source.path,
        served_model_name=worker.info(roles=["decode"]).model_name,
        gateway=GatewaySettings(port=0, max_prompt_bytes=100_000),
    )
    gateway = await make_gateway(settings, prefill=[workers.prefill_address], decode=[workers.decode_address])
    port = await gateway.start()
    await gateway.wait_until_serving(30)
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        tokenizer = load_tokenizer(find_model(worker.loaded.source.path))
        yield Stack(client, gateway, workers, store, tokenizer)
    await gateway.stop(0)


def text_of(num_words: int) -> str:
    return " ".join(f"word{i}" for i in range(num_words))


async def idle(stack: Stack) -> float:
    """Seconds until neither worker holds a request; the promise after a cancel is one second."""
    worker = stack.workers.decode_server.decode_worker
    servicer = stack.workers.prefill_server.prefill_servicer
    started = time.monotonic()
    async with asyncio.timeout(30):
        while worker.admission.num_requests or servicer.num_requests:
            await asyncio.sleep(0.01)
    return time.monotonic() - started


async def test_text_chat_and_token_ids_are_one_prompt(stack: Stack) -> None:
    message = text_of(60)
    ids = stack.tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True, return_dict=False
    )
    rendered = stack.tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
    )
    chat = await stack.client.generate(messages=[{"role": "user", "content": message}], max_tokens=12)
    by_ids = await stack.client.generate(token_ids=ids, max_tokens=12)
    raw = await stack.client.generate(rendered, max_tokens=12)
    assert chat.token_ids == by_ids.token_ids == raw.token_ids
    assert len(chat.token_ids) == 12
    assert chat.finish_reason == "length"
    assert chat.usage.prompt_tokens == len(ids)
    assert (await stack.client.count_tokens(messages=[{"role": "user", "content": message}])).tokens == len(ids)
    assert by_ids.usage.cached_tokens == len(ids) // 32 * 32
    assert chat.text == stack.tokenizer.decode(chat.token_ids, skip_special_tokens=True)


async def test_bytes_moved_are_counted_whole(stack: Stack) -> None:
    """The usage of a cold request is exactly the records in the store, twice over, and the tail."""
    completion = await stack.client.generate(token_ids=list(range(100, 100 + 3 * 32 + 5)), max_tokens=2)
    layout_bytes = 3 * 3 * 2 * 24 * 64  # blocks x layers x KV heads x page bytes, one page a block
    sinks = 3 * 2 * 2 * 4 * 64 * 2
    tail = 3 * 2 * 2 * 5 * 64 * 2
    headers = completion.usage.kv_bytes_moved - 2 * (layout_bytes + sinks) - tail
    assert 0 < headers <= 2 * 3 * 192
    per_token = 3 * 2 * 64 * 2 * 2
    assert completion.usage.kv_bytes_bf16 == (2 * 3 * 32 + 5) * per_token


async def test_sampling_is_reproducible_by_seed(stack: Stack) -> None:
    options: Any = {"max_tokens": 16, "temperature": 1.0, "top_p": 0.95}
    first = await stack.client.generate("Once upon a time", **options)
    again = await stack.client.generate("Once upon a time", seed=first.usage.seed, **options)
    other = await stack.client.generate("Once upon a time", seed=first.usage.seed ^ 1, **options)
    assert again.token_ids == first.token_ids
    assert other.token_ids != first.token_ids


async def test_stop_string_and_logprobs(stack: Stack) -> None:
    prompt = f"A list of words: {text_of(60)}"
    plain = await stack.client.generate(prompt, max_tokens=24, top_logprobs=3)
    assert len(plain.logprobs) == len(plain.token_ids) == 24
    for token_id, entry in zip(plain.token_ids, plain.logprobs, strict=True):
        assert entry.chosen.token_id == token_id
        assert entry.chosen.logprob == pytest.approx(max(top.logprob for top in entry.top))  # greedy
        assert len(entry.top) == 3
    stop = plain.text[10:14]
    stopped = await stack.client.generate(prompt, max_tokens=24, stop=[stop])
    assert stopped.finish_reason == "stop"
    assert stopped.text == plain.text[: plain.text.index(stop)]
    assert stopped.usage.cached_tokens == (stopped.usage.prompt_tokens - 1) // 32 * 32 > 0
    assert stopped.usage.kv_bytes_moved > 0
    assert await idle(stack) < 5.0


@pytest.mark.parametrize("after_tokens", [0, 1, 5])
async def test_cancel_frees_everything_within_a_second(stack: Stack, after_tokens: int) -> None:
    stream = stack.client.stream(text_of(400), max_tokens=400, ignore_eos=True)
    if after_tokens == 0:
        request = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.05)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
    else:
        for _ in range(after_tokens):
            await anext(stream)
    await stream.aclose()
    assert await idle(stack) < 5.0  # one second is the promise; a busy machine gets some grace
    assert (await stack.client.generate("And now?", max_tokens=2)).token_ids


async def test_deadline_stops_the_work(stack: Stack) -> None:
    with pytest.raises(DeadlineExceeded):
        await stack.client.generate(text_of(300), max_tokens=900, ignore_eos=True, timeout=0.7)
    assert await idle(stack) < 5.0


async def test_prompts_that_do_not_fit(stack: Stack) -> None:
    with pytest.raises(InvalidRequest, match="2,048"):
        await stack.client.generate(text_of(2000), max_tokens=8)
    with pytest.raises(InvalidRequest, match="bytes"):
        await stack.client.generate("x" * 100_001)
    with pytest.raises(InvalidRequest, match="empty"):
        await stack.client.generate("")
    with pytest.raises(InvalidRequest, match="token"):
        await stack.client.generate(token_ids=[10**6])
    assert (await stack.client.generate("Still here?", max_tokens=2)).token_ids


async def test_a_window_full_to_the_last_token(stack: Stack) -> None:
    ids = [100 + i % 1000 for i in range(WINDOW - 40)]
    completion = await stack.client.generate(token_ids=ids, max_tokens=40, ignore_eos=True)
    assert len(completion.token_ids) == 40


async def test_many_requests_at_once(stack: Stack) -> None:
    prompts = [f"{text_of(20 + 7 * i)} number {i}" for i in range(20)]
    alone = [await stack.client.generate(p, max_tokens=10) for p in prompts[:5]]
    together = await asyncio.gather(*(stack.client.generate(p, max_tokens=10) for p in prompts))
    assert [c.token_ids for c in together[:5]] == [c.token_ids for c in alone]
    assert all(len(c.token_ids) == 10 or c.finish_reason == "stop" for c in together)
    assert await idle(stack) < 5.0
