"""Requests that were placed and have no first token yet: others with the same beginning gain by going there, too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from kvferry.deploy.routing.cost import PrefillCost
from kvferry.deploy.routing.worker_state import WorkerState


class Listener(Protocol):
    def sent(self, placed: Placed) -> None: ...

    def prefilled(self, placed: Placed, *, ok: bool) -> None: ...


@dataclass(eq=False, kw_only=True)
class Placed:
    """One request where a router put it: a `Notice`."""

    router: Listener
    prefill: WorkerState
    decode: WorkerState | None
    """None: it only warms the store."""
    keys: Sequence[bytes] = field(repr=False)
    """Of the prompt's complete blocks."""
    cost: PrefillCost
    answer_s: float
    pool_blocks: int
    ticket: int = 0
    due_at: float = 0.0
    """When its first token is expected."""

    def sent(self) -> None:
        """See `Notice`."""
        self.router.sent(self)

    def prefilled(self, *, ok: bool) -> None:
        """See `Notice`."""
        self.router.prefilled(self, ok=ok)


class RunningPrompts:
    """By prefill worker. As many as the gateway runs at once, at most."""

    def __init__(self) -> None:
        self._by_address: dict[str, list[Placed]] = {}
        self._by_first: dict[bytes, Counter[str]] = {}  # first block: workers, and how many prompts there

    def __len__(self) -> int:
        return sum(map(len, self._by_address.values()))

    def addresses(self, keys: Sequence[bytes], limit: int) -> list[str]:
        """Workers with a running prompt that begins with the same block; at most `limit`."""
        return list(islice(self._by_first.get(keys[0], ()), limit)) if keys else []

    def add(self, placed: Placed, now: float) -> None:
        placed.due_at = now + placed.cost.latency_s
        address = placed.prefill.address
        self._by_address.setdefault(address, []).append(placed)
        if placed.keys:
            self._by_first.setdefault(placed.keys[0], Counter())[address] += 1

    def remove(self, placed: Placed) -> None:
        address = placed.prefill.address
        running = self._by_address[address]
        running.remove(placed)
        if not running:
            del self._by_address[address]
        if placed.keys:
            alike = self._by_first[placed.keys[0]]
            alike[address] -= 1
            if not alike[address]:
                del alike[address]
            if not alike:
                del self._by_first[placed.keys[0]]

    def shared(self, address: str, keys: Sequence[bytes], now: float) -> tuple[int, float]:
        """(blocks from the start that a prompt which is running there has or computes, seconds until it has them)"""
        best, left_s = 0, 0.0
        for placed in self._by_address.get(address, ()):
            depth = common_blocks(placed.keys, keys)
            if depth > best:
                best, left_s = depth, max(placed.due_at - now, 0.0) * depth / len(placed.keys)
        return best, left_s


def common_blocks(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    """Of two chains: a key names everything before it, too, so equal keys have equal beginnings."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
