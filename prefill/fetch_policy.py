"""How a request decides between fetching its cached blocks and computing them again, and the two fixed ways.

Blocks are canonical, so no decision changes a byte: a policy only moves time. No torch, no asyncio, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class FetchQuestion:
    """One request, as a policy sees it."""

    num_blocks: int
    """Complete blocks that may be fetched, at least 1."""
    block_bytes: int
    compute_s: Callable[[int, int], float]
    """Seconds until blocks [first, last) are computed from now on, waiting for other requests included."""
    limit_s: float
    """The longest fetch."""


@dataclass
class FetchCounters:
    """Since the worker's start."""

    num_fetches: int = 0
    num_recomputed: int = 0
    """Requests that found blocks and chose to compute all of them."""
    num_abandoned: int = 0
    num_lookups_skipped: int = 0
    num_probes: int = 0
    num_blocks_fetched: int = 0
    num_blocks_local: int = 0
    """Of these, from this process's memory."""
    num_blocks_recomputed: int = 0
    """Blocks computed although the store had them."""


@dataclass(frozen=True)
class FetchEstimates:
    """What a policy knows of the store; 0 where it measures nothing."""

    bytes_per_s: float = 0.0
    latency_s: float = 0.0
    lookup_s: float = 0.0


class FetchChoice(Protocol):
    """The decisions of one request, in this order. All durations are seconds."""

    reason: str
    """What was chosen and why, for logs and the usage."""

    def wants_lookup(self) -> bool:
        """Whether to ask the store at all."""
        ...

    def found(self, num_blocks: int, seconds: float) -> int:
        """The store has `num_blocks`, and took `seconds` to say so. How many of them to fetch, from block 0 on."""
        ...

    def patience_s(self) -> float:
        """How long to wait for the next record; math.inf: as long as the store client does."""
        ...

    def arrived(self, num_bytes: int, seconds: float) -> bool:
        """A record came, `seconds` after the one before. Whether to go on."""
        ...

    def gave_up(self, seconds: float) -> None:
        """No record came within `patience_s`."""
        ...

    def finish(self) -> None:
        """The fetch is over, whole or not; called once for each fetch that began."""
        ...


class FetchPolicy(Protocol):
    """Makes a choice for each request of a worker, and learns from them. Belongs to one event loop and one store."""

    counters: FetchCounters

    def begin(self, question: FetchQuestion) -> FetchChoice: ...

    def estimates(self) -> FetchEstimates: ...


class AlwaysFetch:
    """Fetches whatever the store has."""

    def __init__(self) -> None:
        self.counters = FetchCounters()

    def begin(self, question: FetchQuestion) -> FetchChoice:
        return _Fixed(look=True, reason="fetch: always")

    def estimates(self) -> FetchEstimates:
        return FetchEstimates()


class NeverFetch:
    """Computes everything; the blocks are published all the same."""

    def __init__(self) -> None:
        self.counters = FetchCounters()

    def begin(self, question: FetchQuestion) -> FetchChoice:
        return _Fixed(look=False, reason="compute: never fetched here")

    def estimates(self) -> FetchEstimates:
        return FetchEstimates()


class _Fixed:
    def __init__(self, *, look: bool, reason: str) -> None:
        self._look = look
        self.reason = reason

    def wants_lookup(self) -> bool:
        return self._look

    def found(self, num_blocks: int, seconds: float) -> int:
        if not num_blocks:
            self.reason = "compute: not in the store"
        return num_blocks

    def patience_s(self) -> float:
        return math.inf

    def arrived(self, num_bytes: int, seconds: float) -> bool:
        return True

    def gave_up(self, seconds: float) -> None: ...

    def finish(self) -> None: ...
