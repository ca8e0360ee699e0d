"""The metrics of a worker process: of its roles, of its way to the store, and what it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import Metric

from kvferry.decode.metrics import decode_families
from kvferry.deploy.ranks.metrics import rank_families
from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.client_metrics import store_client_families
from kvferry.kvstore.metric_families import Described, counter, counters, gauge
from kvferry.kvstore.read_cache import ReadCache
from kvferry.kvstore.ring import StoreRing
from kvferry.kvstore.store import Store
from kvferry.prefill.metrics import prefill_families
from kvferry.prefill.server import PrefillServicer
from kvferry.proto import worker_pb2

COMPRESSION = Described("kv_compression_ratio", "K and V at 16 bits to what they take packed, at 4,096 tokens.")
INFO = Described("worker_info", "1; its labels say what the worker runs.")
CALL_COUNTERS = {
    "num_superseded": Described("calls_superseded", "Calls ended by a newer attempt at the same request."),
    "num_stale": Described("calls_stale", "Calls refused because a newer attempt was known."),
    "num_fenced": Described("calls_fenced", "Calls ended because the worker lost its lease, or had to end draining."),
    "num_refused": Described("calls_refused", "Calls refused while draining."),
    "num_prefill_lost": Described("prefill_workers_lost", "Prefill workers given up while a request waited for them."),
    "num_leases_lost": Described("leases_lost", "Leases in the directory that ran out."),
}
CALLS_RUNNING = Described("calls_running", "Calls of requests that run now.")
CACHE_BYTES = Described("worker_cache_bytes", "Bytes in the worker's cache of store records.")
CACHE_HITS = Described("worker_cache_hits", "Records that did not cross: in the worker's cache, or being read already.")


def worker_families(
    info: worker_pb2.WorkerInfo,
    stats: worker_pb2.WorkerStats,
    *,
    prefill: PrefillServicer | None,
    nodes: StoreClient | StoreRing | None,
    store: Store | None,
    follower_pids: Sequence[int] = (),
) -> Iterator[Metric]:
    """Everything that is read at a scrape. Run it on the worker's event loop. `follower_pids`: of the ranks that this
    process leads."""
    name = info.model_name
    labels = {"model_name": name}
    if prefill is not None:
        yield from prefill_families(
            stats.prefill,
            model_name=name,
            num_waiting=prefill.num_waiting,
            backlog_s=prefill.backlog_s,
            held_tokens=prefill.num_held_tokens,
        )
    if stats.HasField("decode"):
        yield from decode_families(stats.decode, model_name=name)
    yield from counters(stats.calls, CALL_COUNTERS, labels)
    yield gauge(CALLS_RUNNING, [(labels, stats.calls.num_running)])
    if nodes is not None:
        yield from store_client_families(nodes, labels)
    if isinstance(store, ReadCache):
        yield gauge(CACHE_BYTES, [(labels, store.num_bytes)])
        yield counter(CACHE_HITS, [(labels, store.counters.hits + store.counters.joined)])
    yield gauge(COMPRESSION, [(labels, 16 / info.effective_bits)])
    about = {**labels, "roles": "+".join(info.roles), "kernels": info.kernels, "device": info.device}
    yield gauge(INFO, [(about, 1)])
    yield from rank_families(follower_pids, labels)
