"""How many workers of a role the load asks for: numbers and times in, a number out; nothing is asked here.

Up soon: when an excess has lasted `up_after_s`, at most to twice as many. Down late: by one, when the load has fitted
one worker fewer for `down_after_s` with room to spare. A worker that does not say what it does stops every step down.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

LOWER_SHARE = 0.7
"""One worker fewer must need no more than this share of its target: the gap keeps a constant load from flapping."""
MAX_STEP_UP = 2
"""At most so many times the workers in one step."""
MAX_GAP_S = 10.0
"""Between two looks; after a longer one, what was seen before it proves nothing."""


@dataclass(frozen=True, kw_only=True)
class PrefillLoad:
    queued_tokens: int
    """Of prompts, not computed yet."""
    compute_seconds: float
    """Spent computing since the worker's start."""


@dataclass(frozen=True, kw_only=True)
class DecodeLoad:
    pool_blocks: int
    pool_blocks_used: int
    """By running requests."""
    num_requests: int
    """That hold room or wait for it."""
    num_waiting: int
    num_sequences: int
    """In the engine."""


Load = TypeVar("Load", PrefillLoad, DecodeLoad)


@dataclass(frozen=True, kw_only=True)
class Worker(Generic[Load]):
    """A worker as the controller sees it now."""

    name: str
    has_started: bool
    """False: it never did, and holds nothing."""
    load: Load | None
    """None: unknown, because it has not said so lately."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """What the load asks for."""

    workers: int
    """At their target; unknown ones count as needed."""
    one_less_is_enough: bool
    """The load fits all workers but the last one, well below their target."""
    text: str
    """What was seen, for people."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    min: int
    max: int
    up_after_s: float
    down_after_s: float


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The last change of the number of workers, or the number at the start."""

    wanted: int
    reason: str
    at: float
    """On the clock that `Steps.decide` is given."""


class BusyShares:
    """How many workers' worth of computing there was lately: 1.3 is one always busy and another a third of the time.

    A queue alone would not do: a number of workers that is just enough has an empty one.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._seen: dict[str, deque[tuple[float, float]]] = {}

    def update(self, now: float, compute_seconds: Mapping[str, float]) -> float | None:
        """Returns the sum over these workers, or None while one of them is not known for long enough."""
        self._seen = {name: self._seen.get(name, deque()) for name in compute_seconds}
        shares = []
        for name, seconds in compute_seconds.items():
            seen = self._seen[name]
            if seen and seconds < seen[-1][1]:  # another process
                seen.clear()
            seen.append((now, seconds))
            while len(seen) > 2 and seen[1][0] <= now - self._window_s:
                seen.popleft()
            (first, before), (last, after) = seen[0], seen[-1]
            if last > first:
                shares.append(min((after - before) / (last - first), 1.0))
        return sum(shares) if len(shares) == len(compute_seconds) else None


def prefill_need(workers: Sequence[Worker[PrefillLoad]], busy: float | None, *, target_queued_tokens: int) -> Need:
    """`workers` in the order of their numbers: the last one would leave. `busy`: see `BusyShares`."""
    known = [w.load for w in workers if w.load is not None]
    num_unknown = _num_unknown(workers)
    tokens = sum(load.queued_tokens for load in known)
    staying = sum(w.load is not None for w in workers[:-1])
    fits = (
        num_unknown == 0
        and busy is not None
        and staying > 0
        and tokens <= LOWER_SHARE * target_queued_tokens * staying
        and busy <= LOWER_SHARE * staying
    )
    seen = f"{tokens} queued tokens, {target_queued_tokens} a worker"
    if busy is not None:
        seen += f"; busy as {busy:.2f} workers"
    return Need(
        workers=math.ceil(tokens / target_queued_tokens) + num_unknown,
        one_less_is_enough=fits,
        text=seen + _unknown_text(num_unknown),
    )


def decode_need(workers: Sequence[Worker[DecodeLoad]], *, target_usage: float, max_num_seqs: int) -> Need:
    """`workers` in the order of their numbers: the last one would leave."""
    known = [w.load for w in workers if w.load is not None]
    num_unknown = _num_unknown(workers)
    pool = sum(load.pool_blocks for load in known)
    used = sum(load.pool_blocks_used for load in known)
    waiting = sum(load.num_waiting for load in known)
    holding = sum(load.num_requests for load in known) - waiting
    # Those that wait will hold about as many blocks as those that run.
    blocks = used + waiting * used / max(holding, 1)
    sequences = sum(load.num_sequences for load in known) + waiting
    workers_needed = 0
    if known:
        by_blocks = math.ceil(blocks / (target_usage * pool / len(known)))
        by_sequences = math.ceil(sequences / max_num_seqs)
        # Whatever it is that they wait for, all workers lack it.
        by_waiting = len(known) + 1 if all(load.num_waiting for load in known) else 0
        workers_needed = max(by_blocks, by_sequences, by_waiting)
    staying = [w.load for w in workers[:-1] if w.load is not None]
    fits = (
        num_unknown == 0
        and waiting == 0
        and bool(staying)
        and blocks <= LOWER_SHARE * target_usage * sum(load.pool_blocks for load in staying)
        and sequences <= LOWER_SHARE * max_num_seqs * len(staying)
    )
    seen = (
        f"{used} of {pool} blocks used, target {target_usage:.0%}; {sequences - waiting} sequences, {waiting} waiting"
    )
    return Need(workers=workers_needed + num_unknown, one_less_is_enough=fits, text=seen + _unknown_text(num_unknown))


class Steps:
    """From what the load asks for to the number of workers, with patience."""

    def __init__(self, limits: Limits, *, wanted: int, now: float) -> None:
        self._limits = limits
        self.floor = limits.min
        """Never fewer. `min`, or more while somebody asks for it."""
        count = max(limits.min, min(wanted, limits.max))
        self.last = Decision(wanted=count, reason=f"{count} at the start", at=now)
        self._looked_at = now
        self._excess_since: float | None = None
        self._spare_since: float | None = None

    def decide(self, now: float, need: Need) -> Decision:
        """Call it every second or two. `now` in seconds, of a clock that does not jump."""
        if now - self._looked_at > MAX_GAP_S:
            self._excess_since = self._spare_since = None
        self._looked_at = now
        wanted, limits = self.last.wanted, self._limits
        if wanted < self.floor:
            self._change(now, self.floor, "the floor that was asked for")
        elif need.workers > wanted and wanted < limits.max:
            self._spare_since = None
            self._excess_since = now if self._excess_since is None else self._excess_since
            if now - self._excess_since >= limits.up_after_s:
                self._change(now, min(need.workers, MAX_STEP_UP * wanted, limits.max), need.text)
        elif need.one_less_is_enough and need.workers < wanted and wanted > self.floor:
            self._excess_since = None
            self._spare_since = now if self._spare_since is None else self._spare_since
            if now - self._spare_since >= limits.down_after_s:
                self._change(now, wanted - 1, need.text)
        else:
            self._excess_since = self._spare_since = None
        return self.last

    def _change(self, now: float, count: int, why: str) -> None:
        direction = "up" if count > self.last.wanted else "down"
        self.last = Decision(wanted=count, reason=f"{direction} from {self.last.wanted} to {count}: {why}", at=now)
        self._excess_since = self._spare_since = None


def _num_unknown(workers: Sequence[Worker[Load]]) -> int:
    return sum(w.load is None and w.has_started for w in workers)


def _unknown_text(num_unknown: int) -> str:
    return f"; {num_unknown} workers do not answer" if num_unknown else ""
