"""How much work each worker was given lately, as one gateway knows it, and the mean of it."""

from __future__ import annotations

import math
from collections.abc import Iterable

HALF_LIFE_S = 300.0
"""Long, so that a few requests at a time, which never make a queue, are shared out evenly, too."""


class RecentWork:
    """Sums that halve every `HALF_LIFE_S`. A worker that comes begins at the mean: being new earns nothing."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._total = 0.0
        self._scale_at = 0.0  # sums are kept as of this time

    def set_members(self, names: Iterable[str], now: float) -> None:
        self._rescale(now)
        members = list(names)
        known = {name: self._sums[name] for name in members if name in self._sums}
        mean = sum(known.values()) / len(known) if known else 0.0
        self._sums = {name: known.get(name, mean) for name in members}
        self._total = sum(self._sums.values())

    def add(self, name: str, now: float, seconds: float) -> None:
        """Work for a member; others are not counted. Less than 0: what was counted before was too much."""
        if name not in self._sums:
            return
        grown = max(seconds / self._decay(now), -self._sums[name])
        self._sums[name] += grown
        self._total += grown
        if now - self._scale_at > HALF_LIFE_S:
            self._rescale(now)

    def of(self, names: Iterable[str], now: float) -> list[float]:
        decay = self._decay(now)
        return [self._sums.get(name, 0.0) * decay for name in names]

    def mean(self, now: float) -> float:
        return self._total / len(self._sums) * self._decay(now) if self._sums else 0.0

    def _decay(self, now: float) -> float:
        return math.exp2(-max(now - self._scale_at, 0.0) / HALF_LIFE_S)

    def _rescale(self, now: float) -> None:
        decay = self._decay(now)
        self._sums = {name: value * decay for name, value in self._sums.items()}
        self._total = sum(self._sums.values())
        self._scale_at = now
