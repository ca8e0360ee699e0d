"""The metrics of a worker's way to the store: what its clients count, by node, and its ring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import Metric

from kvferry.kvstore.breaker import BreakerState
from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.metric_families import Described, counter, counters, gauge
from kvferry.kvstore.ring import StoreRing

BY_NODE = {
    "bytes_read": Described("store_client_read_bytes", "Bytes of verified records read from the node."),
    "bytes_written": Described("store_client_written_bytes", "Bytes of records stored on the node."),
    "failures": Described("store_client_failures", "Calls that the node did not answer."),
    "refused": Described("store_client_refused", "Calls not made, because the node's breaker is open."),
    "not_found": Described("store_client_not_found", "Records that the node no longer had."),
    "corrupt": Described("store_client_corrupt", "Damaged records that came from the node and were refused."),
}
BREAKER_OPEN = Described("store_client_breaker_open", "1: the node did not answer and is not asked; 0: it is used.")
RING = {
    "failovers": Described("store_ring_failovers", "Gets that went on with another node."),
    "left_behind": Described("store_ring_left_behind", "Calls to a node that went on after others had answered."),
    "copies_lost": Described("store_ring_copies_lost", "Copies of records that a node did not take."),
    "unanswered": Described("store_ring_unanswered", "Look-ups that a node did not answer."),
    "corrupt": Described("store_ring_corrupt", "Damaged records among what nodes sent."),
}


def store_client_families(store: StoreClient | StoreRing, labels: Mapping[str, str]) -> Iterator[Metric]:
    """By node: host:port, as many as the ring has (at most 64)."""
    clients = [store] if isinstance(store, StoreClient) else [member.client for member in store.members]
    by_node = [({**labels, "node": client.address}, client) for client in clients]
    for field, metric in BY_NODE.items():
        yield counter(metric, [(of, getattr(client.counters, field)) for of, client in by_node])
    yield gauge(BREAKER_OPEN, [(of, client.breaker_state is not BreakerState.CLOSED) for of, client in by_node])
    if isinstance(store, StoreRing):
        yield from counters(store.counters, RING, labels)
