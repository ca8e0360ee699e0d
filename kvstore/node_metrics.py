"""The metrics of a KV store node: its counters and its tiers', read at each scrape."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric

from kvferry.kvstore.backend import Backend, BackendStats
from kvferry.kvstore.errors import StoreUnavailable
from kvferry.kvstore.metric_families import Described, counter, counters, gauge
from kvferry.kvstore.node_counters import NodeCounters

NODE_COUNTERS = {
    "lookups": Described("store_lookups", "Look-ups of chains."),
    "hits": Described("store_hits", "Keys that were asked for and found."),
    "misses": Described("store_misses", "Keys that were asked for and not found."),
    "puts": Described("store_puts", "Records stored."),
    "rejected": Described("store_rejected", "Puts refused: no room, or the record failed its checks."),
    "corrupt": Described("store_corrupt", "Damaged records that the node found and deleted."),
}
STAGED_BYTES = Described("store_staged_bytes", "Bytes reserved by puts in progress.")
BACKEND_UP = Described("store_backend_up", "1: the place that keeps the records answers; 0: it does not.")
TIER_GAUGES = {
    "records": Described("store_tier_records", "Records in the tier."),
    "bytes": Described("store_tier_bytes", "Bytes that the tier's records take."),
    "capacity_bytes": Described("store_tier_capacity_bytes", "What they may take; 0: unlimited or unknown."),
    "pinned_bytes": Described("store_tier_pinned_bytes", "Bytes of pinned records."),
    "available": Described("store_tier_available", "1: the tier is used; 0: it did not answer lately."),
}
TIER_COUNTERS = {
    "hits": Described("store_tier_hits", "Keys that the tier was asked for and had."),
    "misses": Described("store_tier_misses", "Keys that the tier was asked for and had not."),
    "evictions": Described("store_tier_evictions", "Records evicted for want of room."),
    "corrupt": Described("store_tier_corrupt", "Damaged records that the tier found and dropped."),
    "errors": Described("store_tier_errors", "Operations that failed."),
    "refused": Described("store_tier_refused", "Operations not tried: the tier did not answer lately, or is busy."),
    "dropped": Described("store_tier_dropped", "Records not written down to the tier: its queue was full."),
    "promoted": Described("store_tier_promoted", "Records read from a lower tier and kept in this one."),
}


async def node_families(counters_now: NodeCounters, staged_bytes: int, backend: Backend) -> list[Metric]:
    """Everything; without the tiers' part when the backend does not answer."""
    try:
        stats = await backend.stats()
    except StoreUnavailable:
        stats = None
    families = list(counters(counters_now, NODE_COUNTERS, {}))
    families.append(gauge(STAGED_BYTES, [({}, staged_bytes)]))
    families.append(gauge(BACKEND_UP, [({}, stats is not None)]))
    if stats is not None:
        families += _tier_families(stats.tiers or (stats,))
    return families


def _tier_families(tiers: tuple[BackendStats, ...]) -> Iterator[Metric]:
    labels = [{"tier": tier.name} for tier in tiers]
    for field, metric in TIER_GAUGES.items():
        yield gauge(metric, [(of, getattr(tier, field)) for of, tier in zip(labels, tiers, strict=True)])
    for field, metric in TIER_COUNTERS.items():
        yield counter(metric, [(of, getattr(tier, field)) for of, tier in zip(labels, tiers, strict=True)])
