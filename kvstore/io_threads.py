"""Blocking file operations beside the event loop: bounded threads, bounded waiting line."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from kvferry.kvstore.errors import StoreUnavailable

_T = TypeVar("_T")


class IoThreads:
    """Runs jobs in `num_threads` threads; at most `max_waiting` jobs run or wait at one time."""

    def __init__(self, *, num_threads: int, max_waiting: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix=name)
        self._max_waiting = max_waiting
        self._waiting = 0

    @property
    def is_full(self) -> bool:
        """Whether the next job would be refused."""
        return self._waiting >= self._max_waiting

    async def run(self, job: Callable[[], _T]) -> _T:
        """The job's result. Raises StoreUnavailable at once when the line is full.

        A job that has started cannot be stopped: cancelling the caller leaves it running.
        """
        if self.is_full:
            raise StoreUnavailable(f"{self._waiting} disk operations are waiting already; the disk is too slow")
        self._waiting += 1
        future = asyncio.get_running_loop().run_in_executor(self._executor, job)
        future.add_done_callback(self._done)
        return await asyncio.shield(future)

    def close(self) -> None:
        """Lets the threads end after their current jobs."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _done(self, future: asyncio.Future[_T]) -> None:
        self._waiting -= 1
        if not future.cancelled():
            future.exception()  # seen: the caller may have gone
