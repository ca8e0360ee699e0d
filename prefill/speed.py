"""How fast this worker computes and how fast its store delivers, from what was measured. No torch, no clock."""

from __future__ import annotations

import math

SMOOTHING = 0.2
"""Least weight of a new measurement; the first one counts alone, the second half, and so on."""
LARGEST_STEP = 8.0
"""One measurement moves an estimate by this factor at most, once there are several: a pause is not a speed."""
LEAST_S = 1e-9
SMALLEST, LARGEST = 1e-15, 1e6
NUM_STEPS = 4
"""Towards one measurement: a step on logarithms overshoots where both parts matter and the change is large."""
NUM_UNSURE = 3
"""So many measurements make an estimate."""


class TwoPartCost:
    """seconds = first * x + second * y, with both factors above 0.

    A measurement scales each factor by its share of the predicted time (a normalised gradient step on logarithms). So
    factors stay positive, errors are relative, and ten times too slow is corrected as fast as ten times too fast.
    """

    def __init__(
        self, first: float, second: float, *, smoothing: float = SMOOTHING, largest_step: float = LARGEST_STEP
    ) -> None:
        """The factors to begin with, both above 0."""
        self.first = first
        self.second = second
        self.num_measured = 0
        self._smoothing = smoothing
        self._largest_step = largest_step

    def seconds(self, x: float, y: float) -> float:
        return self.first * x + self.second * y

    def measure(self, x: float, y: float, seconds: float, *, weight: float | None = None) -> None:
        """x and y took `seconds`. `weight` 1: forget what was known. Nothing is learned from x = y = 0."""
        expected = self.seconds(x, y)
        if expected <= 0:
            return
        ratio = min(max(seconds, LEAST_S) / expected, 1e12)
        if weight is None:
            if self.num_measured >= NUM_UNSURE:
                ratio = min(max(ratio, 1 / self._largest_step), self._largest_step)
            weight = max(self._smoothing, 1 / (1 + self.num_measured))
        self.num_measured += 1
        target = expected * ratio**weight
        for _ in range(NUM_STEPS):
            expected = self.seconds(x, y)
            share = self.first * x / expected, self.second * y / expected
            step = math.log(target / expected) / (share[0] ** 2 + share[1] ** 2)
            self.first = min(max(self.first * math.exp(step * share[0]), SMALLEST), LARGEST)
            self.second = min(max(self.second * math.exp(step * share[1]), SMALLEST), LARGEST)


class ComputeSpeed:
    """Seconds of prefill by position: a token costs a fixed part, and a part that grows with its context."""

    def __init__(self) -> None:
        # The first measurement replaces the scale; the ratio of the parts is that of a small model on a CPU.
        self._cost = TwoPartCost(1e-3, 1e-3 / 4096)

    @property
    def is_known(self) -> bool:
        return self._cost.num_measured > 0

    @property
    def token_s(self) -> float:
        """Of a token without context."""
        return self._cost.first

    @property
    def context_token_s(self) -> float:
        """More, for each token that it attends to."""
        return self._cost.second

    def measure(self, begin: int, end: int, seconds: float) -> None:
        """Tokens [begin, end) of a prompt took `seconds`."""
        self._cost.measure(*_work(begin, end), seconds)

    def seconds(self, begin: int, end: int) -> float:
        """What tokens [begin, end) of a prompt take, alone on the machine."""
        return self._cost.seconds(*_work(begin, end))


class LinkSpeed:
    """What a fetch from the store takes: the wait for its first byte, then its bytes."""

    def __init__(self) -> None:
        self._cost = TwoPartCost(1e-3, 1e-9, smoothing=0.4, largest_step=100.0)  # one fetch is many records
        self.lookup_s = 1e-3
        self._num_lookups = 0

    @property
    def is_known(self) -> bool:
        """Enough fetches were measured to doubt one that is late."""
        return self._cost.num_measured >= NUM_UNSURE

    @property
    def latency_s(self) -> float:
        return self._cost.first

    @property
    def seconds_per_byte(self) -> float:
        return self._cost.second

    def seconds(self, num_bytes: float) -> float:
        """Of a fetch, without the look-up."""
        return self._cost.seconds(1.0, num_bytes)

    def measure_lookup(self, seconds: float) -> None:
        weight = max(SMOOTHING, 1 / (1 + self._num_lookups))
        self._num_lookups += 1
        self.lookup_s *= math.exp(weight * math.log(max(seconds, 1e-6) / self.lookup_s))

    def measure_first(self, num_bytes: int, seconds: float, *, weight: float | None = None) -> None:
        """The first record, of `num_bytes`, came `seconds` after it was asked for."""
        self._cost.measure(1.0, num_bytes, seconds, weight=weight)

    def measure_latency(self, seconds: float, *, weight: float | None = None) -> None:
        """The wait for a fetch's first byte was so long."""
        self._cost.measure(1.0, 0.0, seconds, weight=weight)

    def measure_rest(self, num_bytes: float, seconds: float, *, weight: float | None = None) -> None:
        """So many bytes after the first record took `seconds`."""
        self._cost.measure(0.0, num_bytes, seconds, weight=weight)


def _work(begin: int, end: int) -> tuple[float, float]:
    """Tokens, and the tokens that they attend to, summed."""
    num_tokens = end - begin
    return float(num_tokens), num_tokens * (begin + end) / 2
