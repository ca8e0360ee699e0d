"""Several answers, warming, deadlines and refusals, over the socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from support.decode_calls import failure

from kvferry.deploy.worker_server import ModelRuntime, WorkerServer
from kvferry.kvstore.identity import namespace_of
from kvferry.kvstore.key import block_keys
from kvferry.prefill.config import PrefillConfig
from kvferry.proto import worker_pb2, worker_pb2_grpc
from kvferry.proto.trailing_metadata import RETRY_AFTER_KEY

BLOCK_SIZE = 32
NUM_BLOCKS = 4
LIMIT_S = 60.0
Status = grpc.StatusCode


@pytest.fixture
def worker(runtime: Callable[[str], ModelRuntime]) -> ModelRuntime:
    return runtime("llama")


@asynccontextmanager
async def prefill_worker(
    worker: ModelRuntime, config: PrefillConfig, store_address: str | None = None
) -> AsyncIterator[worker_pb2_grpc.PrefillStub]:
    server = WorkerServer(worker, config=config, store_address=store_address)
    async with grpc.aio.insecure_channel(await server.start()) as channel:
        try:
            yield worker_pb2_grpc.PrefillStub(channel)
        finally:
            await server.stop(0.2)


async def start(
    stub: worker_pb2_grpc.PrefillStub, worker: ModelRuntime, prompt: list[int], timeout: float = LIMIT_S, **fields: Any
) -> Any:
    fields.setdefault("sampling", worker_pb2.SamplingParams(max_tokens=8))
    fields.setdefault("tenant", "default")
    message = worker_pb2.PrefillStart(request_id="test", token_ids=prompt, identity=worker.identity, **fields)
    stream = stub.Prefill(timeout=timeout)  # type: ignore[call-arg]
    await stream.write(worker_pb2.PrefillCommand(start=message))
    return stream


async def drain(stream: Any) -> list[worker_pb2.PrefillEvent]:
    await stream.done_writing()
    return [event async for event in stream]


def kinds(events: list[worker_pb2.PrefillEvent]) -> list[str | None]:
    return [event.WhichOneof("event") for event in events]


async def test_several_answers_come_from_one_prefill(worker: ModelRuntime, make_prompt: Any) -> None:
    prompt = make_prompt(50)

    async def handoff(stub: worker_pb2_grpc.PrefillStub, **sampling: Any) -> worker_pb2.Handoff:
        params = worker_pb2.SamplingParams(temperature=1.5, **sampling)
        events = await drain(await start(stub, worker, prompt, sampling=params))
        return next(event.handoff for event in events if event.WhichOneof("event") == "handoff")

    async with prefill_worker(worker, PrefillConfig()) as stub:
        several = await handoff(stub, n=4, seed=2**64 - 2)
        tokens = [several.first_token, *several.other_first_tokens]
        assert [token.choice for token in tokens] == [0, 1, 2, 3]
        assert len({token.token_id for token in tokens}) > 1
        for answer, token in enumerate(tokens):
            single = await handoff(stub, seed=(2**64 - 2 + answer) % 2**64)
            assert single.first_token.token_id == token.token_id
            assert not single.other_first_tokens
        params = worker_pb2.SamplingParams(n=129)
        error = await failure(drain(await start(stub, worker, prompt, sampling=params)))
        assert (error.code(), error.details()) == (Status.INVALID_ARGUMENT, "n must be at most 128")


@pytest.mark.parametrize("length", [NUM_BLOCKS * BLOCK_SIZE, NUM_BLOCKS * BLOCK_SIZE + 9])
async def test_a_warmed_prompt_is_a_hit(
    length: int, worker: ModelRuntime, make_store: Any, serve_workers: Any, make_prompt: Any
) -> None:
    prompt = make_prompt(length, seed=7)
    keys = block_keys(namespace_of(worker.identity, tenant="default", block_size=BLOCK_SIZE), prompt)
    cold_store, store = await make_store(), await make_store()
    cold = await (await serve_workers(worker, cold_store.address)).generate(prompt)
    async with prefill_worker(worker, PrefillConfig(fetch="always"), store.address) as stub:
        events = await drain(await start(stub, worker, prompt, warm=True))
        assert kinds(events) == ["block_ready"] * NUM_BLOCKS + ["finished"]
        assert all(event.block_ready.in_store for event in events[:-1])
        assert events[-1].finished.store_tokens_written == NUM_BLOCKS * BLOCK_SIZE
        assert await store.records(keys) == await cold_store.records(keys)
        again = await drain(await start(stub, worker, prompt, warm=True))
        assert kinds(again) == kinds(events)
        assert again[-1].finished.num_cached_tokens == NUM_BLOCKS * BLOCK_SIZE
        assert again[-1].finished.store_tokens_written == 0
    warm = await (await serve_workers(worker, store.address)).generate(prompt)
    assert warm.num_cached_tokens == (length - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert warm.usage.prefill.store_tokens_written == 0
    assert warm.tokens == cold.tokens


async def test_warming_less_than_a_block_does_nothing(worker: ModelRuntime, make_prompt: Any) -> None:
    async with prefill_worker(worker, PrefillConfig()) as stub:
        assert kinds(await drain(await start(stub, worker, make_prompt(BLOCK_SIZE - 1), warm=True))) == ["finished"]


async def test_a_full_worker_says_when_to_come_again(worker: ModelRuntime, make_prompt: Any) -> None:
    config = PrefillConfig(max_requests=4)
    async with prefill_worker(worker, config) as stub:
        streams = [await start(stub, worker, make_prompt(1500, seed=i)) for i in range(3)]
        for stream in streams:
            await stream.read()  # it is in
        error = await failure(drain(await start(stub, worker, make_prompt(9))))
        assert error.code() is Status.RESOURCE_EXHAUSTED
        assert "too many requests of this tenant (3 requests)" in (error.details() or "")
        hint = dict(error.trailing_metadata() or ())[RETRY_AFTER_KEY]
        assert 100 <= int(hint) <= 30_000
        other = await drain(await start(stub, worker, make_prompt(9, seed=5), tenant="other"))
        assert "handoff" in kinds(other)
        for stream in streams:
            stream.cancel()
        async with asyncio.timeout(LIMIT_S):
            while True:
                try:
                    await drain(await start(stub, worker, make_prompt(9)))
                    break
                except grpc.aio.AioRpcError as error:
                    assert error.code() is Status.RESOURCE_EXHAUSTED
                    await asyncio.sleep(0.05)


async def test_more_than_the_worker_can_ever_hold(worker: ModelRuntime, make_prompt: Any) -> None:
    async with prefill_worker(worker, PrefillConfig(max_prompt_tokens_in_flight=100)) as stub:
        error = await failure(drain(await start(stub, worker, make_prompt(101))))
        assert error.code() is Status.INVALID_ARGUMENT
        assert "101 prompt tokens; this prefill worker has memory for 100" in (error.details() or "")


async def test_a_request_without_a_deadline_gets_one(worker: ModelRuntime, make_prompt: Any) -> None:
    async with prefill_worker(worker, PrefillConfig(default_timeout_s=0.001)) as stub:
        stream = await start(stub, worker, make_prompt(1000), timeout=None)  # type: ignore[arg-type]
        async with asyncio.timeout(LIMIT_S):
            error = await failure(drain(stream))
        assert error.code() is Status.DEADLINE_EXCEEDED
        assert "time was over" in (error.details() or "")
