"""Who gets room, in what order, and that all of it comes back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from kvferry.decode.admission import Admission, RequestTooLarge, Reservation, WorkerFull
from kvferry.decode.block_pool import BlockPool

KEYS = [bytes([number]) * 32 for number in range(8)]


class Failure(Exception):
    pass


class Request:
    """A task that reserves room and keeps it until it is told to leave."""

    def __init__(self, admission: Admission, num_blocks: int, keys: list[bytes] | None = None) -> None:
        self.reservation: Reservation | None = None
        self.leaving: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(self._run(admission, num_blocks, keys or []))

    async def _run(self, admission: Admission, num_blocks: int, keys: list[bytes]) -> None:
        async with admission.reserve(range(num_blocks), keys) as self.reservation:
            await self.leaving

    @property
    def admitted(self) -> bool:
        return self.reservation is not None

    async def leave(self, how: str = "exit") -> None:
        if how == "cancel":
            self.task.cancel()
        elif how == "exception":
            self.leaving.set_exception(Failure())
        else:
            self.leaving.set_result(None)
        await asyncio.wait([self.task])
        if not self.task.cancelled():
            self.task.exception()
        await settle()


async def settle() -> None:
    """Lets every task that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


async def assert_all_free(admission: Admission, num_slots: int) -> None:
    """The whole pool and every slot can be had at once, and nobody waits."""
    pool = admission.pool
    pool.check_integrity()
    assert admission.num_requests == admission.num_waiting == 0
    assert (pool.num_used, pool.num_available) == (0, pool.num_blocks)
    async with AsyncExitStack() as stack, asyncio.timeout(5):
        sizes = [pool.num_blocks - num_slots + 1] + [1] * (num_slots - 1)
        held = [await stack.enter_async_context(admission.reserve(range(size), [])) for size in sizes]
        assert sorted(r.slots[0] for r in held) == list(range(num_slots))
        assert sorted(b for r in held for b in r.block_ids) == list(range(pool.num_blocks))
    assert (admission.num_waiting, pool.num_used) == (0, 0)


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Request]]:
    started: list[Request] = []

    def request(admission: Admission, num_blocks: int = 1, keys: list[bytes] | None = None) -> Request:
        started.append(Request(admission, num_blocks, keys))
        return started[-1]

    yield request
    for each in started:
        each.task.cancel()
    await asyncio.gather(*(each.task for each in started), return_exceptions=True)


def make(num_blocks: int = 8, num_slots: int = 4, max_waiting: int = 16) -> Admission:
    return Admission(BlockPool(num_blocks), num_slots=num_slots, max_waiting=max_waiting)


async def test_reserves_a_slot_and_blocks() -> None:
    admission = make()
    async with admission.reserve(range(3), []) as one, admission.reserve(range(2), []) as other:
        assert (len(one.block_ids), len(other.block_ids)) == (3, 2)
        assert len({*one.block_ids, *other.block_ids}) == 5
        assert one.slots != other.slots
        assert one.shared == other.shared == frozenset()
        assert (admission.pool.num_used, admission.num_waiting) == (5, 0)
    await assert_all_free(admission, 4)


async def test_first_come_first_served(start: Callable[..., Request]) -> None:
    admission = make(num_slots=1)
    requests = [start(admission, 1 + number % 3) for number in range(6)]
    for number, request in enumerate(requests):
        await settle()
        assert [r.admitted for r in requests] == [True] * (number + 1) + [False] * (5 - number)
        assert admission.num_requests == 6 - number
        assert admission.num_waiting == 5 - number
        await request.leave()
    await assert_all_free(admission, 1)


async def test_a_small_request_does_not_overtake_a_large_one(start: Callable[..., Request]) -> None:
    admission = make(num_blocks=8)
    first = start(admission, 5)
    large = start(admission, 4)
    small = start(admission, 1)  # would fit beside `first`
    await settle()
    assert (first.admitted, large.admitted, small.admitted) == (True, False, False)
    await first.leave()
    assert (large.admitted, small.admitted) == (True, True)


