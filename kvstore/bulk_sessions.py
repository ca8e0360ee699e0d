"""Who may use the bulk port: sessions that were handed out over gRPC, each for one connection, made soon."""

from __future__ import annotations

import enum
import hmac
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from kvferry.kvstore.bulk_frames import SESSION_BYTES

_NAME_BYTES = 8


class Purpose(enum.Enum):
    """What a session's connection may do."""

    GETS = "gets"
    PUTS = "puts"


class BulkSessions:
    """Sessions that wait for their connection. Safe to use from several threads.

    A session is a name, by which it is found, and a secret, which is compared in constant time. Bounded: the oldest
    goes when there are too many.
    """

    def __init__(
        self, *, lifetime_s: float = 10.0, max_waiting: int = 1024, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lifetime_s = lifetime_s
        self._max_waiting = max_waiting
        self._clock = clock
        self._lock = threading.Lock()
        # By name: secret, purpose, end; the oldest first.
        self._waiting: OrderedDict[bytes, tuple[bytes, Purpose, float]] = OrderedDict()

    def issue(self, purpose: Purpose) -> bytes:
        """A new session, SESSION_BYTES bytes."""
        name, secret = secrets.token_bytes(_NAME_BYTES), secrets.token_bytes(SESSION_BYTES - _NAME_BYTES)
        with self._lock:
            self._expire()
            while len(self._waiting) >= self._max_waiting:
                self._waiting.popitem(last=False)
            self._waiting[name] = (secret, purpose, self._clock() + self._lifetime_s)
        return name + secret

    def redeem(self, session: bytes) -> Purpose | None:
        """What this one is for, if it waits; then it does no more. A wrong secret ends it, too."""
        with self._lock:
            self._expire()
            waiting = self._waiting.pop(session[:_NAME_BYTES], None)
        if waiting is None or not hmac.compare_digest(waiting[0], session[_NAME_BYTES:]):
            return None
        return waiting[1]

    def __len__(self) -> int:
        """Sessions that wait now."""
        with self._lock:
            self._expire()
            return len(self._waiting)

    def _expire(self) -> None:
        now = self._clock()
        while self._waiting and next(iter(self._waiting.values()))[2] <= now:
            self._waiting.popitem(last=False)
