"""Requests that were placed and have no first token yet: others with the same beginning gain by going there, too."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
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

    def __len__(self) -> int:
        return sum(map(len, self._by_address.values()))

    def addresses(self) -> Collection[str]:
        return self._by_address.keys()

    def add(self, placed: Placed, now: float) -> None:
        placed.due_at = now + placed.cost.latency_s
        self._by_address.setdefault(placed.prefill.address, []).append(placed)

    def remove(self, placed: Placed) -> None:
        running = self._by_address[placed.prefill.address]
        running.remove(placed)
        if not running:
            del self._by_address[placed.prefill.address]

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
