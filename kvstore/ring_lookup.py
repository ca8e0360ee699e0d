"""How much of a chain is in a ring: every node is asked at once, for all the runs that it may hold."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvferry.kvstore.client import LookupResult
from kvferry.kvstore.errors import KVStoreError, StoreUnavailable
from kvferry.kvstore.ring_lease import RingLease
from kvferry.kvstore.ring_member import RingCounters, RingMember, nobody_answered

_SLACK_S = 0.05
"""So much later than the calls' own timeouts the look-up gives up: they tell the breakers first."""


@dataclass
class RunKeys:
    """Consecutive blocks of a chain that live together, and the nodes that may hold them."""

    keys: list[bytes]
    members: Sequence[RingMember]
    num_found: int = 0
    """Of the first ones, each on some member."""
    lacking: dict[RingMember, int] = field(default_factory=dict)
    """By member, the last position at which it is known to have nothing."""
    usable: set[RingMember] = field(default_factory=set)
    """Members that may still answer."""

    def __post_init__(self) -> None:
        self.usable = {member for member in self.members if not member.is_silent} or set(self.members)

    @property
    def unknown(self) -> set[RingMember]:
        """Members that may have the first block that is not found yet."""
        return {member for member in self.usable if self.lacking.get(member) != self.num_found}

    @property
    def is_complete(self) -> bool:
        return self.num_found == len(self.keys)


class _Asked(NamedTuple):
    member: RingMember
    runs: list[tuple[RunKeys, int]]
    """With the position in each run from which on the member was asked."""


class RingLookup:
    """One look-up. A node that does not answer costs `timeout_s` at most, nothing where its replicas have all."""

    def __init__(self, runs: list[RunKeys], lease: RingLease, counters: RingCounters, *, lease_s: float) -> None:
        self._runs = runs
        self._lease = lease
        self._lease_s = lease_s
        self._granted_s = lease_s
        self._counters = counters
        self._pending: dict[asyncio.Task[LookupResult], _Asked] = {}
        self._num_answers = 0

    async def run(self, timeout_s: float) -> LookupResult:
        """Its lease_id is 0: the leases are in the lease. Raises StoreUnavailable when no node answered."""
        end = time.monotonic() + timeout_s
        try:
            self._ask({member for run in self._runs for member in run.unknown}, timeout_s)
            while (frontier := self._frontier()) is not None and frontier.unknown:
                left = end - time.monotonic()
                if left <= 0:
                    break
                asked = {asked.member for asked in self._pending.values()}
                self._ask(frontier.unknown - asked, left)
                done, _ = await asyncio.wait(
                    self._pending, timeout=left + _SLACK_S, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    self._take(task, self._pending.pop(task))
        except BaseException:
            for task in self._pending:
                task.cancel()
            raise
        for task, asked_now in self._pending.items():
            self._counters.left_behind += 1
            asked_now.member.leave_behind(task)
            task.add_done_callback(lambda task, member=asked_now.member: self._take_late(task, member))  # type: ignore[misc]
        if not self._num_answers:
            raise nobody_answered(len({member for run in self._runs for member in run.members}))
        return LookupResult(self._num_contiguous(), 0, self._granted_s)

    def _frontier(self) -> RunKeys | None:
        return next((run for run in self._runs if not run.is_complete), None)

    def _num_contiguous(self) -> int:
        total = 0
        for run in self._runs:
            total += run.num_found
            if not run.is_complete:
                break
        return total

    def _ask(self, members: set[RingMember], timeout_s: float) -> None:
        """One call to each, for the runs from the first incomplete one on that it may know something of."""
        frontier = self._frontier()
        start = len(self._runs) if frontier is None else self._runs.index(frontier)
        for member in members:
            runs = [run for run in self._runs[start:] if not run.is_complete and member in run.unknown]
            if runs:
                keys = [key for run in runs for key in run.keys[run.num_found :]]
                task = asyncio.create_task(self._call(member, keys, timeout_s), name="kvstore-ring-lookup")
                self._pending[task] = _Asked(member, [(run, run.num_found) for run in runs])

    async def _call(self, member: RingMember, keys: list[bytes], timeout_s: float) -> LookupResult:
        with member.running() as client:
            return await client.lookup(keys, lease_s=self._lease_s, timeout_s=timeout_s)

    def _take(self, task: asyncio.Task[LookupResult], asked: _Asked) -> None:
        try:
            found = task.result()
        except StoreUnavailable:
            self._counters.unanswered += 1
            for run in self._runs:
                run.usable.discard(asked.member)
            return
        self._num_answers += 1
        self._lease.add(asked.member, found.lease_id)
        if found.lease_id:
            self._granted_s = min(self._granted_s, found.lease_s)
        left = found.num_contiguous
        for run, start in asked.runs:
            end = start + min(left, len(run.keys) - start)
            run.num_found = max(run.num_found, end)
            left -= end - start
            if end < len(run.keys):
                run.lacking[asked.member] = end
                break  # the node stopped counting here: of what follows it said nothing

    def _take_late(self, task: asyncio.Task[LookupResult], member: RingMember) -> None:
        if task.cancelled():
            return
        if isinstance(task.exception(), KVStoreError):
            self._counters.unanswered += 1
        elif task.exception() is None:
            self._lease.add(member, task.result().lease_id)
