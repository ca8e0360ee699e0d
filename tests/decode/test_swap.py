"""More sequences than the pool holds: they grow, share, step back and come back, and the tokens stay the same."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from support.decode_calls import Inside, call, read, request

from kvferry.decode.admission import Admission, Reservation
from kvferry.decode.block_pool import BlockPool
from kvferry.decode.config import DecodeConfig
from kvferry.deploy.worker_server import ModelRuntime
from kvferry.proto import worker_pb2

BLOCK_SIZE = 32
BLOCK_BYTES = 3 * 2 * 24 * 64

Serve = Callable[..., Any]


@pytest.fixture
def serve_small(runtime: Callable[..., ModelRuntime], serve_workers: Any) -> Serve:
    def serve(blocks: int, **config: Any) -> Any:
        return serve_workers(runtime(), None, DecodeConfig(kv_memory=blocks * BLOCK_BYTES, **config))

    return serve


async def alone(workers: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    return [(await workers.generate(prompt, **options)).tokens for prompt in prompts]


async def test_a_pool_that_is_too_small_for_all_changes_no_token(serve_small: Serve, make_prompt: Any) -> None:
    """Six answers that grow by four blocks each, in a pool that holds the prompts and little more."""
    workers = await serve_small(16)
    inside = Inside.of(workers)
    prompts = [make_prompt(40 + 7 * i, seed=i) for i in range(6)]
    expected = await alone(workers, prompts, max_tokens=130)
    assert inside.admission.num_swaps == 0
    results = await asyncio.gather(*(workers.generate(prompt, max_tokens=130) for prompt in prompts))
    assert [result.tokens for result in results] == expected
    assert inside.admission.num_swaps > 0
    await inside.assert_all_free()


async def test_sampled_answers_survive_a_swap(serve_small: Serve, make_prompt: Any) -> None:
    """Penalties and random numbers depend on the tokens so far, which a swap keeps."""
    workers = await serve_small(14)
    prompts = [make_prompt(35 + i, seed=i) for i in range(5)]
    options = {"max_tokens": 120, "temperature": 0.9, "seed": 7, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
    expected = await alone(workers, prompts, **options)
    results = await asyncio.gather(*(workers.generate(prompt, **options) for prompt in prompts))
    assert [result.tokens for result in results] == expected
    assert Inside.of(workers).admission.num_swaps > 0
    await Inside.of(workers).assert_all_free()


async def test_an_urgent_request_displaces_another(serve_small: Serve, make_prompt: Any) -> None:
    """One slot: the urgent request gets it at once, the other one goes on afterwards where it was."""
    workers = await serve_small(16, max_num_seqs=1)
    inside = Inside.of(workers)
    long, short = make_prompt(50, seed=1), make_prompt(20, seed=2)
    [expected_long] = await alone(workers, [long], max_tokens=300)
    [expected_short] = await alone(workers, [short], max_tokens=20)
    patient = call(workers, request(workers, long, sampling=worker_pb2.SamplingParams(max_tokens=300), priority=1))
    first = await read(patient, 3)
    rest = asyncio.create_task(read(patient))
    urgent = call(workers, request(workers, short, sampling=worker_pb2.SamplingParams(max_tokens=20), priority=0))
    assert await read(urgent) == expected_short
    assert not rest.done()
    assert inside.admission.num_swaps == 1
    assert first + await rest == expected_long
    await inside.assert_all_free()


async def test_equals_do_not_displace_each_other(serve_small: Serve, make_prompt: Any) -> None:
    workers = await serve_small(16, max_num_seqs=1)
    inside = Inside.of(workers)
    streams = [
        call(workers, request(workers, make_prompt(20, seed=i), sampling=worker_pb2.SamplingParams(max_tokens=40)))
        for i in range(4)
    ]
    await asyncio.gather(*(read(stream) for stream in streams))
    assert inside.admission.num_swaps == 0


async def test_cancelled_while_swapped_out(serve_small: Serve, make_prompt: Any) -> None:
    workers = await serve_small(16, max_num_seqs=1)
    inside = Inside.of(workers)
    endless = worker_pb2.SamplingParams(max_tokens=400)
    displaced = call(workers, request(workers, make_prompt(50), sampling=endless, priority=5))
    await read(displaced, 2)
    urgent = call(workers, request(workers, make_prompt(20), sampling=endless))
    await read(urgent, 2)
    async with asyncio.timeout(10):
        while inside.admission.num_swaps < 1 or inside.admission.num_waiting < 1:
            await asyncio.sleep(0.01)
    displaced.cancel()
    async with asyncio.timeout(5):
        while inside.admission.num_waiting:
            await asyncio.sleep(0.01)
    assert len(await read(urgent, 5)) == 5
    urgent.cancel()
    await inside.assert_all_free()


async def test_sequences_with_one_prefix_share_its_blocks(serve_small: Serve, make_prompt: Any) -> None:
    """Ten sequences of a four-block prompt, each with a block of its own: 14 blocks, not 50."""
    workers = await serve_small(64)
    inside = Inside.of(workers)
    prompt = make_prompt(4 * BLOCK_SIZE + 3)
    sampling = worker_pb2.SamplingParams(max_tokens=60)
    [expected] = await alone(workers, [prompt], max_tokens=60)
    streams = [call(workers, request(workers, prompt, sampling=sampling)) for _ in range(10)]
    starts = await asyncio.gather(*(read(stream, 2) for stream in streams))
    assert inside.engine.num_running == 10
    assert inside.admission.pool.num_used == 4 + 10
    for start, stream in zip(starts, streams, strict=True):
        assert start + await read(stream) == expected
    await inside.assert_all_free()


async def test_a_request_grows_into_the_whole_pool_and_no_further(serve_small: Serve, make_prompt: Any) -> None:
    workers = await serve_small(4)
    prompt = make_prompt(10)
    answer = await workers.generate(prompt, max_tokens=4 * BLOCK_SIZE - 10 + 1)
    assert len(answer.tokens) == 4 * BLOCK_SIZE - 9
    error = (await asyncio.gather(workers.generate(prompt, max_tokens=5 * BLOCK_SIZE), return_exceptions=True))[0]
    assert isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.INVALID_ARGUMENT
    await Inside.of(workers).assert_all_free()


# --- admission alone -----------------------------------------------------------------------------------------------


class Grower:
    """A request that is admitted, grows to its end and steps back when it is asked to."""

    def __init__(self, admission: Admission, *, start: int, blocks: int, slots: int, priority: int) -> None:
        self.admission, self.start, self.blocks, self.slots = admission, start, blocks, slots
        self.priority = priority
        self.preempted = asyncio.Event()
        self.num_swaps = 0

    async def run(self, rng: random.Random, check: Callable[[Reservation], None]) -> None:
        async with self.admission.reserve(
            range(self.start), [], num_slots=self.slots, at_most=range(self.blocks), priority=self.priority
        ) as mine:
            held = self.start
            while held < self.blocks:
                self.admission.allow_swap(mine, self.preempted.set)
                growth = asyncio.create_task(self.admission.grow(mine, held))
                asked = asyncio.create_task(self.preempted.wait())
                await asyncio.wait([growth, asked], return_when=asyncio.FIRST_COMPLETED)
                asked.cancel()
                if growth.done():
                    held += 1
                else:
                    growth.cancel()
                    await asyncio.gather(growth, return_exceptions=True)
                check(mine)
                if self.preempted.is_set():
                    self.preempted.clear()
                    self.num_swaps += 1
                    await self.admission.swap_out(mine, indices=range(held), num_slots=self.slots)
                    check(mine)
                await asyncio.sleep(rng.random() * 0.001)


@pytest.mark.parametrize("num_shares", [1, 3])
@pytest.mark.parametrize("seed", range(12))
async def test_everybody_comes_to_an_end(seed: int, num_shares: int) -> None:
    """Random sizes and priorities in a pool for one or two of them: no deadlock, no leak, nothing held twice, and every
    block on the device of its index."""
    rng = random.Random(seed)
    admission = Admission(BlockPool(12, num_shares=num_shares), num_slots=3, max_waiting=100)
    active: dict[int, Reservation] = {}

    def check(mine: Reservation) -> None:
        active[id(mine)] = mine
        held = [block for r in active.values() for block in r.block_ids]
        assert len(held) == len(set(held))
        slots = [slot for r in active.values() for slot in r.slots]
        assert len(slots) == len(set(slots)) <= 3
        assert all(block_id % num_shares == i % num_shares for i, block_id in enumerate(mine.block_ids))
        admission.pool.check_integrity()

    growers = [
        Grower(
            admission,
            start=rng.randint(1, 6),
            blocks=rng.randint(6, 12),
            slots=rng.randint(1, 3),
            priority=rng.randint(0, 2),
        )
        for _ in range(30)
    ]
    tasks = []
    for grower in growers:
        tasks.append(asyncio.create_task(grower.run(rng, check)))
        await asyncio.sleep(rng.random() * 0.002)
        if rng.random() < 0.2:
            rng.choice(tasks).cancel()
    async with asyncio.timeout(30):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results), results
    assert sum(grower.num_swaps for grower in growers) > 3
    assert admission.pool.num_used == admission.num_waiting == admission.num_requests == 0
    assert sorted(admission._slots) == [0, 1, 2]
    assert not admission._leaving and not admission._swappable and not admission._growing
