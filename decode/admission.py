"""Who may decode now, and who must step back: slots and blocks are given out here, in order of rank."""

from __future__ import annotations

import asyncio
import bisect
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from kvferry.decode.block_pool import BlockPool, OutOfBlocks


class WorkerFull(Exception):
    """More requests wait than the worker lets wait."""


class RequestTooLarge(ValueError):
    """The request would not fit even in an empty pool."""


@dataclass(eq=False, kw_only=True)
class Reservation:
    """What one request holds. It changes when the request grows, or is swapped out and comes back."""

    rank: tuple[int, int]
    """Priority (lower goes first), then arrival."""
    keys: Sequence[bytes] = ()
    """Of the prompt's complete blocks."""
    slots: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    """First one block for each key, then those that decode fills."""
    shared: frozenset[int] = frozenset()
    """Indices of blocks that were in the pool already, under their key."""


@dataclass(eq=False)
class _Waiter:
    holder: Reservation
    indices: Sequence[int]
    """Of the blocks in their sequences."""
    num_slots: int
    keys: Sequence[bytes]
    granted: asyncio.Future[int | None]
    """The block, for one that grows."""

    @property
    def rank(self) -> tuple[int, int]:
        return self.holder.rank


class Admission:
    """Runs on the event loop only.

    A request is admitted with room for its prompt and one block more for each of its sequences, and grows block by
    block. When the pool is used up, the request of the lowest rank is asked to give all it holds back and to wait.
    Growing goes before entering, so the request of the highest rank always comes to its end: a request that could
    not grow in an empty pool is refused at once. A request of a more urgent priority displaces others when it enters.
    """

    def __init__(self, pool: BlockPool, *, num_slots: int, max_waiting: int) -> None:
        self.pool = pool
        self.num_swaps = 0
        """How often a request was swapped out."""
        self._num_slots = num_slots
        self._slots = list(range(num_slots))
        self._max_waiting = max_waiting
        self._arrivals = itertools.count()
        self._num_holders = 0
        self._growing: list[_Waiter] = []
        self._waiting: list[_Waiter] = []
        self._swappable: dict[Reservation, Callable[[], None]] = {}
        self._leaving: set[Reservation] = set()

    @property
    def num_waiting(self) -> int:
        """Requests that hold nothing: new ones, and those that were swapped out."""
        return len(self._waiting)

    @property
    def num_requests(self) -> int:
        """Requests that hold room or wait for it."""
        return self._num_holders

    @asynccontextmanager
    async def reserve(
        self,
        indices: Sequence[int],
        keys: Sequence[bytes],
        *,
        num_slots: int = 1,
        at_most: Sequence[int] = (),
        priority: int = 0,
    ) -> AsyncIterator[Reservation]:
        """Waits for room; all that the request holds by then is freed when the context ends.

        `indices` in their sequences of the blocks to begin with, first those of `keys`; `at_most`: of all that it can
        grow to. Raises WorkerFull or RequestTooLarge at once.
        """
        largest = max(map(self.pool.largest_share, (indices, at_most)))
        if largest > self.pool.share_blocks:
            shared = "" if self.pool.share_blocks == self.pool.num_blocks else " on its fullest rank"
            raise RequestTooLarge(
                f"the request needs {largest} blocks{shared} and this worker's pool has "
                f"{self.pool.share_blocks}: shorten it, or start the worker with more --kv-memory"
            )
        if num_slots > self._num_slots:
            raise RequestTooLarge(
                f"the request asks for {num_slots} answers and this worker decodes {self._num_slots} sequences at "
                "once: ask for fewer, or start the worker with a larger decode.max_num_seqs"
            )
        mine = Reservation(rank=(priority, next(self._arrivals)), keys=keys)
        waiter = self._enqueue(self._waiting, mine, indices, num_slots, keys)
        if not waiter.granted.done() and len(self._waiting) > self._max_waiting:
            self._waiting.remove(waiter)
            raise WorkerFull(f"{self._max_waiting} requests wait for room already; try again later")
        self._num_holders += 1
        try:
            await waiter.granted
            yield mine
        finally:
            self._num_holders -= 1
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            self.release(mine)

    def release(self, mine: Reservation) -> None:
        """Gives back all that the request holds, and cancels its `grow`; safe to call again."""
        for waiter in [w for w in self._growing if w.holder is mine]:
            self._growing.remove(waiter)
            waiter.granted.cancel()  # else it would get a block that nobody gives back
        self._swappable.pop(mine, None)
        self._leaving.discard(mine)
        self._slots += mine.slots
        self.pool.release(mine.block_ids)
        mine.slots, mine.block_ids, mine.shared = [], [], frozenset()
        self._serve()

    def allow_swap(self, mine: Reservation, preempt: Callable[[], None]) -> None:
        """From now on the request may be asked, once, by a call of `preempt`, to give its room back: it answers with
        `swap_out` or `release`."""
        self._swappable[mine] = preempt
        self._serve()

    async def grow(self, mine: Reservation, index: int) -> int:
        """Waits for one block more, of this index in its sequence; it is added to what the request holds. Cancel it
        when the request is preempted."""
        waiter = self._enqueue(self._growing, mine, (index,), 0, ())
        try:
            block_id = await waiter.granted
        finally:
            if waiter in self._growing:
                self._growing.remove(waiter)
                self._serve()
        assert block_id is not None
        return block_id

    async def swap_out(self, mine: Reservation, *, indices: Sequence[int], num_slots: int) -> None:
        """Gives everything back and waits, at the request's old rank, for blocks of these indices and `num_slots`.

        Afterwards `mine` names the new slots and blocks, of which the `shared` ones have their content.
        """
        self.num_swaps += 1
        self._swappable.pop(mine, None)
        waiter = self._enqueue(self._waiting, mine, indices, num_slots, mine.keys, serve=False)
        self.release(mine)  # the request itself is in the queue by now: nobody of a lower rank goes before it
        try:
            await waiter.granted
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
                self._serve()

    def _enqueue(
        self,
        queue: list[_Waiter],
        holder: Reservation,
        indices: Sequence[int],
        num_slots: int,
        keys: Sequence[bytes],
        *,
        serve: bool = True,
    ) -> _Waiter:
        future: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(holder, indices, num_slots, keys, future)
        bisect.insort(queue, waiter, key=lambda w: w.rank)
        if serve:
            self._serve()
        return waiter

    def _serve(self) -> None:
        """Gives room to whoever is first, as long as there is any; else asks the last in rank to make some."""
        for queue in (self._growing, self._waiting):
            while queue and self._grant(queue[0]):
                del queue[0]
            if queue:
                self._make_room(queue[0], growing=queue is self._growing)
                return

    def _grant(self, waiter: _Waiter) -> bool:
        if waiter.granted.done():  # cancelled; whoever waited takes nothing
            return True
        if len(self._slots) < waiter.num_slots:
            return False
        shared = {i: block_id for i, key in enumerate(waiter.keys) if (block_id := self.pool.share(key)) is not None}
        try:
            fresh = self.pool.allocate([index for i, index in enumerate(waiter.indices) if i not in shared])
        except OutOfBlocks:
            self.pool.release(list(shared.values()))
            return False
        holder = waiter.holder
        if waiter.num_slots:
            rest = iter(fresh)
            holder.block_ids = [shared[i] if i in shared else next(rest) for i in range(len(waiter.indices))]
            holder.shared = frozenset(shared)
            holder.slots = [self._slots.pop() for _ in range(waiter.num_slots)]
            waiter.granted.set_result(None)
        else:
            holder.block_ids += fresh
            waiter.granted.set_result(fresh[0])
        return True

    def _make_room(self, waiter: _Waiter, *, growing: bool) -> None:
        if self._leaving:
            return  # room is on its way
        victims = list(self._swappable)
        if not growing:
            victims = [victim for victim in victims if victim.rank[0] > waiter.rank[0]]
            given_back = [block_id for victim in victims for block_id in victim.block_ids]
            num_slots = sum(len(victim.slots) for victim in victims) + len(self._slots)
            if not self.pool.has_room(waiter.indices, given_back=given_back) or num_slots < waiter.num_slots:
                return  # displacing them all would not be enough
        if victims:
            victim = max(victims, key=lambda v: v.rank)
            self._leaving.add(victim)
            self._swappable.pop(victim)()