@pytest.mark.parametrize("how", ["exit", "exception", "cancel"])
@pytest.mark.parametrize("scarce", ["slots", "blocks"])
async def test_leaving_makes_room(start: Callable[..., Request], how: str, scarce: str) -> None:
    admission = make(num_blocks=8, num_slots=1) if scarce == "slots" else make(num_blocks=8, num_slots=4)
    size = 2 if scarce == "slots" else 8
    first, second = start(admission, size), start(admission, size)
    await settle()
    assert (first.admitted, second.admitted) == (True, False)
    await first.leave(how)
    assert second.admitted
    await second.leave(how)
    await assert_all_free(admission, 1 if scarce == "slots" else 4)


@pytest.mark.parametrize("position", [0, 1, 2])
async def test_cancelled_while_waiting(start: Callable[..., Request], position: int) -> None:
    """Whoever gives up, the others get their turn, in order."""
    admission = make(num_slots=1)
    running = start(admission)
    await settle()
    waiting = [start(admission) for _ in range(3)]
    await settle()
    await waiting.pop(position).leave("cancel")
    assert admission.num_waiting == 2
    for request in waiting:
        assert not request.admitted
        await running.leave()
        assert request.admitted
        running = request
    await running.leave()
    await assert_all_free(admission, 1)


async def test_cancelled_in_the_moment_of_admission(start: Callable[..., Request]) -> None:
    """Room is freed and the waiter is cancelled before it could run: the next one gets the room."""
    admission = make(num_slots=1)
    running = start(admission)
    await settle()
    unlucky, patient = start(admission), start(admission)
    await settle()
    running.leaving.set_result(None)
    await running.task
    unlucky.task.cancel()
    await settle()
    assert unlucky.task.cancelled() and patient.admitted
    await patient.leave()
    await assert_all_free(admission, 1)


async def test_full_at_the_limit(start: Callable[..., Request]) -> None:
    admission = make(num_slots=1, max_waiting=2)
    running = start(admission)
    await settle()
    first, second = start(admission), start(admission)
    await settle()
    with pytest.raises(WorkerFull, match="2 requests wait"):
        async with admission.reserve(range(1), []):
            pytest.fail("there is no room")
    assert admission.num_waiting == 2
    await first.leave("cancel")
    third = start(admission)  # a place in the queue is free again
    await settle()
    assert not third.task.done()
    await running.leave()
    assert second.admitted
    await second.leave()
    assert third.admitted
    await third.leave()
    await assert_all_free(admission, 1)


async def test_without_a_queue_there_is_still_room(start: Callable[..., Request]) -> None:
    admission = make(num_slots=1, max_waiting=0)
    running = start(admission)
    await settle()
    assert running.admitted
    with pytest.raises(WorkerFull):
        async with admission.reserve(range(1), []):
            pytest.fail("there is no room")
    await running.leave()
    await assert_all_free(admission, 1)


async def test_a_newcomer_does_not_take_room_that_is_promised(start: Callable[..., Request]) -> None:
    """It comes after room was freed and before the one that waits for it could run."""
    admission = make(num_slots=1)
    running = start(admission)
    await settle()
    patient = start(admission)
    await settle()
    running.leaving.set_result(None)
    while not running.task.done():
        await asyncio.sleep(0)
    newcomer = start(admission)
    await settle()
    assert (patient.admitted, newcomer.admitted) == (True, False)
    await patient.leave()
    assert newcomer.admitted


async def test_a_request_that_never_fits_is_refused_at_once(start: Callable[..., Request]) -> None:
    admission = make(num_blocks=8, num_slots=1, max_waiting=1)
    start(admission, 8)
    await settle()
    start(admission, 8)
    await settle()  # even when the queue is full: trying again later would not help
    with pytest.raises(RequestTooLarge, match=r"needs 9 blocks and this worker's pool has 8.*--kv-memory"):
        async with admission.reserve(range(9), []):
            pytest.fail("there is no room")
    assert admission.num_waiting == 1


async def test_shared_blocks_count_once(start: Callable[..., Request]) -> None:
    admission = make(num_blocks=6)
    first = start(admission, 4, KEYS[:3])
    await settle()
    assert first.reservation is not None and first.reservation.shared == frozenset()
    for block_id, key in zip(first.reservation.block_ids, KEYS[:3], strict=False):
        admission.pool.publish(block_id, key)
    second = start(admission, 5, [*KEYS[:3], KEYS[7]])  # 3 shared, and the 2 that are left
    await settle()
    assert second.reservation is not None
    assert second.reservation.shared == {0, 1, 2}
    assert second.reservation.block_ids[:3] == first.reservation.block_ids[:3]
    assert admission.pool.num_used == 6
    third = start(admission, 4, KEYS[:3])
    await settle()
    assert not third.admitted
    await first.leave()  # frees one block: the shared ones have another user
    assert third.reservation is not None and third.reservation.shared == {0, 1, 2}
    await second.leave()
    await third.leave()
    await assert_all_free(admission, 4)


