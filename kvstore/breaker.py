"""The breaker: when a store stops answering, stop asking it.

    CLOSED ──failures──▶ OPEN ──cool-down over, one probe──▶ HALF_OPEN ──success──▶ CLOSED
                          ▲                                      │
                          └──────────────── failure ─────────────┘

Live calls pass only when CLOSED. Probes are sent by the client in the background, so that no
request ever waits for a store that is known to be down.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable


class BreakerState(enum.Enum):
    """Where the breaker stands."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Breaker:
    """Counts consecutive failures. Not thread-safe; `clock` is monotonic seconds."""

    def __init__(
        self,
        *,
        failure_threshold: int,
        cool_down_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._failure_threshold = failure_threshold
        self._cool_down_s = cool_down_s
        self._clock = clock
        self._state = BreakerState.CLOSED
        self._failures = 0
        self._probe_at = 0.0

    @property
    def state(self) -> BreakerState:
        """The state now."""
        return self._state

    def allows_call(self) -> bool:
        """Whether a live call may go out."""
        return self._state is BreakerState.CLOSED

    def try_probe(self) -> bool:
        """Whether the caller may send the one probe now; if so, the breaker is HALF_OPEN."""
        if self._state is not BreakerState.OPEN or self._clock() < self._probe_at:
            return False
        self._state = BreakerState.HALF_OPEN
        return True

    def record_success(self) -> None:
        """The store answered, whatever it said. Closes the breaker."""
        self._state = BreakerState.CLOSED
        self._failures = 0

    def record_failure(self) -> None:
        """The store did not answer. May open the breaker; restarts the cool-down of a probe."""
        self._failures += 1
        if self._state is BreakerState.HALF_OPEN or (
            self._state is BreakerState.CLOSED and self._failures >= self._failure_threshold
        ):
            self._state = BreakerState.OPEN
            self._probe_at = self._clock() + self._cool_down_s
