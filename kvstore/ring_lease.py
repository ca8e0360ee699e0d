"""The leases that the nodes of a ring granted for one look-up, under one id."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from kvferry.kvstore.errors import StoreUnavailable
from kvferry.kvstore.ring_member import RingMember

MAX_LEASES = 4096
"""Leases that a ring remembers; the oldest go first, and end by themselves at their nodes."""


class RingLease:
    """What each node granted. A node that answers late is added late, or released at once if the lease is over."""

    def __init__(self, spawn: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        self._spawn = spawn
        self._granted: list[tuple[RingMember, int]] = []
        self._over = False

    @property
    def is_empty(self) -> bool:
        return not self._granted

    def add(self, member: RingMember, lease_id: int) -> None:
        if not lease_id:
            return
        if self._over:
            self._spawn(_release_late(member, lease_id))
        else:
            self._granted.append((member, lease_id))

    def id_at(self, member: RingMember) -> int:
        """The node's newest lease id; 0 where it granted none."""
        return next((lease_id for holder, lease_id in reversed(self._granted) if holder is member), 0)

    async def release(self, timeout_s: float | None) -> None:
        """Raises StoreUnavailable when a node did not answer; its part ends by itself."""
        self._over = True
        granted, self._granted = self._granted, []
        results = await asyncio.gather(
            *(_release(member, lease_id, timeout_s) for member, lease_id in granted), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result


class RingLeases:
    """Leases by id, until they are released or over. Lives on one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._leases: dict[int, tuple[RingLease, float]] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def keep(self, lease: RingLease, lease_s: float) -> int:
        """The id under which the lease is found for `lease_s`."""
        self._forget_old()
        lease_id = 1 + secrets.randbits(63)
        self._leases[lease_id] = (lease, self._clock() + lease_s)
        return lease_id

    def get(self, lease_id: int) -> RingLease | None:
        found = self._leases.get(lease_id)
        return None if found is None else found[0]

    def pop(self, lease_id: int) -> RingLease | None:
        found = self._leases.pop(lease_id, None)
        return None if found is None else found[0]

    def _forget_old(self) -> None:
        now = self._clock()
        for lease_id, (_, end) in list(self._leases.items()):
            if end > now and len(self._leases) < MAX_LEASES:
                break
            del self._leases[lease_id]


async def _release(member: RingMember, lease_id: int, timeout_s: float | None) -> None:
    with member.running() as client:
        await client.release(lease_id, timeout_s=timeout_s)


async def _release_late(member: RingMember, lease_id: int) -> None:
    with suppress(StoreUnavailable):  # then it ends by itself
        await _release(member, lease_id, None)
