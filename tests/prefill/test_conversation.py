"""The conversation between a decode and a prefill worker: peers that are not there, and what each refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from support.decode_calls import Inside, call, failure, read, request

from kvferry.deploy.worker_server import ModelRuntime
from kvferry.kernels.spec import KVQuantSpec
from kvferry.proto import worker_pb2, worker_pb2_grpc

BLOCK_SIZE = 32
VOCAB_SIZE = 49152

Status = grpc.StatusCode


@pytest.fixture
async def workers(runtime: Callable[..., ModelRuntime], serve_workers: Any) -> Any:
    return await serve_workers(runtime())


async def test_a_prefill_worker_that_is_not_there(workers: Any, make_prompt: Any, unused_tcp_port: int) -> None:
    address = f"127.0.0.1:{unused_tcp_port}"
    async with asyncio.timeout(15):  # half the deadline
        error = await failure(read(call(workers, request(workers, make_prompt(10), prefill_address=address))))
    assert error.code() is Status.UNAVAILABLE
    assert f"prefill worker {address}" in (error.details() or "")
    await Inside.of(workers).assert_all_free()
    assert len((await workers.generate(make_prompt(10))).tokens) == 8


async def test_a_prefill_worker_that_says_nothing(workers: Any, make_prompt: Any) -> None:
    """It accepts connections and is silent: the request ends, with its deadline at the latest."""
    accepted: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda reader, writer: accepted.append(writer), "127.0.0.1", 0)
    address = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    stream = call(workers, request(workers, make_prompt(10), prefill_address=address), timeout=1.0)
    async with asyncio.timeout(15):
        error = await failure(read(stream))
    assert error.code() in (Status.DEADLINE_EXCEEDED, Status.UNAVAILABLE)
    await Inside.of(workers).assert_all_free()
    silent.close()
    for writer in accepted:
        writer.close()
        await writer.wait_closed()
    assert accepted


@pytest.fixture
async def prefill(workers: Any) -> AsyncIterator[worker_pb2_grpc.PrefillStub]:
    async with grpc.aio.insecure_channel(workers.prefill_address) as channel:
        yield worker_pb2_grpc.PrefillStub(channel)


def start_command(runtime: ModelRuntime, prompt: list[int], **changes: Any) -> worker_pb2.PrefillCommand:
    fields: dict[str, Any] = {
        "request_id": "test",
        "tenant": "default",
        "token_ids": prompt,
        "sampling": worker_pb2.SamplingParams(max_tokens=8),
        "identity": runtime.identity,
    }
    return worker_pb2.PrefillCommand(start=worker_pb2.PrefillStart(**{**fields, **changes}))


async def drain(stream: Any) -> list[worker_pb2.PrefillEvent]:
    return [event async for event in stream]


@pytest.mark.parametrize("field", [f.name for f in worker_pb2.ModelIdentity.DESCRIPTOR.fields])
async def test_another_identity_is_refused(
    runtime: Callable[..., ModelRuntime], prefill: Any, make_prompt: Any, field: str
) -> None:
    """In any of its fields, and also when there is none."""
    identity = worker_pb2.ModelIdentity()
    identity.CopyFrom(runtime().identity)
    value = getattr(identity, field)
    setattr(identity, field, value + 1 if isinstance(value, int) else bytes([value[0] ^ 1]) + value[1:])
    for other in (identity, None):
        stream = prefill.Prefill(timeout=30)
        await stream.write(start_command(runtime(), make_prompt(10), identity=other))
        error = await failure(drain(stream))
        assert error.code() is Status.FAILED_PRECONDITION
        assert "start all workers from the same configuration" in (error.details() or "")


async def test_decode_passes_the_refusal_on(
    load_runtime: Callable[..., ModelRuntime], workers: Any, serve_workers: Any, make_prompt: Any
) -> None:
    other_runtime = load_runtime(block_size=64)
    try:
        other = await serve_workers(other_runtime)
        message = request(workers, make_prompt(10), prefill_address=other.prefill_address)
        error = await failure(read(call(workers, message)))
        assert error.code() is Status.FAILED_PRECONDITION
        assert error.details().startswith(f"prefill worker {other.prefill_address}: this prefill worker serves another")
        await Inside.of(workers).assert_all_free()
    finally:
        other_runtime.engine.close()


async def test_the_first_message_must_be_start(prefill: Any) -> None:
    stream = prefill.Prefill(timeout=30)
    await stream.write(worker_pb2.PrefillCommand(send_blocks=worker_pb2.SendBlocks(indices=[0])))
    error = await failure(drain(stream))
    assert (error.code(), error.details()) == (Status.INVALID_ARGUMENT, "the first message must be `start`")
    for first in (worker_pb2.PrefillCommand(), None):  # an empty one, and none
        stream = prefill.Prefill(timeout=30)
        if first is not None:
            await stream.write(first)
        await stream.done_writing()
        error = await failure(drain(stream))
        assert error.code() is Status.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"token_ids": []}, "0 prompt tokens; this model takes 1 to 2047"),
        ({"token_ids": [5] * 2048}, "2048 prompt tokens; this model takes 1 to 2047"),
        ({"token_ids": [5, VOCAB_SIZE]}, f"a token id is not below {VOCAB_SIZE}"),
        ({"sampling": worker_pb2.SamplingParams(top_logprobs=21)}, "top_logprobs must be at most 20"),
        ({"tenant": ""}, "tenant"),
    ],
    ids=["no tokens", "over the window", "no such token", "top", "no tenant"],
)
async def test_a_bad_start(
    runtime: Callable[..., ModelRuntime], prefill: Any, changes: dict[str, Any], sentence: str
) -> None:
    stream = prefill.Prefill(timeout=30)
    await stream.write(start_command(runtime(), [5, 6, 7], **changes))
    error = await failure(drain(stream))
    assert error.code() is Status.INVALID_ARGUMENT
    assert sentence in (error.details() or "")


@pytest.mark.parametrize("index", [2, 2**32 - 1])
async def test_a_block_that_does_not_exist(
    runtime: Callable[..., ModelRuntime], prefill: Any, make_prompt: Any, index: int
) -> None:
    """Asked for after everything is announced; the worker then serves the next request."""
    command = start_command(runtime(), make_prompt(2 * BLOCK_SIZE + 3))
    stream = prefill.Prefill(timeout=30)
    await stream.write(command)
    async for event in stream:
        if event.WhichOneof("event") == "finished":
            break
    await stream.write(worker_pb2.PrefillCommand(send_blocks=worker_pb2.SendBlocks(indices=[1, index])))
    error = await failure(drain(stream))
    assert (error.code(), error.details()) == (Status.INTERNAL, f"prefill failed: the prompt has no block {index}")

    stream = prefill.Prefill(timeout=30)
    await stream.write(command)
    await stream.write(worker_pb2.PrefillCommand(send_blocks=worker_pb2.SendBlocks(indices=[])))
    await stream.done_writing()
    events = [event.WhichOneof("event") for event in await drain(stream)]
    assert events.count("block_ready") == 2 and events[-1] == "finished"


async def test_blocks_are_sent_when_they_are_asked_for(
    runtime: Callable[..., ModelRuntime], prefill: Any, make_prompt: Any
) -> None:
    layout = runtime().layout
    assert layout.spec == KVQuantSpec(block_size=BLOCK_SIZE)
    stream = prefill.Prefill(timeout=30)
    await stream.write(start_command(runtime(), make_prompt(2 * BLOCK_SIZE + 3)))
    tail, tail_bytes = b"", None
    async for event in stream:
        kind = event.WhichOneof("event")
        if kind == "block_ready":
            assert not event.block_ready.in_store  # there is no store
        elif kind == "handoff":
            tail_bytes = event.handoff.tail_bytes
        elif kind == "tail_chunk":
            tail += event.tail_chunk
        elif kind == "finished":
            break
    assert len(tail) == tail_bytes == 3 * layout.bytes_per_token_bf16
    await stream.write(worker_pb2.PrefillCommand(send_blocks=worker_pb2.SendBlocks(indices=[1, 0, 1])))
    await stream.done_writing()
    frames = [event.block for event in await drain(stream)]
    assert [frame.index for frame in frames] == [1, 0, 1]
    assert all(frame.record_bytes == len(frame.chunk) for frame in frames)
    assert frames[0].chunk == frames[2].chunk
    assert len(frames[1].chunk) == len(frames[0].chunk) + layout.sink_bytes
