"""Which job computes next. Policy only: no torch, no threads, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Schedulable(Protocol):
    """What the policy knows of a job; constant while the job is in a schedule."""

    @property
    def tenant(self) -> str: ...

    @property
    def priority(self) -> int:
        """Lower goes first."""
        ...

    @property
    def warm(self) -> bool:
        """Goes only when nothing else waits."""
        ...


J = TypeVar("J", bound=Schedulable)

Rank = tuple[bool, int]


@dataclass
class _Tenant(Generic[J]):
    served: int
    """Tokens, counted from where the least served tenant stood when this one came."""
    num_jobs: int = 0
    ready: dict[Rank, deque[J]] = field(default_factory=dict)


class Schedule(Generic[J]):
    """Jobs of several tenants, in turn.

    Jobs that are not warm go before warm ones, then a lower priority before a higher one, strictly. Among jobs of one
    rank the tenant that was served the fewest tokens has the turn; a tenant's own jobs take turns one pass each. So of
    two tenants that wait all the time none gets more than a pass ahead of the other, and a job waits for at most one
    pass of each other job of its tenant and rank. A tenant that comes, or comes back, begins level with the
    least served one: being away earns nothing.

    A job is in the schedule from `add` to `remove`; between `take` and `put_back` it is running and not offered again.
    """

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant[J]] = {}
        self._running: set[J] = set()

    def __len__(self) -> int:
        """Jobs in the schedule, the running ones included."""
        return sum(tenant.num_jobs for tenant in self._tenants.values())

    @property
    def num_ready(self) -> int:
        return len(self) - len(self._running)

    def add(self, job: J) -> None:
        tenant = self._tenants.get(job.tenant)
        if tenant is None:
            least = min((other.served for other in self._tenants.values()), default=0)
            tenant = self._tenants[job.tenant] = _Tenant(least)
        tenant.num_jobs += 1
        self._queue(tenant, job)

    def take(self) -> J | None:
        """The job whose turn it is, now running; None when none is ready."""
        best: tuple[Rank, int] | None = None
        chosen: _Tenant[J] | None = None
        for tenant in self._tenants.values():  # of equals the one that came first
            if tenant.ready and (best is None or (min(tenant.ready), tenant.served) < best):
                best, chosen = (min(tenant.ready), tenant.served), tenant
        if best is None or chosen is None:
            return None
        rank = best[0]
        job = chosen.ready[rank].popleft()
        if not chosen.ready[rank]:
            del chosen.ready[rank]
        self._running.add(job)
        return job

    def put_back(self, job: J, *, served: int) -> None:
        """Behind its tenant's other jobs, after a pass of `served` tokens."""
        self._running.remove(job)
        tenant = self._tenants[job.tenant]
        tenant.served += served
        self._queue(tenant, job)

    def remove(self, job: J) -> None:
        """Ends a running job."""
        self._running.remove(job)
        self._leave(job)

    def discard(self, unwanted: Callable[[J], bool]) -> list[J]:
        """Ends all ready jobs that are `unwanted`, and returns them. Running ones stay."""
        ended = [job for job in self._ready() if unwanted(job)]
        for job in ended:
            ready, rank = self._tenants[job.tenant].ready, _rank(job)
            ready[rank].remove(job)
            if not ready[rank]:
                del ready[rank]
            self._leave(job)
        return ended

    def __iter__(self) -> Iterator[J]:
        yield from self._ready()
        yield from self._running

    def _ready(self) -> Iterator[J]:
        for tenant in self._tenants.values():
            for queue in tenant.ready.values():
                yield from queue

    def _leave(self, job: J) -> None:
        tenant = self._tenants[job.tenant]
        tenant.num_jobs -= 1
        if tenant.num_jobs == 0:
            del self._tenants[job.tenant]

    @staticmethod
    def _queue(tenant: _Tenant[J], job: J) -> None:
        tenant.ready.setdefault(_rank(job), deque()).append(job)


def _rank(job: Schedulable) -> Rank:
    return job.warm, job.priority
