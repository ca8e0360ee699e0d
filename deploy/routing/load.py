"""A worker's queue as one gateway sees it: the last report, corrected by what was sent since. No clock of its own.

A report counts what all gateways have sent, and is at most `STALE_S` old when it is used. Between two reports the queue
drains a second a second, and grows by what this gateway sends.
"""

from __future__ import annotations

from kvferry.deploy.routing.cost import Speeds
from kvferry.proto import worker_pb2

STALE_S = 5.0
"""An older report is not used: then only what this gateway itself waits for counts."""
SETTLE_S = 0.1
"""What was sent so short a time before a report was asked for may not have been there yet: it counts as sent since."""

_NO_DECODE = worker_pb2.DecodeStats()
_NO_PREFILL = worker_pb2.PrefillStats()


class WorkerLoad:
    def __init__(self) -> None:
        self.speeds: Speeds | None = None
        """As last reported, however old: speeds stay true longer than queues. None: not known."""
        self._report: worker_pb2.WorkerStats | None = None
        self._asked_at = 0.0
        self._queued_s = 0.0
        self._drained_at = 0.0
        self._waiting: dict[int, tuple[float, float]] = {}  # sent at, seconds
        self._next_ticket = 0
        self._blocks_sent: list[tuple[float, int]] = []  # sent at, blocks of a decode pool; since the last report

    def heard(self, report: worker_pb2.WorkerStats, *, asked_at: float) -> None:
        """What the worker answered to a question sent at `asked_at`."""
        self._report, self._asked_at, self._drained_at = report, asked_at, asked_at
        recent = asked_at - SETTLE_S
        self._queued_s = report.prefill.queued_seconds
        self._queued_s += sum(seconds for sent_at, seconds in self._waiting.values() if sent_at >= recent)
        self.speeds = _speeds(report.prefill)
        self._blocks_sent = [sent for sent in self._blocks_sent if sent[0] >= recent]

    def sent(self, now: float, seconds: float) -> int:
        """A prompt that takes the worker so long went to it. Returns the ticket for `answered`."""
        self._queued_s = self._drained(now) + seconds
        self._drained_at = now
        self._next_ticket += 1
        self._waiting[self._next_ticket] = now, seconds
        return self._next_ticket

    def answered(self, ticket: int) -> None:
        """The prompt has its first token, or has failed."""
        del self._waiting[ticket]

    def sent_blocks(self, now: float, num_blocks: int) -> None:
        """A request that will take so many blocks of the worker's pool went to it."""
        self._blocks_sent.append((now, num_blocks))

    def is_fresh(self, now: float) -> bool:
        return self._report is not None and now - self._asked_at <= STALE_S

    def queue_s(self, now: float) -> float:
        """How long the worker will compute what it has."""
        if self.is_fresh(now):
            return self._drained(now)
        return sum(seconds for _, seconds in self._waiting.values())

    def num_jobs(self, now: float) -> int:
        """Prompts that are not computed yet; of others' only while the report is fresh."""
        reported = self._report.prefill.num_computing if self._report is not None and self.is_fresh(now) else 0
        return max(reported, len(self._waiting))

    @property
    def prefill(self) -> worker_pb2.PrefillStats:
        """As last reported, however old."""
        return _NO_PREFILL if self._report is None else self._report.prefill

    def decode(self, now: float) -> worker_pb2.DecodeStats:
        """As last reported; empty when that is too long ago."""
        return self._report.decode if self._report is not None and self.is_fresh(now) else _NO_DECODE

    @property
    def num_blocks_sent(self) -> int:
        """Blocks for requests that the last report may not know."""
        return sum(num_blocks for _, num_blocks in self._blocks_sent)

    @property
    def num_requests_sent(self) -> int:
        """Requests to decode that the last report may not know."""
        return len(self._blocks_sent)

    def _drained(self, now: float) -> float:
        return max(self._queued_s - max(now - self._drained_at, 0.0), 0.0)


def _speeds(stats: worker_pb2.PrefillStats) -> Speeds | None:
    if not stats.token_seconds:
        return None
    speeds = Speeds(token_s=stats.token_seconds, context_token_s=stats.context_token_seconds)
    if not stats.uses_store or not stats.fetch_bytes_per_second:
        return speeds
    return Speeds(
        token_s=stats.token_seconds,
        context_token_s=stats.context_token_seconds,
        lookup_s=stats.lookup_seconds,
        fetch_latency_s=stats.fetch_latency_seconds,
        fetch_bytes_per_s=stats.fetch_bytes_per_second,
    )
