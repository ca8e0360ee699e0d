"""Puts a record's copies. One copy is enough for the caller; the others get a moment."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.errors import BlockCorrupt, InvalidRequest, KVStoreError, StoreFull, StoreUnavailable
from kvferry.kvstore.ring_member import RingCounters, RingMember, nobody_answered

T = TypeVar("T")

_TELLING: tuple[type[KVStoreError], ...] = (InvalidRequest, BlockCorrupt, StoreFull, StoreUnavailable)
"""Of several errors the caller gets the first of this order: what the record is to blame for, before the rest."""


async def put_copies(
    members: Sequence[RingMember],
    put: Callable[[StoreClient], Awaitable[T]],
    *,
    grace_s: float,
    counters: RingCounters,
) -> list[T]:
    """`put` with every member's client; what those said that took it, at least one, within `grace_s` of the first.

    A member that needs longer goes on by itself, and gets no other copy before it has ended: so a slow node holds up
    nobody and at most one put is left behind for it. Raises what the members raised when none took it.
    """
    asked = [member for member in members if not member.is_silent] or list(members)
    counters.copies_lost += len(members) - len(asked)
    if len(asked) == 1:
        return [await _put(asked[0], put)]
    tasks = {asyncio.create_task(_put(member, put), name="kvstore-ring-put"): member for member in asked}
    pending = set(tasks)
    taken: list[T] = []
    errors: list[KVStoreError] = []
    try:
        while pending:
            done, pending = await asyncio.wait(
                pending, timeout=grace_s if taken else None, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                break
            for task in done:
                try:
                    taken.append(task.result())
                except KVStoreError as error:
                    errors.append(error)
    except BaseException:
        for task in pending:
            task.cancel()
        raise
    for task in pending:
        counters.left_behind += 1
        tasks[task].leave_behind(task)
    if not taken:
        raise most_telling(errors) if errors else nobody_answered(len(members))
    counters.copies_lost += len(errors) + len(pending)
    return taken


def most_telling(errors: Sequence[KVStoreError]) -> KVStoreError:
    """The error that the caller should hear of."""
    ranks = range(len(_TELLING))
    return min(errors, key=lambda error: next((i for i in ranks if isinstance(error, _TELLING[i])), len(_TELLING)))


async def _put(member: RingMember, put: Callable[[StoreClient], Awaitable[T]]) -> T:
    with member.running() as client:
        return await put(client)
