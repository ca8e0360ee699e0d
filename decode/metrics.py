"""The metrics of a decode worker: what each request cost, and what the worker does now."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import Metric

from kvferry.decode.worker import RequestUsage
from kvferry.kvstore.metric_families import Described, counters, gauge, gauges
from kvferry.kvstore.metrics_endpoint import PREFIX
from kvferry.proto import worker_pb2

ROLE = "decode"
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

RUNNING = Described("num_requests_running", "Requests that are worked on.")
WAITING = Described("num_requests_waiting", "Requests that wait for room: new ones, and those swapped out.")
USAGE = Described("kv_cache_usage_perc", "Share of the pool's blocks that running requests use; 1 is all of it.")
STATS_GAUGES = {
    "pool_blocks": Described("kv_cache_blocks", "Blocks in the pool."),
    "pool_blocks_used": Described("kv_cache_used_blocks", "Blocks that running requests use; shared ones count once."),
    "pool_blocks_cached": Described("kv_cache_cached_blocks", "Unused blocks, kept under their keys."),
    "num_running": Described("num_sequences_running", "Sequences in the engine."),
}
STATS_COUNTERS = {
    "num_swaps": Described("num_preemptions", "Times that a request was swapped out to make room."),
    "num_answers_published": Described("answers_published", "Answers whose blocks were published for the next turn."),
    "num_answers_not_published": Described("answers_not_published", "Answers whose blocks were not."),
}


class DecodeMetrics:
    """Counts tokens and finished requests; `registry` has the result. Used from one event loop."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name}
        self.tokens = self._counter("decode_tokens", "Tokens sent, the first of each answer included.")
        self._failures = self._counter("decode_failures", "Requests that failed or were given up.")
        self._queries = self._counter("prefix_cache_queries", "Prompt tokens that could have been in the pool.")
        self._hits = self._counter("prefix_cache_hits", "Of these, in the pool already.")
        self._bytes, self._bf16_bytes = (
            Counter(PREFIX + name, text, ["model_name", "role", "path"], registry=self.registry)
            for name, text in (
                ("kv_transfer_bytes", "KV bytes that crossed, headers included."),
                ("kv_transfer_bf16_bytes", "What these crossings would have been with 16-bit K and V."),
            )
        )
        for path in ("store_read", "handoff"):  # so that a rate has a first value
            for moved in (self._bytes, self._bf16_bytes):
                moved.labels(**self._labels, role=ROLE, path=path)
        self._exposed = Histogram(
            f"{PREFIX}kv_transfer_exposed_seconds",
            "How long a request waited for blocks and tail after prefill's handoff.",
            ["model_name"],
            registry=self.registry,
            buckets=SECONDS,
        ).labels(**self._labels)

    def ended(
        self, usage: RequestUsage | None, *, finished: bool, num_tokens: int, block_size: int, bf16_bytes_per_token: int
    ) -> None:
        """A request with a prompt of `num_tokens` is over; `usage` is what is known of it, `finished`: it has its last
        token."""
        self._failures.inc(not finished)
        if usage is None:
            return
        self._queries.inc(num_tokens // block_size * block_size)
        self._hits.inc(usage.num_local_tokens)
        transfer = usage.transfer
        for path, num_bytes, moved in (
            ("store_read", transfer.store_bytes_read, transfer.store_tokens_read),
            ("handoff", transfer.handoff_bytes, transfer.handoff_tokens),
        ):
            self._bytes.labels(**self._labels, role=ROLE, path=path).inc(num_bytes)
            self._bf16_bytes.labels(**self._labels, role=ROLE, path=path).inc(moved * bf16_bytes_per_token)
        if finished:
            self._exposed.observe(usage.transfer_seconds)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(PREFIX + name, text, ["model_name"], registry=self.registry).labels(**self._labels)


def decode_families(stats: worker_pb2.DecodeStats, *, model_name: str) -> Iterator[Metric]:
    """What the worker does now."""
    labels = {"model_name": model_name}
    by_role = {**labels, "role": ROLE}
    yield gauge(RUNNING, [(by_role, stats.num_requests - stats.num_waiting)])
    yield gauge(WAITING, [(by_role, stats.num_waiting)])
    yield gauge(USAGE, [(labels, stats.pool_blocks_used / max(stats.pool_blocks, 1))])
    yield from gauges(stats, STATS_GAUGES, labels)
    yield from counters(stats, STATS_COUNTERS, labels)