async def test_a_hole_in_the_shared_blocks_gets_a_fresh_one() -> None:
    admission = make(num_blocks=6)
    async with admission.reserve(range(3), KEYS[:3]) as first:
        admission.pool.publish(first.block_ids[0], KEYS[0])
        admission.pool.publish(first.block_ids[2], KEYS[2])
        async with admission.reserve(range(4), KEYS[:3]) as second:
            assert second.shared == {0, 2}
            assert second.block_ids[0] == first.block_ids[0]
            assert second.block_ids[2] == first.block_ids[2]
            assert len(set(second.block_ids)) == 4
            assert {second.block_ids[1], second.block_ids[3]}.isdisjoint(first.block_ids)
    await assert_all_free(admission, 4)


async def test_a_waiting_request_holds_no_shared_block(start: Callable[..., Request]) -> None:
    admission = make(num_blocks=4)
    running = start(admission, 3, KEYS[:2])
    await settle()
    assert running.reservation is not None
    for block_id, key in zip(running.reservation.block_ids, KEYS[:2], strict=False):
        admission.pool.publish(block_id, key)
    waiting = start(admission, 4, KEYS[:2])  # shares 2, and lacks 1
    await settle()
    assert not waiting.admitted and admission.pool.num_used == 3
    await waiting.leave("cancel")
    await running.leave()
    await assert_all_free(admission, 4)


async def test_no_leak_in_200_random_reservations() -> None:
    """Random sizes, shared prefixes, failures and cancellations; nobody ever has another's slot or block."""
    rng = random.Random(0)
    num_slots, num_blocks = 5, 20
    admission = make(num_blocks=num_blocks, num_slots=num_slots, max_waiting=200)
    pool = admission.pool
    holders: dict[int, Reservation] = {}
    outcomes: dict[str, int] = {}

    async def request(number: int) -> None:
        keys = KEYS[: rng.randint(0, 8)]
        num_blocks_wanted = len(keys) + rng.randint(0, 4)
        async with admission.reserve(range(num_blocks_wanted), keys) as mine:
            for other in holders.values():
                assert set(other.slots).isdisjoint(mine.slots)
                fresh = {b for i, b in enumerate(mine.block_ids) if i not in mine.shared}
                assert fresh.isdisjoint(other.block_ids)
            assert len(mine.block_ids) == len(set(mine.block_ids)) == num_blocks_wanted
            holders[number] = mine
            try:
                for index, key in enumerate(keys):
                    await asyncio.sleep(0)
                    pool.publish(mine.block_ids[index], key)
                await asyncio.sleep(rng.random() * 0.002)
                if rng.random() < 0.2:
                    raise Failure
            finally:
                del holders[number]
                pool.check_integrity()

    tasks = []
    for number in range(200):
        tasks.append(asyncio.create_task(request(number)))
        if rng.random() < 0.3:
            await asyncio.sleep(0.001)
        if rng.random() < 0.4:
            rng.choice(tasks[-20:]).cancel()
    async with asyncio.timeout(30):
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            name = type(result).__name__
            outcomes[name] = outcomes.get(name, 0) + 1
    assert set(outcomes) == {"NoneType", "Failure", "CancelledError"}, outcomes
    assert min(outcomes.values()) > 10, outcomes
    assert not holders
    await assert_all_free(admission, num_slots)


async def test_growing_ends_with_the_request() -> None:
    """Room that comes free after a request has left does not go to its growth: nobody would give it back."""
    admission = make(num_blocks=2, num_slots=2)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(admission.reserve(range(1), []))
        async with admission.reserve(range(1), [], at_most=range(2)) as mine:
            growth = asyncio.create_task(admission.grow(mine, 1))
            await settle()
            assert not growth.done()
        await settle()
        assert growth.cancelled() and mine.block_ids == []
    await assert_all_free(admission, 2)
