"""Of two attempts at one request only the newer has an effect."""

import asyncio
from contextlib import suppress

import pytest

from kvferry.proto.attempts import Attempts, Draining, Fenced, Superseded


class Calls:
    """Calls that run until they are ended or let go; how each ended."""

    def __init__(self):
        self.attempts = Attempts()
        self.go = asyncio.Event()
        self.ends = {}

    async def run(self, name, attempt, request="r", tenant="t"):
        try:
            with self.attempts.running(tenant, request, attempt):
                await self.go.wait()
            self.ends[name] = "done"
        except (Superseded, Draining, Fenced) as error:
            self.ends[name] = type(error).__name__

    async def begin(self, name, attempt, **options):
        task = asyncio.create_task(self.run(name, attempt, **options))
        for _ in range(3):
            await asyncio.sleep(0)
        return task


@pytest.fixture
async def calls():
    calls = Calls()
    yield calls
    calls.go.set()
    assert await calls.attempts.until_idle(5)


async def test_a_newer_attempt_ends_the_older(calls):
    old, new = await calls.begin("old", 1), await calls.begin("new", 2)
    await old
    calls.go.set()
    await new
    assert calls.ends == {"old": "Superseded", "new": "done"}
    assert calls.attempts.counters.num_superseded == 1


@pytest.mark.parametrize("late", [1, 2])
async def test_an_attempt_that_comes_late_is_refused(calls, late):
    await calls.begin("new", 2)
    await (await calls.begin("late", late))
    assert calls.ends == {"late": "Superseded"}
    calls.go.set()
    assert await calls.attempts.until_idle(5)
    await (await calls.begin("later", late))  # also when the newer one is over
    assert calls.ends == {"late": "Superseded", "new": "done", "later": "Superseded"}
    assert calls.attempts.counters.num_stale == 2


async def test_other_requests_tenants_and_calls_without_an_attempt_are_left_alone(calls):
    for name, options in {"a": {}, "b": {"request": "s"}, "c": {"tenant": "u"}}.items():
        await calls.begin(name, 1, **options)
    await calls.begin("d", 0)
    await calls.begin("e", 0)
    assert calls.attempts.num_running == 5
    assert not calls.ends


async def test_lost_lease_ends_all_and_new_ones_begin(calls):
    await calls.begin("a", 1)
    await calls.begin("b", 0)
    assert calls.attempts.end_all("away") == 2
    assert calls.attempts.end_all("away") == 0
    assert await calls.attempts.until_idle(5)
    await calls.begin("c", 2)
    assert calls.ends == {"a": "Fenced", "b": "Fenced"}
    assert calls.attempts.counters.num_fenced == 2
    assert calls.attempts.num_running == 1


async def test_draining_refuses_and_waits(calls):
    running = await calls.begin("running", 1)
    calls.attempts.draining = True
    await (await calls.begin("new", 2))
    assert not await calls.attempts.until_idle(0.05)
    calls.go.set()
    assert await calls.attempts.until_idle(5)
    await running
    assert calls.ends == {"new": "Draining", "running": "done"}
    assert calls.attempts.counters.num_refused == 1


async def test_a_callers_own_cancel_stays_one(calls):
    task = await calls.begin("a", 1)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert not calls.ends
    assert calls.attempts.num_running == 0
