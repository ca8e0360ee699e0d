"""Leases: records that a reader is about to fetch and that must not be evicted before it did.

A lease is a duration on the granting node's monotonic clock, never a moment on anyone's wall clock.
"""

from __future__ import annotations

import heapq
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass
class _Lease:
    keys: tuple[bytes, ...]
    duration_s: float
    expires_at: float


class LeaseTable:
    """Who holds which keys until when. Bounded in leases and in keys; not thread-safe.

    Expired leases are dropped by whichever call comes next.
    """

    def __init__(
        self,
        *,
        max_leases: int = 4096,
        max_keys: int = 262_144,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_leases = max_leases
        self._max_keys = max_keys
        self._clock = clock
        self._leases: dict[int, _Lease] = {}
        self._expiries: list[tuple[float, int]] = []  # a heap; renewed leases leave stale entries
        self._pins: Counter[bytes] = Counter()
        self._num_keys = 0

    def __len__(self) -> int:
        """Leases that are alive now."""
        self._expire()
        return len(self._leases)

    def grant(self, keys: Sequence[bytes], duration_s: float) -> int:
        """Leases `keys` for `duration_s` from now. Returns the id, or 0 when the table is full."""
        self._expire()
        full = len(self._leases) >= self._max_leases or self._num_keys + len(keys) > self._max_keys
        if full or not keys or duration_s <= 0:
            return 0
        lease_id = 1 + secrets.randbits(63)  # not guessable: nobody ends another one's lease
        lease = _Lease(tuple(keys), duration_s, self._clock() + duration_s)
        self._leases[lease_id] = lease
        self._pins.update(lease.keys)
        self._num_keys += len(lease.keys)
        heapq.heappush(self._expiries, (lease.expires_at, lease_id))
        return lease_id

    def narrow(self, lease_id: int, num_keys: int) -> None:
        """Keeps only the first `num_keys` keys of a lease; with 0 the lease ends."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return
        if num_keys == 0:
            self.release(lease_id)
            return
        self._unpin(lease.keys[num_keys:])
        lease.keys = lease.keys[:num_keys]

    def renew(self, lease_id: int) -> bool:
        """Starts the lease's granted duration again; False when it is unknown or over."""
        self._expire()
        lease = self._leases.get(lease_id)
        if lease is None:
            return False
        # The heap entry is pushed only when the old one comes up (see _expire), so renewing
        # often does not make the heap grow.
        lease.expires_at = self._clock() + lease.duration_s
        return True

    def release(self, lease_id: int) -> bool:
        """Ends a lease before its time; False when it is unknown or over."""
        self._expire()
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return False
        self._unpin(lease.keys)
        if len(self._expiries) > 2 * len(self._leases) + 64:
            self._expiries = [(kept.expires_at, i) for i, kept in self._leases.items()]
            heapq.heapify(self._expiries)
        return True

    def is_pinned(self, key: bytes) -> bool:
        """Whether a living lease holds the key."""
        self._expire()
        return key in self._pins

    def _unpin(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self._pins[key] -= 1
            if self._pins[key] == 0:
                del self._pins[key]
        self._num_keys -= len(keys)

    def _expire(self) -> None:
        now = self._clock()
        while self._expiries and self._expiries[0][0] <= now:
            _, lease_id = heapq.heappop(self._expiries)
            lease = self._leases.get(lease_id)
            if lease is None:
                continue
            if lease.expires_at > now:
                heapq.heappush(self._expiries, (lease.expires_at, lease_id))
                continue
            del self._leases[lease_id]
            self._unpin(lease.keys)
