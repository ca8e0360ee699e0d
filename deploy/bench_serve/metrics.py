"""From single requests to the figures of a run. Definitions and names are those of `calculate_metrics` in
vllm/benchmarks/serve.py where nothing else is said."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import grpc
import numpy as np

from kvferry.deploy.bench_serve.measure import Measured

PERCENTILES = (50, 90, 99)
_SLO_NAMES = ("ttft", "tpot", "e2el")
_OUTSIDE_TEXT = re.compile(r"[\s,]+")


@dataclass(frozen=True, kw_only=True)
class Slo:
    """Targets in milliseconds; None: no target."""

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    def __bool__(self) -> bool:
        return any(getattr(self, name) is not None for name in _SLO_NAMES)

    def met_by(self, request: Measured) -> bool:
        """A request that did not complete meets nothing. The TPOT of one token counts as 0."""
        if not request.completed:
            return False
        values = {"ttft": request.ttft_s, "tpot": request.tpot_s or 0.0, "e2el": request.e2e_s}
        targets = {name: getattr(self, name) for name in _SLO_NAMES}
        return all(target is None or 1000 * values[name] <= target for name, target in targets.items())


def parse_slo(texts: Iterable[str]) -> Slo:
    """`["ttft:500 tpot:80", "e2el:9000"]` in milliseconds. Raises ValueError."""
    targets: dict[str, float] = {}
    for item in filter(None, _OUTSIDE_TEXT.split(" ".join(texts))):
        name, _, number = item.partition(":")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if name not in _SLO_NAMES or not 0 < value < math.inf:
            raise ValueError(f"--goodput {item}: write ttft:MS, tpot:MS or e2el:MS, for example 'ttft:500 tpot:80'")
        if name in targets:
            raise ValueError(f"--goodput names {name} twice")
        targets[name] = value
    return Slo(**targets)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of one metric, in milliseconds."""

    mean: float
    median: float
    std: float  # of these values, not an estimate for more of them
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How many requests of a kind ended with a status."""

    kind: str
    status: str
    expected: bool
    count: int
    error: str  # what the first of them was told


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Latencies and token counts are of completed requests (status OK); None: there is nothing to compute it from."""

    duration: float  # seconds, from the start to the end of the last request
    completed: int
    failed: int  # all others, also those that were meant to fail
    unexpected: int  # requests that ended otherwise than they were made to
    wrong_length: int  # completed requests with another number of tokens than asked for
    total_input_tokens: int
    total_output_tokens: int
    unfinished_output_tokens: int  # tokens of requests that did not complete
    request_throughput: float  # completed requests a second
    output_throughput: float  # tokens a second
    total_token_throughput: float  # prompt and output tokens a second
    max_output_tokens_per_s: float  # in the best second
    max_concurrent_requests: int
    request_goodput: float | None  # requests a second that met all targets; None: no targets
    slo_attainment: float | None  # their share of the requests that are meant to complete
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2el: Spread | None
    send_lag: Spread | None  # how late requests were sent, for want of time or of a place; None in a closed loop
    gateway_ttft: Spread | None  # TTFT as the gateway saw it
    cached_tokens: int
    cache_hit_rate: float | None  # prompt tokens from the store over prompt tokens
    kv_bytes_moved: int
    kv_bytes_bf16: int  # what the same crossings would have been with 16-bit K and V
    kv_bytes_ratio: float | None  # bf16 over moved
    outcomes: tuple[Outcome, ...]


def spread(seconds: Sequence[float]) -> Spread | None:
    """In milliseconds; percentiles are interpolated between neighbours."""
    if not seconds:
        return None
    values = 1000 * np.asarray(seconds)
    p50, p90, p99 = (float(x) for x in np.percentile(values, PERCENTILES))
    return Spread(mean=float(values.mean()), median=p50, std=float(values.std()), p50=p50, p90=p90, p99=p99)


def summarize(requests: Sequence[Measured], *, duration_s: float, slo: Slo) -> Summary:
    done = [request for request in requests if request.completed]
    usages = [request.usage for request in done if request.usage is not None]
    num_input = sum(usage.prompt_tokens for usage in usages)
    num_output = sum(request.num_tokens for request in done)
    num_cached = sum(usage.cached_tokens for usage in usages)
    moved, bf16 = sum(u.kv_bytes_moved for u in usages), sum(u.kv_bytes_bf16 for u in usages)
    num_good = sum(slo.met_by(request) for request in requests)
    num_meant = sum(request.planned.expected is grpc.StatusCode.OK for request in requests)
    return Summary(
        duration=duration_s,
        completed=len(done),
        failed=len(requests) - len(done),
        unexpected=sum(request.status is not request.planned.expected for request in requests),
        wrong_length=sum(request.num_tokens != request.planned.max_tokens for request in done),
        total_input_tokens=num_input,
        total_output_tokens=num_output,
        unfinished_output_tokens=sum(request.num_tokens for request in requests) - num_output,
        request_throughput=len(done) / duration_s,
        output_throughput=num_output / duration_s,
        total_token_throughput=(num_input + num_output) / duration_s,
        max_output_tokens_per_s=float(max(tokens_by_second(done), default=0)),
        max_concurrent_requests=max((running for _, running in concurrency(requests)), default=0),
        request_goodput=num_good / duration_s if slo else None,
        slo_attainment=_over(num_good, num_meant) if slo else None,
        ttft=spread([request.ttft_s for request in done]),
        tpot=spread([tpot for request in done if (tpot := request.tpot_s) is not None]),
        itl=spread([gap for request in done for gap in request.itls_s]),
        e2el=spread([request.e2e_s for request in done]),
        send_lag=spread([request.sent_s - request.due_s for request in requests if request.due_s is not None]),
        gateway_ttft=spread([usage.ttft_s for usage in usages]),
        cached_tokens=num_cached,
        cache_hit_rate=_over(num_cached, num_input),
        kv_bytes_moved=moved,
        kv_bytes_bf16=bf16,
        kv_bytes_ratio=_over(bf16, moved),
        outcomes=_outcomes(requests),
    )


def concurrency(requests: Iterable[Measured]) -> list[tuple[float, int]]:
    """(seconds from the start, requests running from then on), ascending."""
    changes = sorted(
        change for r in requests for change in ((r.sent_s, 1), (r.sent_s + r.ended_s, -1))
    )  # an end counts before a start of the same moment
    running, steps = 0, []
    for at, change in changes:
        running += change
        steps.append((at, running))
    return steps


def tokens_by_second(requests: Iterable[Measured]) -> list[int]:
    """Chunks with tokens that arrived in each second of the run; a chunk is a token at this gateway."""
    counts = Counter(int(r.sent_s + arrival) for r in requests for arrival in r.arrivals_s)
    return [counts[second] for second in range(max(counts, default=-1) + 1)]


def _over(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _outcomes(requests: Sequence[Measured]) -> tuple[Outcome, ...]:
    groups: dict[tuple[str, str], list[Measured]] = {}
    for request in requests:
        groups.setdefault((request.planned.kind, request.status.name), []).append(request)
    return tuple(
        Outcome(
            kind=kind,
            status=status,
            expected=group[0].status is group[0].planned.expected,
            count=len(group),
            error=next((request.error for request in group if request.error), ""),
        )
        for (kind, status), group in sorted(groups.items())
    )
