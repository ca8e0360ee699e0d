"""The directory's metrics: who takes part, and who was silent for too long."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric

from kvferry.deploy.directory_ledger import Ledger
from kvferry.deploy.members import ROLES
from kvferry.kvstore.metric_families import Described, counters, gauge

MEMBERS = Described("directory_members", "Members with this role; one with two roles counts for both.")
WATCHERS = Described("directory_watchers", "Streams on which processes hear of the members.")
SETTLED = Described("directory_settled", "1: it knows all members; 0: it has just started, and some may be missing.")
LEDGER_COUNTERS = {
    "num_expired": Described("directory_leases_ended", "Members taken off because they were silent."),
    "num_leases_lost": Described("directory_leases_lost", "Members that came back after their lease had ended."),
}


def directory_families(ledger: Ledger, *, num_watchers: int) -> Iterator[Metric]:
    """Everything that is read at a scrape. Run it on the directory's event loop."""
    members = ledger.members
    yield gauge(MEMBERS, [({"role": role}, len(members.addresses(role))) for role in ROLES])
    yield gauge(WATCHERS, [({}, num_watchers)])
    yield gauge(SETTLED, [({}, ledger.settled)])
    yield from counters(ledger, LEDGER_COUNTERS, {})
