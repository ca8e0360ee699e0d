"""Who may decode now: slots and blocks are reserved for a whole request before any of it is computed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from kvferry.decode.block_pool import BlockPool, OutOfBlocks


class WorkerFull(Exception):
    """More requests wait than the worker lets wait."""


class RequestTooLarge(ValueError):
    """The request would not fit even in an empty pool."""


@dataclass(frozen=True)
class Reservation:
    """A slot, and blocks for prompt and answer; the prompt's complete blocks come first."""

    slot: int
    block_ids: list[int]
    shared: frozenset[int]
    """Indices of blocks that were in the pool already, under their key."""


class Admission:
    """First come, first served. Runs on the event loop only."""

    def __init__(self, pool: BlockPool, *, num_slots: int, max_waiting: int) -> None:
        self.pool = pool
        self._num_slots = num_slots
        self._slots = list(range(num_slots))
        self._max_waiting = max_waiting
        self._turn = asyncio.Lock()  # fair: waiters get it in the order in which they came
        self._freed = asyncio.Event()
        self.num_waiting = 0

    @property
    def num_requests(self) -> int:
        """Requests that hold room or wait for it."""
        return self.num_waiting + self._num_slots - len(self._slots)

    @asynccontextmanager
    async def reserve(self, num_blocks: int, keys: list[bytes]) -> AsyncIterator[Reservation]:
        """Waits for room; the room is freed when the context ends.

        `keys` are those of the prompt's complete blocks. Raises WorkerFull or RequestTooLarge at once.
        """
        if num_blocks > self.pool.num_blocks:
            raise RequestTooLarge(
                f"the request needs {num_blocks} blocks and this worker's pool has "
                f"{self.pool.num_blocks}: shorten it, or start the worker with more --kv-memory"
            )
        reservation = self._try(num_blocks, keys) if self.num_waiting == 0 else None
        if reservation is None:
            reservation = await self._wait(num_blocks, keys)
        try:
            yield reservation
        finally:
            self._slots.append(reservation.slot)
            self.pool.release(reservation.block_ids)
            self._freed.set()

    async def _wait(self, num_blocks: int, keys: list[bytes]) -> Reservation:
        if self.num_waiting >= self._max_waiting:
            raise WorkerFull(f"{self.num_waiting} requests wait for room already; try again later")
        self.num_waiting += 1
        try:
            async with self._turn:
                while (reservation := self._try(num_blocks, keys)) is None:
                    self._freed.clear()
                    await self._freed.wait()
                return reservation
        finally:
            self.num_waiting -= 1

    def _try(self, num_blocks: int, keys: list[bytes]) -> Reservation | None:
        if not self._slots:
            return None
        shared = {i: block_id for i, key in enumerate(keys) if (block_id := self.pool.share(key)) is not None}
        try:
            fresh = self.pool.allocate(num_blocks - len(shared))
        except OutOfBlocks:
            self.pool.release(list(shared.values()))
            return None
        rest = iter(fresh)
        block_ids = [shared[i] if i in shared else next(rest) for i in range(num_blocks)]
        return Reservation(self._slots.pop(), block_ids, frozenset(shared))
