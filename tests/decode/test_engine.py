"""A decode worker over real sockets: what it gives back, what one failure takes with it, what it refuses."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import torch
from support.decode_calls import ROOM_S, Inside, call, failure, read, request

from kvferry.decode.admission import Reservation
from kvferry.decode.config import DecodeConfig
from kvferry.decode.running import SequenceGroup
from kvferry.decode.sequence import Sequence, SequenceListener, TokenEvent
from kvferry.deploy.worker_server import ModelRuntime
from kvferry.kernels.sampling import SamplingParams, TokenHistory
from kvferry.proto import worker_pb2, worker_pb2_grpc

BLOCK_SIZE = 32
MAX_MODEL_LEN = 2048
VOCAB_SIZE = 49152
BLOCK_BYTES = 3 * 2 * 24 * 64

Status = grpc.StatusCode


@pytest.fixture
async def workers(runtime: Callable[..., ModelRuntime], serve_workers: Any) -> Any:
    return await serve_workers(runtime())


@pytest.fixture
def serve_small(runtime: Callable[..., ModelRuntime], serve_workers: Any) -> Callable[..., Any]:
    """Workers with a decode worker that has little room."""

    def serve(blocks: int = 64, **config: Any) -> Any:
        return serve_workers(runtime(), None, DecodeConfig(kv_memory=blocks * BLOCK_BYTES, **config))

    return serve


# --- room comes back ---------------------------------------------------------------------------------------------


async def test_room_is_free_after_every_request(workers: Any, make_prompt: Any) -> None:
    inside = Inside.of(workers)
    for length, max_tokens in ((1, 1), (5, 3), (31, 2), (32, 1), (32, 33), (33, 31), (100, 8)):
        answer = await workers.generate(make_prompt(length, seed=length), max_tokens=max_tokens)
        assert len(answer.tokens) == max_tokens
        assert answer.chunks[-1].finish_reason == "length"
        assert all(chunk.finish_reason == "" for chunk in answer.chunks[:-1])
        await inside.assert_all_free()
    await asyncio.gather(*(workers.generate(make_prompt(9 * i + 1, seed=i), max_tokens=3) for i in range(20)))
    await inside.assert_all_free()


@pytest.mark.parametrize("store", [False, True], ids=["no store", "store"])
async def test_room_is_free_after_a_cancel(
    runtime: Callable[..., ModelRuntime], serve_workers: Any, make_store: Any, make_prompt: Any, store: bool
) -> None:
    """A client leaves at any moment; a bystander notices nothing."""
    address = (await make_store()).address if store else None
    workers = await serve_workers(runtime(), address)
    inside = Inside.of(workers)
    bystander = make_prompt(40, seed=99)
    expected = (await workers.generate(bystander, max_tokens=60)).tokens
    answer = asyncio.create_task(workers.generate(bystander, max_tokens=60))

    prompt = make_prompt(6 * BLOCK_SIZE + 5)
    long = worker_pb2.SamplingParams(max_tokens=500)
    for delay_s in (0.0, 0.001, 0.01, 0.05):  # before the first token
        stream = call(workers, request(workers, prompt, sampling=long))
        await asyncio.sleep(delay_s)
        stream.cancel()
        assert await stream.code() is Status.CANCELLED
    for count in (1, 2, 29):  # the first token, the first of decode, past a block that decode filled
        stream = call(workers, request(workers, prompt, sampling=long))
        assert len(await read(stream, count)) == count
        stream.cancel()
        assert await stream.code() is Status.CANCELLED
    assert (await answer).tokens == expected
    await inside.assert_all_free()

    streams = [call(workers, request(workers, make_prompt(20 + i, seed=i), sampling=long)) for i in range(20)]
    await asyncio.gather(*(read(stream, i % 3) for i, stream in enumerate(streams[:16])))
    async with asyncio.timeout(10):
        while inside.admission.num_waiting < 4:
            await asyncio.sleep(0.01)
    for stream in streams:
        stream.cancel()
    await inside.assert_all_free()


async def test_room_is_free_after_the_last_token_even_if_nobody_reads_on(workers: Any, make_prompt: Any) -> None:
    stream = call(workers, request(workers, make_prompt(10), sampling=worker_pb2.SamplingParams(max_tokens=3)))
    assert len(await read(stream, 3)) == 3
    stream.cancel()
    await Inside.of(workers).assert_all_free()


async def test_a_client_that_does_not_read_holds_no_room(workers: Any, make_prompt: Any) -> None:
    """The worker stands in the middle of a write, with all tokens made, before the client goes away."""
    inside = Inside.of(workers)
    narrow = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    sampling = worker_pb2.SamplingParams(max_tokens=100, logprobs=True, top_logprobs=20)
    async with grpc.aio.insecure_channel(workers.decode_address, options=narrow) as channel:
        stub = worker_pb2_grpc.DecodeStub(channel)
        stream = stub.Generate(request(workers, make_prompt(40), sampling=sampling), timeout=60)
        assert await stream.read() is not grpc.aio.EOF
        async with asyncio.timeout(30):
            while not inside.engine.num_running:  # blocks and tail are still on the way
                await asyncio.sleep(0.001)
        async with asyncio.timeout(30):
            while inside.leftovers():
                await asyncio.sleep(0.01)
        assert inside.admission.num_requests == 1, "the answer was read: this test is void"
        stream.cancel()
        await inside.assert_all_free()


async def test_room_is_free_after_a_deadline(workers: Any, make_prompt: Any) -> None:
    endless = worker_pb2.SamplingParams(max_tokens=1900)
    error = await failure(read(call(workers, request(workers, make_prompt(40), sampling=endless), timeout=1.0)))
    assert error.code() is Status.DEADLINE_EXCEEDED
    await Inside.of(workers).assert_all_free()


async def test_cancelled_while_it_waits_for_room(serve_small: Any, make_prompt: Any) -> None:
    workers = await serve_small(max_num_seqs=1)
    inside = Inside.of(workers)
    message = request(workers, make_prompt(20), sampling=worker_pb2.SamplingParams(max_tokens=1500))
    running = call(workers, message, timeout=60)
    await read(running, 1)
    impatient, patient = call(workers, message), call(workers, request(workers, make_prompt(30)))
    async with asyncio.timeout(10):
        while inside.admission.num_waiting < 2:
            await asyncio.sleep(0.01)
    impatient.cancel()
    async with asyncio.timeout(ROOM_S):
        while inside.admission.num_waiting > 1:
            await asyncio.sleep(0.01)
    assert len(await read(running, 3)) == 3  # it goes on
    running.cancel()
    assert len(await read(patient)) == 8
    await inside.assert_all_free()


async def test_a_worker_that_is_full_says_so(serve_small: Any, make_prompt: Any) -> None:
    workers = await serve_small(max_num_seqs=1, max_waiting=1)
    inside = Inside.of(workers)
    message = request(workers, make_prompt(20), sampling=worker_pb2.SamplingParams(max_tokens=1500))
    running = call(workers, message)
    await read(running, 1)
    waiting = call(workers, message)
    async with asyncio.timeout(10):
        while not inside.admission.num_waiting:
            await asyncio.sleep(0.01)
    error = await failure(read(call(workers, message)))
    assert error.code() is Status.RESOURCE_EXHAUSTED
    assert "1 requests wait for room" in (error.details() or "")
    running.cancel()
    assert await read(waiting, 2)
    waiting.cancel()
    await inside.assert_all_free()


async def test_stopping_ends_the_requests(workers: Any, make_prompt: Any) -> None:
    """`stop` comes back though a request has long to go, and the client learns of it."""
    stream = call(workers, request(workers, make_prompt(20), sampling=worker_pb2.SamplingParams(max_tokens=1900)))
    await read(stream, 2)
    async with asyncio.timeout(20):
        await workers.decode_server.stop(0.1)
        error = await failure(read(stream))
    assert error.code() in (Status.UNAVAILABLE, Status.CANCELLED)
    assert not Inside.of(workers).leftovers()


def one_token_prompt(mine: Reservation, listener: SequenceListener) -> Sequence:
    """A sequence that needs no prefill worker: nothing of it is cached yet."""
    return Sequence(
        num_prompt_tokens=1,
        sampling=SamplingParams(),
        history=TokenHistory.of([5]),
        slot=mine.slots[0],
        block_ids=mine.block_ids,
        num_blocks=0,
        tail_len=0,
        last_token=5,
        listener=listener,
    )


async def test_a_cancelled_request_keeps_its_room_while_a_step_uses_it(
    workers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = Inside.of(workers)
    step_began, go_on = threading.Event(), threading.Event()
    batch = inside.cache.batch

    def slow(**arguments: Any) -> Any:
        step_began.set()
        assert go_on.wait(20)
        return batch(**arguments)

    async def decode() -> None:
        async with inside.admission.reserve([0], []) as mine:
            group = SequenceGroup(
                engine=inside.engine,
                cache=inside.cache,
                admission=inside.admission,
                room=mine,
                max_blocks=1,
                prefix_caching=True,
            )
            async with group.run([one_token_prompt(mine, group)]):
                await asyncio.Event().wait()

    monkeypatch.setattr(inside.cache, "batch", slow)
    task = asyncio.create_task(decode())
    try:
        assert await asyncio.to_thread(step_began.wait, 10)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0.05)
            assert inside.admission.pool.num_used == 1
    finally:
        go_on.set()
    await asyncio.wait([task], timeout=ROOM_S)
    assert task.cancelled()
    await inside.assert_all_free()


# --- one failure -------------------------------------------------------------------------------------------------


async def assert_one_fails(workers: Any, prompts: list[list[int]], expected: list[list[int]]) -> grpc.aio.AioRpcError:
    """One of the requests fails with INTERNAL, the others have the tokens they would have had."""
    results = await asyncio.gather(*(workers.generate(p, max_tokens=30) for p in prompts), return_exceptions=True)
    [error] = [result for result in results if isinstance(result, BaseException)]
    assert isinstance(error, grpc.aio.AioRpcError)
    assert error.code() is Status.INTERNAL
    for result, tokens in zip(results, expected, strict=True):
        assert result is error or result.tokens == tokens  # type: ignore[union-attr]
    await Inside.of(workers).assert_all_free()
    # Its slot and blocks are as good as before.
    results = await asyncio.gather(*(workers.generate(p, max_tokens=30) for p in prompts))
    assert [result.tokens for result in results] == expected
    return error


@pytest.fixture
def prompts(make_prompt: Any) -> list[list[int]]:
    return [make_prompt(20 + 11 * i, seed=i) for i in range(4)]


async def test_a_block_that_is_not_finite_ends_one_request(
    serve_small: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = await serve_small(max_num_seqs=4)
    expected = [(await workers.generate(prompt, max_tokens=30)).tokens for prompt in prompts]
    cache = Inside.of(workers).cache
    pack, poisoned = cache.pack_tail, []

    def pack_poisoned(slot: int, block_id: int, *, index: int) -> None:
        if not poisoned:
            poisoned.append(slot)
            cache.tails[slot, -1, 1, 0, 7, 3] = torch.nan  # one V of the last layer
        pack(slot, block_id, index=index)

    monkeypatch.setattr(cache, "pack_tail", pack_poisoned)
    error = await assert_one_fails(workers, prompts, expected)
    assert poisoned
    assert error.details() == "decode failed: K or V is not finite: the block is refused"


@pytest.mark.parametrize("value", [math.nan, -math.inf])
async def test_logits_that_are_not_finite_end_one_request(
    serve_small: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """A poisoned tail poisons the attention of its sequence, and only of its sequence."""
    workers = await serve_small(max_num_seqs=4)
    expected = [(await workers.generate(prompt, max_tokens=30)).tokens for prompt in prompts]
    cache = Inside.of(workers).cache
    load, poisoned = cache.load_tail, []

    def load_poisoned(slot: int, tail: bytes) -> int:
        tokens = load(slot, tail)
        if len(poisoned) < 2 and tokens:
            poisoned.append(slot)
            if len(poisoned) == 2:  # the second one, so that another one runs already
                cache.tails[slot, :, 1] = value
        return tokens

    monkeypatch.setattr(cache, "load_tail", load_poisoned)
    error = await assert_one_fails(workers, prompts, expected)
    assert error.details() == "decode failed: the model's logits are not finite"


async def fail_one_step(workers: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Answers, and an error for each sequence of a step that failed; the step had at least two."""
    inside = Inside.of(workers)
    batch, broken = inside.cache.batch, []

    def break_once(**arguments: Any) -> Any:
        if len(arguments["slots"]) > 1 and not broken:
            broken.extend(arguments["slots"])
            raise RuntimeError("out of device memory")
        return batch(**arguments)

    monkeypatch.setattr(inside.cache, "batch", break_once)
    results = await asyncio.gather(*(workers.generate(p, max_tokens=10) for p in prompts), return_exceptions=True)
    assert sum(isinstance(result, grpc.aio.AioRpcError) for result in results) == len(broken) >= 2
    return results


