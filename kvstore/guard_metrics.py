"""How many calls a process's guards refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import Metric

from kvferry.kvstore.metric_families import Described, counter
from kvferry.proto.token_guard import TokenGuard

UNAUTHENTICATED = Described("calls_unauthenticated", "Calls refused because they did not bring the cluster token.")


def guard_family(guards: Iterable[TokenGuard], labels: Mapping[str, str]) -> Metric:
    """0 where nobody is asked for a token."""
    return counter(UNAUTHENTICATED, [(labels, sum(guard.refusals.num_refused for guard in guards))])
