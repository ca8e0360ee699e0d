"""Calls of a server that may be fenced, superseded or refused: one table for each service.

A request may be tried several times, by the same gateway or by others. Every try has an `attempt`, greater than those
before it. Of two attempts at one request only the newer has an effect: an older one that comes late is refused, and one
that still runs is ended. Attempt 0 is outside all of this.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import grpc

DRAINING_KEY = "kvferry-draining"
"""Trailing metadata of an UNAVAILABLE: this process takes no new calls, others do."""

_MAX_REMEMBERED = 4096
_MAX_AHEAD = 64

T = TypeVar("T")


class CallEnded(Exception):
    """A call that must not run, or not any longer. `code` and `metadata` are for the caller."""

    code = grpc.StatusCode.UNAVAILABLE
    metadata: tuple[tuple[str, str], ...] = ()


class Draining(CallEnded):
    metadata = ((DRAINING_KEY, "1"),)


class Superseded(CallEnded):
    code = grpc.StatusCode.ABORTED


class Fenced(CallEnded):
    """Its callers have given this process up."""


@dataclass
class CallCounters:
    """Since the start."""

    num_superseded: int = 0
    """Running calls that were ended by a newer attempt."""
    num_stale: int = 0
    """Calls refused because a newer attempt was known."""
    num_fenced: int = 0
    """Running calls ended because this process had lost its lease, or its time to drain was over."""
    num_refused: int = 0
    """Calls refused while draining."""


class RunningCall:
    """One of `Attempts`. Ending it cancels the task that it runs in."""

    def __init__(self) -> None:
        self._own_task = self._task = asyncio.current_task()
        self.ended: CallEnded | None = None
        """Why."""

    def end(self, reason: CallEnded) -> None:
        if self.ended is None and self._task is not None:
            self.ended = reason
            self._task.cancel()

    def take_cancellation(self) -> CallEnded | None:
        """The reason, where a cancellation of the call's own task was ours."""
        if self.ended is not None and self._task is not None and self._task is self._own_task:
            self._task.uncancel()
        return self.ended

    async def pumped(self, items: AsyncGenerator[T]) -> AsyncGenerator[T]:
        """`items`, made in a task of their own. Ending the call cancels that one and not a write to the caller, which
        gRPC would finish later than the status; so what `items` holds is free at once, and the caller is told why when
        it has taken what is being written. Closes `items`."""
        made: deque[T] = deque()
        changed, room = asyncio.Event(), asyncio.Event()

        async def pump() -> None:
            async with aclosing(items):
                async for item in items:
                    made.append(item)
                    changed.set()
                    while len(made) >= _MAX_AHEAD:
                        room.clear()
                        await room.wait()

        task = asyncio.create_task(pump())
        task.add_done_callback(lambda _: changed.set())
        self._task = task
        try:
            while True:
                changed.clear()
                while made and self.ended is None:
                    yield made.popleft()
                    room.set()
                if self.ended is not None:
                    raise self.ended
                if task.done():
                    task.result()
                    return
                await changed.wait()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class Attempts:
    """The calls that run now, and the newest attempt known of each request. Lives on one event loop."""

    def __init__(self) -> None:
        self._running: dict[int, RunningCall] = {}
        self._newest: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._by_request: dict[tuple[str, str], RunningCall] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self.counters = CallCounters()
        self.draining = False
        """Set it to refuse new calls."""

    @property
    def num_running(self) -> int:
        return len(self._running)

    def runs(self, tenant: str, request_id: str) -> bool:
        """Whether an attempt at this request, with a number, runs now."""
        return (tenant, request_id) in self._by_request

    @contextmanager
    def running(self, tenant: str, request_id: str, attempt: int) -> Iterator[RunningCall]:
        """Surrounds a call, in its own task. Raises `Draining` or `Superseded` when it must not begin, and what
        ended it when it must not go on."""
        if self.draining:
            self.counters.num_refused += 1
            raise Draining("this process takes no new requests: it is about to end")
        request = (tenant, request_id)
        if attempt:
            self._admit(request, attempt)
        call = RunningCall()
        self._running[id(call)] = call
        self._idle.clear()
        if attempt:
            self._by_request[request] = call
        try:
            yield call
        except asyncio.CancelledError:
            if reason := call.take_cancellation():
                raise reason from None
            raise
        finally:
            del self._running[id(call)]
            if self._by_request.get(request) is call:
                del self._by_request[request]
            if not self._running:
                self._idle.set()

    def end_all(self, reason: str) -> int:
        """Ends every running call with `Fenced`; how many."""
        calls = [call for call in self._running.values() if call.ended is None]
        for call in calls:
            call.end(Fenced(reason))
        self.counters.num_fenced += len(calls)
        return len(calls)

    async def until_idle(self, timeout_s: float) -> bool:
        """Whether the last call has ended in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _admit(self, request: tuple[str, str], attempt: int) -> None:
        if attempt <= self._newest.get(request, 0):
            self.counters.num_stale += 1
            raise Superseded("a newer attempt at this request is known")
        self._newest[request] = attempt
        self._newest.move_to_end(request)
        if len(self._newest) > _MAX_REMEMBERED:
            self._newest.popitem(last=False)
        if older := self._by_request.get(request):
            self.counters.num_superseded += 1
            older.end(Superseded("a newer attempt at this request has begun"))


def is_draining(error: grpc.aio.AioRpcError) -> bool:
    """Whether the other side refused a call because it is about to end."""
    return any(key == DRAINING_KEY for key, _ in error.trailing_metadata() or ())
