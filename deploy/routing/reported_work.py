"""What workers say they have computed, for all gateways: corrects what this one believes of the work it sent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from kvferry.deploy.routing.recent import RecentWork
from kvferry.deploy.routing.worker_state import WorkerState

READ_EVERY_S = 1.0


class ReportedWork:
    """A gateway counts what it sends, by estimate. Here the estimates of prompts that are done give way to the seconds
    that their worker reports, which hold other gateways' prompts, too. So gateways share out the work of all of them
    and need not hear of each other.

    A worker that reports no computing keeps the estimates.
    """

    def __init__(self, recent: RecentWork) -> None:
        self._recent = recent
        self._seen: dict[str, float] = {}  # compute_seconds of the last report that was read
        self._done: defaultdict[str, float] = defaultdict(float)  # estimates, not yet in a report
        self._read_at = float("-inf")

    def done(self, address: str, estimated_s: float) -> None:
        """A prompt that was counted with so many seconds is computed, or has failed."""
        self._done[address] += estimated_s

    def read(self, workers: Iterable[WorkerState], now: float) -> None:
        """Reads the last reports, at most once in `READ_EVERY_S`. What no longer has a worker is forgotten."""
        if now - self._read_at < READ_EVERY_S:
            return
        self._read_at = now
        before, self._seen = self._seen, {}
        for worker in workers:
            address, total_s = worker.address, worker.load.prefill.compute_seconds
            seen_s = self._seen[address] = before.get(address, total_s)
            if total_s == seen_s:
                continue
            self._seen[address] = total_s
            # A total that shrank is of a worker that started again.
            computed_s = total_s - seen_s if total_s > seen_s else total_s
            self._recent.add(address, now, computed_s - self._done.pop(address, 0.0))
        for address in self._done.keys() - self._seen.keys():
            del self._done[address]
