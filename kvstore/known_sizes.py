"""How long the values under some keys are: learned from a look-up, used by the get that follows it."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

KNOWN_S = 30.0
MAX_KEYS = 1 << 16  # some 10 MB


class KnownSizes:
    """Sizes in bytes of values that do not change, for KNOWN_S each. Bounded: the oldest go first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sizes: OrderedDict[bytes, tuple[int, float]] = OrderedDict()  # and when it was learned; the oldest first

    def learn(self, key: bytes, size: int) -> None:
        """The value under `key` has this size now."""
        self._sizes.pop(key, None)
        while len(self._sizes) >= MAX_KEYS:
            self._sizes.popitem(last=False)
        self._sizes[key] = (size, self._clock())

    def forget(self, key: bytes) -> None:
        """There is no such value any more, or another one."""
        self._sizes.pop(key, None)

    def get(self, key: bytes) -> int | None:
        """None: not known, or no more."""
        size, since = self._sizes.get(key, (None, 0.0))
        return size if size is not None and self._clock() - since < KNOWN_S else None

    def clear(self) -> None:
        """Forgets all."""
        self._sizes.clear()