async def test_a_failed_step_ends_its_sequences_and_not_the_worker(
    workers: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [(await workers.generate(prompt, max_tokens=10)).tokens for prompt in prompts]
    results = await fail_one_step(workers, prompts, monkeypatch)
    for result, tokens in zip(results, expected, strict=True):
        assert isinstance(result, grpc.aio.AioRpcError) or result.tokens == tokens
    await Inside.of(workers).assert_all_free()
    results = await asyncio.gather(*(workers.generate(p, max_tokens=10) for p in prompts))
    assert [result.tokens for result in results] == expected


async def test_a_released_sequence_is_not_touched_again(workers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slot and blocks may be another's by then. A step that failed releases its sequences, too."""
    inside = Inside.of(workers)
    batch, stepped, calls, released = inside.cache.batch, [], [], threading.Event()

    def break_third(**arguments: Any) -> Any:
        stepped.append(arguments["slots"])
        if len(stepped) == 3:
            raise RuntimeError("out of device memory")
        return batch(**arguments)

    class Listener:
        def token(self, sequence: Sequence, event: TokenEvent) -> None:
            calls.append(event.index)

        def error(self, sequence: Sequence, error: Exception) -> None:
            calls.append(str(error))

        def block_used(self, sequence: Sequence) -> None:
            calls.append("block used")

        def released(self, sequence: Sequence) -> None:
            calls.append("released")
            released.set()

    monkeypatch.setattr(inside.cache, "batch", break_third)
    async with inside.admission.reserve([0], []) as mine:
        slots = list(mine.slots)
        sequence = one_token_prompt(mine, Listener())
        inside.engine.add(sequence)
        assert await asyncio.to_thread(released.wait, 10)
        await asyncio.sleep(0.2)  # time for some steps
        inside.engine.remove(sequence)  # too late, and harmless
    assert stepped == [slots] * 3
    assert calls == [0, 1, "out of device memory", "released"]
    await inside.assert_all_free()


async def test_a_failed_step_is_an_internal_error(
    workers: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = await fail_one_step(workers, prompts, monkeypatch)
    errors = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert {error.code() for error in errors} == {Status.INTERNAL}


# --- the end of an answer ----------------------------------------------------------------------------------------


async def test_one_token(workers: Any, make_prompt: Any) -> None:
    """The answer comes from prefill alone: no decode step."""
    for length in (1, BLOCK_SIZE, 2 * BLOCK_SIZE + 5):
        answer = await workers.generate(make_prompt(length), max_tokens=1)
        longer = await workers.generate(make_prompt(length), max_tokens=2)
        assert answer.tokens == longer.tokens[:1]
        assert answer.chunks[0].finish_reason == "length"
        assert answer.usage.prefill.compute_seconds > 0
        assert answer.usage.decode_seconds == 0 < longer.usage.decode_seconds
    await Inside.of(workers).assert_all_free()


async def test_stop_tokens(workers: Any, make_prompt: Any) -> None:
    prompt = make_prompt(3 * BLOCK_SIZE + 3)
    free = (await workers.generate(prompt, max_tokens=12)).tokens
    positions = {token: free.index(token) for token in reversed(free)}
    for token, position in positions.items():
        answer = await workers.generate(prompt, max_tokens=12, stop_token_ids=[token])
        assert answer.tokens == free[: position + 1]  # the stop token is the last one of the answer
        assert answer.chunks[-1].finish_reason == "stop"
    # As the first token, and as the last one that is allowed.
    assert 0 in positions.values()
    last = await workers.generate(prompt, max_tokens=positions[free[-1]] + 1, stop_token_ids=[free[-1]])
    assert last.chunks[-1].finish_reason == "stop"
    await Inside.of(workers).assert_all_free()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_min_tokens(workers: Any, make_prompt: Any, temperature: float) -> None:
    """Every second token of the vocabulary would end the answer."""
    even = list(range(0, VOCAB_SIZE, 2))
    prompt = make_prompt(50)
    for min_tokens in (0, 1, 5):
        for seed in range(3):
            answer = await workers.generate(
                prompt, max_tokens=40, min_tokens=min_tokens, stop_token_ids=even, temperature=temperature, seed=seed
            )
            assert all(token % 2 for token in answer.tokens[:-1])
            assert len(answer.tokens) > min_tokens
            assert answer.tokens[-1] % 2 == 0 and answer.chunks[-1].finish_reason == "stop"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_logprobs(workers: Any, make_prompt: Any, temperature: float) -> None:
    prompt = make_prompt(3 * BLOCK_SIZE + 3)
    options = {"max_tokens": 8, "temperature": temperature, "seed": 3}
    plain = await workers.generate(prompt, **options)
    assert all(chunk.logprob == 0 and not chunk.top_logprobs for chunk in plain.chunks)
    for top in (0, 5):
        answer = await workers.generate(prompt, logprobs=True, top_logprobs=top, **options)
        assert answer.tokens == plain.tokens
        for chunk in answer.chunks:  # the first comes from prefill, the others from decode
            assert math.isfinite(chunk.logprob) and chunk.logprob < 0
            assert len(chunk.top_logprobs) == top
            if not top:
                continue
            ids = [each.token_id for each in chunk.top_logprobs]
            values = [each.logprob for each in chunk.top_logprobs]
            assert len(set(ids)) == top
            assert values == sorted(values, reverse=True)
            assert 0 < sum(map(math.exp, values)) <= 1 + 1e-5
            assert chunk.logprob <= values[0]
            if chunk.token_id in ids:
                assert chunk.logprob == values[ids.index(chunk.token_id)]
            else:
                assert chunk.logprob <= values[-1]
            if not temperature:
                assert (ids[0], values[0]) == (chunk.token_id, chunk.logprob)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"token_ids": []}, "the prompt has no tokens"),
        ({"sampling": worker_pb2.SamplingParams()}, "max_tokens must be at least 1"),
        (
            {"sampling": worker_pb2.SamplingParams(max_tokens=MAX_MODEL_LEN - 9)},
            f"10 prompt tokens and max_tokens {MAX_MODEL_LEN - 9} are over the model's {MAX_MODEL_LEN}",
        ),
        ({"token_ids": [5, VOCAB_SIZE, 7]}, f"a token id is not below {VOCAB_SIZE}"),
        (
            {"sampling": worker_pb2.SamplingParams(max_tokens=1, logprobs=True, top_logprobs=21)},
            "top_logprobs must be at most 20",
        ),
        ({"tenant": ""}, "tenant is empty"),
        ({"prefill_address": ""}, "prefill_address is empty, and this worker has not the role prefill"),
    ],
    ids=["no tokens", "no max_tokens", "over the window", "no such token", "top", "no tenant", "no prefill address"],
)
async def test_a_bad_request(workers: Any, make_prompt: Any, changes: dict[str, Any], sentence: str) -> None:
    error = await failure(read(call(workers, request(workers, make_prompt(10), **changes))))
    assert (error.code(), error.details()) == (Status.INVALID_ARGUMENT, sentence)
    assert not Inside.of(workers).leftovers()


async def test_a_request_that_just_fits_the_window(workers: Any, make_prompt: Any) -> None:
    prompt = make_prompt(MAX_MODEL_LEN - 3)
    assert len((await workers.generate(prompt, max_tokens=3)).tokens) == 3
    error = await failure(workers.generate(prompt, max_tokens=4))
    assert error.code() is Status.INVALID_ARGUMENT


async def test_a_request_larger_than_the_pool(serve_small: Any, make_prompt: Any) -> None:
    workers = await serve_small(blocks=4)
    most = 5 * BLOCK_SIZE - 60  # the last token needs no room
    assert len((await workers.generate(make_prompt(60), max_tokens=most)).tokens) == most
    error = await failure(workers.generate(make_prompt(60), max_tokens=most + 1))
    assert error.code() is Status.INVALID_ARGUMENT
    assert "needs 5 blocks and this worker's pool has 4" in (error.details() or "")
    await Inside.of(workers).assert_all_free()
