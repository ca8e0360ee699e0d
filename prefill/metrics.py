"""The metrics of a prefill worker: what each request cost, and what the worker does now."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import Metric

from kvferry.kvstore.metric_families import Described, counters, gauge, gauges
from kvferry.kvstore.metrics_endpoint import PREFIX
from kvferry.prefill.session import PrefillUsage
from kvferry.proto import worker_pb2

ROLE = "prefill"
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

RUNNING = Described("num_requests_running", "Requests that are worked on.")
WAITING = Described("num_requests_waiting", "Requests that wait for their first turn.")
STATS_COUNTERS = {
    "num_fetches": Described("prefix_fetches", "Requests whose cached blocks were fetched from the store."),
    "num_fetches_abandoned": Described("prefix_fetches_abandoned", "Of these, ended early: slower than computing."),
    "num_recomputed": Described(
        "prefix_recomputes", "Requests that found blocks in the store and computed all of them."
    ),
    "num_lookups_skipped": Described("store_lookups_skipped", "Requests that did not ask the store."),
    "num_probes": Described("prefix_fetch_probes", "Fetches from a path that was slower, to see whether it still is."),
    "num_blocks_fetched": Described("prefix_blocks_fetched", "Blocks fetched from the store."),
    "num_blocks_recomputed": Described("prefix_blocks_recomputed", "Blocks computed although the store had them."),
}
STATS_GAUGES = {
    "fetch_bytes_per_second": Described("prefix_fetch_bytes_per_second", "Measured speed of the path to the store."),
    "fetch_latency_seconds": Described("prefix_fetch_latency_seconds", "Measured latency of the path to the store."),
    "lookup_seconds": Described("store_lookup_seconds", "Measured time of a look-up."),
    "block_compute_seconds": Described("block_compute_seconds", "What a prompt's first block would take now."),
}
BACKLOG = Described("prefill_backlog_seconds", "How long the prompts here will take, by the speed of the last passes.")
HELD_TOKENS = Described("prefill_prompt_tokens_held", "Prompt tokens of the requests here.")


class PrefillMetrics:
    """Counts finished requests; `registry` has the result. Used from one event loop."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name}
        self._prompt_tokens = self._counter("prefill_prompt_tokens", "Prompt tokens of finished requests.")
        self._warm_requests = self._counter("prefill_warm_requests", "Requests that only had blocks stored.")
        self._failures = self._counter("prefill_failures", "Requests that failed or were given up.")
        self._queries = self._counter(
            "external_prefix_cache_queries", "Prompt tokens that could have been in the store: of complete blocks."
        )
        self._hits = self._counter("external_prefix_cache_hits", "Of these, taken from the store.")
        self._bytes, self._bf16_bytes = (
            Counter(PREFIX + name, text, ["model_name", "role", "path"], registry=self.registry)
            for name, text in (
                ("kv_transfer_bytes", "KV bytes that crossed, headers included."),
                ("kv_transfer_bf16_bytes", "What these crossings would have been with 16-bit K and V."),
            )
        )
        for path in ("store_read", "store_write"):  # so that a rate has a first value
            for moved in (self._bytes, self._bf16_bytes):
                moved.labels(**self._labels, role=ROLE, path=path)
        self._fetch_seconds = self._histogram("kv_transfer_seconds", "Time of a request's fetch from the store.")
        self._queue = self._histogram("prefill_queue_seconds", "Time from a request's arrival to its first pass.")
        self._compute = self._histogram("prefill_compute_seconds", "Time of a request's passes.")

    def finished(
        self, usage: PrefillUsage, *, num_tokens: int, block_size: int, bf16_bytes_per_token: int, warm: bool
    ) -> None:
        """A request with a prompt of `num_tokens` is over, publishing included."""
        self._prompt_tokens.inc(num_tokens)
        self._warm_requests.inc(warm)
        # One token is always computed, unless only blocks are wanted.
        self._queries.inc((num_tokens if warm else num_tokens - 1) // block_size * block_size)
        self._hits.inc(usage.num_cached_tokens)
        for path, num_bytes, moved in (
            ("store_read", usage.store_bytes_read, usage.store_tokens_read),
            ("store_write", usage.store_bytes_written, usage.store_tokens_written),
        ):
            self._bytes.labels(**self._labels, role=ROLE, path=path).inc(num_bytes)
            self._bf16_bytes.labels(**self._labels, role=ROLE, path=path).inc(moved * bf16_bytes_per_token)
        if usage.num_blocks_fetched:
            self._fetch_seconds.observe(usage.fetch_seconds)
        self._queue.observe(usage.queue_seconds)
        self._compute.observe(usage.compute_seconds)

    def failed(self) -> None:
        """A request ended without its result."""
        self._failures.inc()

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(PREFIX + name, text, ["model_name"], registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(PREFIX + name, text, ["model_name"], registry=self.registry, buckets=SECONDS).labels(
            **self._labels
        )


def prefill_families(
    stats: worker_pb2.PrefillStats, *, model_name: str, num_waiting: int, backlog_s: float, held_tokens: int
) -> Iterator[Metric]:
    """What the worker does now, and what its fetch policy counts and measures."""
    labels = {"model_name": model_name}
    by_role = {**labels, "role": ROLE}
    yield gauge(RUNNING, [(by_role, max(stats.num_requests - num_waiting, 0))])
    yield gauge(WAITING, [(by_role, num_waiting)])
    yield gauge(BACKLOG, [(labels, backlog_s)])
    yield gauge(HELD_TOKENS, [(labels, held_tokens)])
    yield from counters(stats, STATS_COUNTERS, labels)
    yield from gauges(stats, STATS_GAUGES, labels)
