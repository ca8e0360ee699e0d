"""The gateway's metrics: what clients experience, with the names and units that vLLM uses for the same things."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import Metric

from kvferry.kvstore.metric_families import Described, counter, gauge
from kvferry.kvstore.metrics_endpoint import PREFIX

ROLE = "gateway"
FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)
TOKEN_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
FINISH_REASONS = ("stop", "length")

RUNNING = Described("num_requests_running", "Requests that are worked on.")
WAITING = Described("num_requests_waiting", "Requests that wait for their turn.")
PAIRS = Described("gateway_worker_pairs", "Pairs of a prefill and a decode worker that may serve a request now.")
REFUSED = Described("gateway_calls_refused", "Calls refused for want of a valid credential.")
TOKEN_RELOADS = Described(
    "gateway_token_reloads",
    "Times that the changed file of client tokens was read: taken, or `failed` and left as it was.",
)
SERVING = Described("gateway_serving", "1: a request could be served now; 0: it could not.")


class GatewayMetrics:
    """Instruments with their labels bound; `registry` has all of them. Used from one event loop."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name}
        histogram = self._histogram
        self.ttft = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", FIRST_TOKEN_S
        )
        self.itl = histogram("inter_token_latency_seconds", "Between two tokens of an answer.", TOKEN_S)
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "After the first token, a token; one value a request.", TOKEN_S
        )
        self.e2e = histogram("e2e_request_latency_seconds", "From a request's arrival to its last token.", REQUEST_S)
        self.queue = histogram(
            "request_queue_time_seconds", "Waiting for a turn: at the gateway and on the prefill worker.", REQUEST_S
        )
        self.prefill = histogram("request_prefill_time_seconds", "Fetching and computing the prompt.", REQUEST_S)
        self.decode = histogram("request_decode_time_seconds", "Decoding, from the second token on.", REQUEST_S)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished requests.")
        self.cached_tokens = self._counter("prompt_tokens_cached", "Of these, taken from the store.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens sent to clients.")
        self.failovers = self._counter("request_failovers", "Times that a request went on with other workers.")
        self._success = Counter(
            f"{PREFIX}request_success",
            "Requests that got their last token.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._failure = Counter(
            f"{PREFIX}request_failure",
            "Requests that did not: the error's name, `Cancelled` where the client left.",
            ["model_name", "reason"],
            registry=self.registry,
        )
        for reason in FINISH_REASONS:  # so that a rate has a first value
            self._success.labels(**self._labels, finished_reason=reason)

    def succeeded(self, reason: str) -> None:
        """`reason`: of the last answer to finish."""
        self._success.labels(**self._labels, finished_reason=reason if reason in FINISH_REASONS else "other").inc()

    def failed(self, reason: str) -> None:
        """`reason`: one of a fixed set of names."""
        self._failure.labels(**self._labels, reason=reason).inc()

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(PREFIX + name, text, ["model_name"], registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, ["model_name"], registry=self.registry, buckets=buckets).labels(
            **self._labels
        )


def gateway_families(
    *,
    model_name: str,
    num_running: int,
    num_queued: int,
    num_pairs: int,
    serving: bool,
    num_refused: Mapping[str, int],
    token_reloads: Mapping[str, int],
) -> Iterator[Metric]:
    """What the gateway does now. `num_refused` is by reason, `token_reloads` by outcome."""
    labels = {"model_name": model_name}
    by_role = {**labels, "role": ROLE}
    yield gauge(RUNNING, [(by_role, num_running)])
    yield gauge(WAITING, [(by_role, num_queued)])
    yield gauge(PAIRS, [(labels, num_pairs)])
    yield gauge(SERVING, [(labels, serving)])
    yield counter(REFUSED, [({**labels, "reason": reason}, count) for reason, count in num_refused.items()])
    yield counter(TOKEN_RELOADS, [({**labels, "outcome": name}, count) for name, count in token_reloads.items()])
