"""How many requests run at once, how many wait, and who is sent away."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvferry.deploy.errors import Overloaded

_MIN_RETRY_MS = 100
_MAX_RETRY_MS = 30_000
_SMOOTHING = 0.2


class Admission:
    """At most `max_concurrent` requests hold a slot; at most `max_queued` wait, first come, first served."""

    def __init__(self, *, max_concurrent: int, max_queued: int) -> None:
        self._max_concurrent = max_concurrent
        self._max_queued = max_queued
        self._num_running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._mean_seconds = 1.0

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def num_queued(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Waits for a turn; raises `Overloaded` at once when the queue is full."""
        await self._acquire()
        started = time.monotonic()
        try:
            yield
        finally:
            self._mean_seconds += _SMOOTHING * (time.monotonic() - started - self._mean_seconds)
            self._release()

    async def _acquire(self) -> None:
        if self._num_running < self._max_concurrent:
            self._num_running += 1
            return
        if len(self._waiting) >= self._max_queued:
            raise Overloaded(
                f"The gateway is full: {self._num_running} requests run and {len(self._waiting)} wait. "
                "Try again later.",
                retry_after_ms=self._retry_after_ms(),
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the slot was handed over in the same moment
                self._release()
            else:
                self._waiting.remove(turn)
            raise

    def _release(self) -> None:
        """Hands the slot to the next in the queue; `_num_running` then stays."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._num_running -= 1

    def _retry_after_ms(self) -> int:
        turns = (len(self._waiting) + 1) / self._max_concurrent
        return int(min(max(1000 * self._mean_seconds * turns, _MIN_RETRY_MS), _MAX_RETRY_MS))
