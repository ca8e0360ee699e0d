"""One node of a ring, as the ring sees it, and what the ring did."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from kvferry.kvstore.breaker import BreakerState
from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.errors import KVStoreError, StoreUnavailable

SETTLE_S = 1.0
"""A node that left may still be asked so long by work that chose it before: between two calls, too."""


@dataclass
class RingCounters:
    """What a ring did since it was made, beside what the client of each node counts."""

    left_behind: int = 0
    """Calls to a node that went on after the answer was known from others."""
    failovers: int = 0
    """Times that a get went on with another node, because one did not answer or lacked a record."""
    corrupt: int = 0
    """Damaged records among them."""
    copies_lost: int = 0
    """Copies of a stored record that a node did not take, or was not asked to take because it was silent."""
    unanswered: int = 0
    """Look-ups to one node that it did not answer."""


class RingMember:
    """A node's client, and how many calls wait for it. Lives on the ring's event loop."""

    def __init__(self, address: str, client: StoreClient) -> None:
        self.address = address
        self.client = client
        self._num_left_behind = 0
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_closed = False

    @property
    def is_up(self) -> bool:
        """It answered the last call."""
        return self.client.breaker_state is BreakerState.CLOSED

    @property
    def is_silent(self) -> bool:
        """It owes an answer that its replicas gave long ago: ask them first."""
        return self._num_left_behind > 0

    @contextmanager
    def running(self) -> Iterator[StoreClient]:
        """The client for one call: it is not closed before the call has ended. Raises StoreUnavailable when the node
        left the ring and its client is closed already."""
        if self._is_closed:
            raise StoreUnavailable(f"the store node {self.address} is not used any more")
        self._num_running += 1
        self._idle.clear()
        try:
            yield self.client
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._idle.set()

    def leave_behind(self, task: asyncio.Task[Any]) -> None:
        """The node counts as silent until `task`, a call to it, has ended."""
        self._num_left_behind += 1
        task.add_done_callback(self._caught_up)

    async def retire(self, timeout_s: float) -> None:
        """Closes the client when its calls have ended, after `timeout_s` in any case."""
        try:
            await asyncio.sleep(SETTLE_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._idle.wait()
        finally:  # also when the ring is closed meanwhile
            self._is_closed = True
            await self.client.close()

    def _caught_up(self, task: asyncio.Task[Any]) -> None:
        self._num_left_behind -= 1
        error = None if task.cancelled() else task.exception()
        # A KVStoreError is in the client's counters and its breaker; the answer came from others.
        if error is not None and not isinstance(error, KVStoreError):
            raise error  # to the event loop's handler


def nobody_answered(members: int) -> StoreUnavailable:
    """What a call raises when no node could be asked."""
    return StoreUnavailable(f"none of the {members} store nodes that may have the block answered")
