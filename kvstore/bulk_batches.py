"""The records of one reply, taken from the node's event loop by the thread that sends them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from kvferry.kvstore.errors import StoreUnavailable

CLOSE_TIMEOUT_S = 2.0

T = TypeVar("T")


class Batches:
    """What a RecordSource yields on the node's loop, for another thread, which sends one while the next is read."""

    def __init__(
        self, source: AsyncGenerator[list[bytes | None]], loop: asyncio.AbstractEventLoop, deadline: float
    ) -> None:
        self._source = source
        self._loop = loop
        self._deadline = deadline
        self._reading: asyncio.Task[list[bytes | None]] | None = None  # only the loop uses it
        self._coming: Future[list[bytes | None]] | None = None

    def begin_next(self) -> None:
        """Starts reading. Raises StoreUnavailable when the loop has ended."""
        self._coming = self._start(self._read())

    def next(self) -> list[bytes | None]:
        """The next records. Raises what the source does, TimeoutError after the deadline, and StoreUnavailable when the
        loop has ended."""
        if self._coming is None:
            self.begin_next()
        assert self._coming is not None
        coming, self._coming = self._coming, None
        # The loop bounds it; the second bound is for a loop that ends or hangs meanwhile.
        return coming.result(max(0.0, self._deadline - time.monotonic()) + CLOSE_TIMEOUT_S)

    def close(self) -> None:
        """Ends what is being read."""
        with contextlib.suppress(TimeoutError, StoreUnavailable):
            self._start(self._end()).result(CLOSE_TIMEOUT_S)

    async def _read(self) -> list[bytes | None]:
        self._reading = asyncio.ensure_future(anext(self._source))
        async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
            return await self._reading

    async def _end(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        await self._source.aclose()

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError as error:
            work.close()
            raise StoreUnavailable("the node is ending") from error
