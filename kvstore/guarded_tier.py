"""A lower tier behind a bound, a breaker and a check of every record: it may be slow, dead or damaged.

Nothing here raises but `delete`: what a tier cannot answer in time is a miss, what it cannot take is not
kept there, and a counter says so.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from kvferry.kvstore.backend import Backend, BackendStats
from kvferry.kvstore.breaker import Breaker
from kvferry.kvstore.codec import verify_record
from kvferry.kvstore.config import DEFAULT_MAX_RECORD_BYTES
from kvferry.kvstore.errors import BlockCorrupt, StoreFull, StoreUnavailable
from kvferry.kvstore.verifier import Verifier

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class PutOutcome(enum.Enum):
    """What a tier did with a record."""

    STORED = "stored"
    EXISTED = "existed"
    FULL = "full"
    LOST = "lost"  # the tier did not answer, or is not asked


@dataclass(frozen=True, kw_only=True)
class TierLimits:
    """How long a tier may keep the others waiting, in seconds."""

    # A client waits 0.2 s for a look-up: one that meets a dead tier must still be answered in that time.
    lookup_timeout_s: float = 0.15
    get_timeout_s: float = 0.8  # a client gives up when no frame comes for 1 s
    put_timeout_s: float = 1.5
    delete_timeout_s: float = 5.0
    cool_down_s: float = 0.5  # between two probes of a tier that does not answer
    probe_timeout_s: float = 0.5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, not {value}")


@dataclass
class _Counts:
    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    errors: int = 0
    refused: int = 0
    dropped: int = 0


class GuardedTier:
    """One backend as a lower tier. One unanswered operation opens its breaker; probes close it again."""

    def __init__(
        self,
        name: str,
        backend: Backend,
        *,
        limits: TierLimits,
        verifier: Verifier,
        max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES,
    ) -> None:
        self.name = name
        self.backend = backend
        self.counts = _Counts()
        self._limits = limits
        self._verifier = verifier
        self._max_record_bytes = max_record_bytes
        self._breaker = Breaker(failure_threshold=1, cool_down_s=limits.cool_down_s)
        self._prober: asyncio.Task[None] | None = None

    @property
    def is_available(self) -> bool:
        """Whether the tier is asked now."""
        return self._breaker.allows_call()

    async def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Which keys the tier says it has; none of them when it does not answer."""
        found: list[bool] | None = await self._guarded(self.backend.contains, keys, self._limits.lookup_timeout_s)
        return [False] * len(keys) if found is None else found

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The records that passed their checks; damaged ones are deleted from the tier."""
        found: list[bytes | None] | None = await self._guarded(self.backend.get, keys, self._limits.get_timeout_s)
        if found is None:
            return [None] * len(keys)
        intact = await asyncio.gather(*(self._is_intact(key, record) for key, record in zip(keys, found, strict=True)))
        records = [record if is_intact else None for record, is_intact in zip(found, intact, strict=True)]
        num_misses = records.count(None)
        self.counts.misses += num_misses
        self.counts.hits += len(records) - num_misses
        return records

    async def put(self, key: bytes, record: bytes) -> PutOutcome:
        """Writes a record down."""
        if not self._breaker.allows_call():
            self.counts.refused += 1
            return PutOutcome.LOST
        try:
            stored = await self._answering(self.backend.put(key, record), self._limits.put_timeout_s)
        except StoreFull:
            self.counts.errors += 1
            return PutOutcome.FULL
        except StoreUnavailable:
            return PutOutcome.LOST
        return PutOutcome.STORED if stored else PutOutcome.EXISTED

    async def delete(self, keys: Sequence[bytes] | None) -> int:
        """Removes records. Raises StoreUnavailable when the tier cannot be asked: they may come back with it."""
        if not self._breaker.allows_call():
            self.counts.refused += 1
            raise StoreUnavailable(f"the {self.name} tier does not answer; its records were not deleted")
        timeout_s = self._limits.delete_timeout_s * (10 if keys is None else 1)
        return await self._answering(self.backend.delete(keys), timeout_s)

    async def stats(self) -> BackendStats:
        """The backend's sizes, 0 when it does not answer, with the counts of both."""
        stats = BackendStats(self.name, 0, 0, 0, 0)
        if self._breaker.allows_call():
            with suppress(StoreUnavailable):  # counted; the tier is told as not available
                stats = await self._answering(self.backend.stats(), self._limits.lookup_timeout_s)
        counts = self.counts
        return stats._replace(
            name=self.name,
            hits=counts.hits,
            misses=counts.misses,
            corrupt=stats.corrupt + counts.corrupt,
            errors=stats.errors + counts.errors,
            refused=stats.refused + counts.refused,
            dropped=counts.dropped,
            available=self.is_available,
        )

    async def close(self) -> None:
        """Ends the probe and closes the backend."""
        if self._prober is not None:
            self._prober.cancel()
            await asyncio.gather(self._prober, return_exceptions=True)
        await self.backend.close()

    async def _guarded(
        self, ask: Callable[[Sequence[bytes]], Awaitable[list[_T]]], keys: Sequence[bytes], timeout_s: float
    ) -> list[_T] | None:
        """The answer for the keys, or None; never raises."""
        if not self._breaker.allows_call():
            self.counts.refused += 1
            return None
        try:
            return await self._answering(ask(keys), timeout_s)
        except StoreUnavailable:
            return None

    async def _answering(self, work: Awaitable[_T], timeout_s: float) -> _T:
        """The outcome of `work`; tells the breaker. Raises StoreUnavailable after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                result = await work
        except TimeoutError as error:
            self._failed()
            raise StoreUnavailable(f"the {self.name} tier did not answer within {timeout_s} s") from error
        except StoreUnavailable:
            self._failed()
            raise
        except StoreFull:
            self._breaker.record_success()
            raise
        self._breaker.record_success()
        return result

    def _failed(self) -> None:
        self.counts.errors += 1
        self._breaker.record_failure()
        if self._prober is None or self._prober.done():
            _log.warning("the %s tier does not answer; going on without it", self.name)
            self._prober = asyncio.create_task(self._probe(), name=f"kvstore-probe-{self.name}")

    async def _probe(self) -> None:
        while not self._breaker.allows_call():
            await asyncio.sleep(self._limits.cool_down_s)
            if not self._breaker.try_probe():
                continue
            try:
                async with asyncio.timeout(self._limits.probe_timeout_s):
                    await self.backend.stats()
            except (StoreUnavailable, TimeoutError):
                self._breaker.record_failure()
            else:
                self._breaker.record_success()
                _log.info("the %s tier answers again", self.name)

    async def _is_intact(self, key: bytes, record: bytes | None) -> bool:
        if record is None:
            return False
        check = partial(verify_record, record, key, max_record_bytes=self._max_record_bytes)
        try:
            await self._verifier.run(len(record), check)
        except BlockCorrupt as error:
            self.counts.corrupt += 1
            _log.warning("deleting a damaged record from the %s tier: %s", self.name, error)
            with suppress(StoreUnavailable):  # then the next reader finds it damaged again
                await self.delete([key])
            return False
        return True
