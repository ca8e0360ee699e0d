"""Sending and measuring, over real sockets, against a server that answers at once or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import numpy as np
import pytest
from support.token_server import TokenServicer, start_token_server

from kvferry.deploy.bench_serve.measure import Measured
from kvferry.deploy.bench_serve.run import Run, run
from kvferry.deploy.bench_serve.workload import PlannedRequest, TokenSource, unique_prompts
from kvferry.proto import inference_pb2, inference_pb2_grpc

Code = grpc.StatusCode


class Bench:
    def __init__(self, servicer: TokenServicer, stub: Any) -> None:
        self.servicer = servicer
        self._stub = stub

    async def run(self, requests: Sequence[PlannedRequest], due_s: list[float] | None = None, **options: Any) -> Run:
        options.setdefault("timeout_s", 30.0)
        return await run(self._stub, requests, due_s, model="nothing", **options)

    async def one(self, **fields: Any) -> Measured:
        fields = {"token_ids": np.arange(300, 320, dtype=np.uint32), "max_tokens": 5} | fields
        options = {"timeout_s": fields.pop("run_timeout_s", 30.0)}
        return (await self.run([PlannedRequest(**fields)], **options)).requests[0]


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    servicer = TokenServicer()
    server, address = await start_token_server(servicer)
    async with grpc.aio.insecure_channel(address) as channel:
        yield Bench(servicer, inference_pb2_grpc.InferenceStub(channel))
    servicer.hold.set()
    await server.stop(None)


def prompts(count: int, output_len: int = 4) -> list[PlannedRequest]:
    return unique_prompts(TokenSource(seed=0), count=count, input_len=16, output_len=output_len)


async def test_every_token_has_a_time(bench: Bench) -> None:
    planned = prompts(12, output_len=9)
    done: list[None] = []
    result = await bench.run(planned, [0.0] * 12, on_done=lambda: done.append(None))
    assert len(done) == 12
    assert [request.planned for request in result.requests] == planned
    for request in result.requests:
        assert (request.status, request.num_tokens, len(request.arrivals_s)) == (Code.OK, 9, 9)
        assert request.arrivals_s == sorted(request.arrivals_s)
        assert 0 < request.ttft_s <= request.e2e_s <= request.ended_s
        assert sum(request.itls_s) == pytest.approx(request.e2e_s - request.ttft_s)
        assert request.tpot_s == pytest.approx(sum(request.itls_s) / 8)
        assert request.usage is not None and request.usage.prompt_tokens == 16
        assert request.sent_s + request.ended_s <= result.duration_s
    assert result.cpu_s > 0


async def test_what_is_sent(bench: Bench) -> None:
    await bench.run(prompts(3), max_concurrency=1)
    for sent, planned in zip(bench.servicer.requests, prompts(3), strict=True):
        assert list(sent.token_ids.ids) == planned.token_ids.tolist()
        assert (sent.model, sent.sampling.max_tokens, sent.sampling.ignore_eos) == ("nothing", 4, True)
        assert sent.sampling.temperature == 0


async def test_open_loop_does_not_wait_for_answers(bench: Bench) -> None:
    bench.servicer.hold.clear()
    running = asyncio.create_task(bench.run(prompts(6), [0.02 * i for i in range(6)]))
    async with asyncio.timeout(20):
        while bench.servicer.num_running < 6:
            await asyncio.sleep(0.01)
    bench.servicer.hold.set()
    result = await running
    for index, request in enumerate(result.requests):
        assert request.due_s is not None
        assert request.sent_s >= request.due_s == pytest.approx(0.02 * index)


async def test_closed_loop_never_has_more(bench: Bench) -> None:
    bench.servicer.hold.clear()
    running = asyncio.create_task(bench.run(prompts(9), max_concurrency=3))
    async with asyncio.timeout(20):
        while bench.servicer.num_running < 3:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
    assert bench.servicer.num_running == 3
    bench.servicer.hold.set()
    result = await running
    assert len(bench.servicer.requests) == 9
    assert all(request.completed for request in result.requests)
    ends = sorted(request.sent_s + request.ended_s for request in result.requests)
    assert all(request.sent_s >= ends[index - 3] for index, request in enumerate(result.requests) if index >= 3)


@pytest.mark.parametrize(("after", "tokens"), [(0, 0), (2, 2)])
async def test_cancelled(bench: Bench, after: int, tokens: int) -> None:
    if after == 0:
        bench.servicer.hold.clear()
    request = await bench.one(cancel_after=after, expected=Code.CANCELLED)
    assert (request.status, request.num_tokens, request.usage) == (Code.CANCELLED, tokens, None)
    async with asyncio.timeout(20):
        while bench.servicer.num_running:
            await asyncio.sleep(0.01)


async def test_deadlines(bench: Bench) -> None:
    bench.servicer.hold.clear()
    assert (await bench.one(timeout_s=0.1)).status is Code.DEADLINE_EXCEEDED
    assert (await bench.one(run_timeout_s=0.1)).status is Code.DEADLINE_EXCEEDED


async def test_cancelling_the_run_ends_its_calls(bench: Bench) -> None:
    bench.servicer.hold.clear()
    running = asyncio.create_task(bench.run(prompts(4)))
    async with asyncio.timeout(20):
        while bench.servicer.num_running < 4:
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        while bench.servicer.num_running:
            await asyncio.sleep(0.01)


async def test_no_server() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:9") as channel:
        result = await run(inference_pb2_grpc.InferenceStub(channel), prompts(2), None, timeout_s=5.0)
    assert [request.status for request in result.requests] == [Code.UNAVAILABLE] * 2
    assert all(request.error for request in result.requests)


Chunks = list[inference_pb2.GenerateChunk]


def without_end(chunks: Chunks) -> Chunks:
    return chunks[:-1]


def with_a_gap(chunks: Chunks) -> Chunks:
    return [chunks[0], *chunks[2:]]


def with_a_repeat(chunks: Chunks) -> Chunks:
    return [chunks[0], *chunks]


def after_the_end(chunks: Chunks) -> Chunks:
    return [*chunks, inference_pb2.GenerateChunk(index=len(chunks), token_ids=[7])]


def ended_twice(chunks: Chunks) -> Chunks:
    again = inference_pb2.GenerateChunk(index=len(chunks), token_ids=[7], finish_reason="length")
    return [*chunks, again]


def without_usage(chunks: Chunks) -> Chunks:
    chunks[-1].ClearField("usage")
    return chunks


def without_tokens(chunks: Chunks) -> Chunks:
    del chunks[-1].token_ids[:]
    chunks[-1].index = 0
    return chunks[-1:]


@pytest.mark.parametrize(
    "spoil",
    [
        without_end,
        with_a_gap,
        with_a_repeat,
        after_the_end,
        ended_twice,
        without_usage,
        without_tokens,
        lambda chunks: [],
    ],
)
async def test_a_broken_answer_is_no_success(bench: Bench, spoil: Any) -> None:
    bench.servicer.spoil = spoil  # type: ignore[method-assign]
    request = await bench.one()
    assert request.status is Code.DATA_LOSS
    assert request.error


async def test_chunks_of_several_tokens(bench: Bench) -> None:
    def joined(chunks: Chunks) -> Chunks:
        chunks[1].token_ids.append(7)
        return [chunks[0], chunks[1], *chunks[3:]]

    bench.servicer.spoil = joined  # type: ignore[method-assign]
    request = await bench.one()
    assert (request.status, request.num_tokens, len(request.itls_s)) == (Code.OK, 5, 3)
    assert request.tpot_s == pytest.approx(sum(request.itls_s) / 4)
