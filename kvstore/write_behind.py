"""Records that wait to be written to the lower tiers: bounded bytes, nothing waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

_Write = Callable[[bytes, bytes], Awaitable[None]]


class WriteBehind:
    """Calls `write` for each record offered, in order, `num_workers` at a time. `write` must not raise.

    The records of the queue and those being written hold at most `max_bytes`, counted by their sizes.
    """

    def __init__(self, write: _Write, *, max_bytes: int, num_workers: int = 2) -> None:
        self._write = write
        self._max_bytes = max_bytes
        self._num_workers = num_workers
        self._queue: dict[bytes, bytes] = {}
        self._writing: dict[bytes, asyncio.Task[None]] = {}
        self._workers: set[asyncio.Task[None]] = set()
        self._bytes = 0

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the records that are not written yet."""
        return self._bytes

    def offer(self, key: bytes, record: bytes) -> bool:
        """Takes the record; False when there is no room for it. Needs a running event loop."""
        if key in self._queue or key in self._writing:
            return True
        if self._bytes + len(record) > self._max_bytes:
            return False
        self._queue[key] = record
        self._bytes += len(record)
        if len(self._workers) < self._num_workers:
            worker = asyncio.create_task(self._work(), name="kvstore-write-behind")
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)
        return True

    async def discard(self, keys: Sequence[bytes] | None) -> None:
        """Forgets the keys (None: all), and waits for those that are being written now."""
        for key in list(self._queue if keys is None else keys):
            record = self._queue.pop(key, None)
            if record is not None:
                self._bytes -= len(record)
        running = [task for key, task in self._writing.items() if keys is None or key in keys]
        if running:
            await asyncio.wait(running)

    async def drain(self, timeout_s: float) -> int:
        """Waits until all is written, at most `timeout_s`; returns how many records are not."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._workers:
                    await asyncio.wait(set(self._workers))
        except TimeoutError:
            pass  # told by the return value
        return len(self._queue) + len(self._writing)

    async def close(self, timeout_s: float) -> int:
        """As `drain`, then stops."""
        left = await self.drain(timeout_s)
        for worker in set(self._workers):
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        return left

    async def _work(self) -> None:
        while self._queue:
            key = next(iter(self._queue))
            record = self._queue.pop(key)
            self._writing[key] = task = asyncio.ensure_future(self._write(key, record))
            try:
                await task
            finally:
                del self._writing[key]
                self._bytes -= len(record)
