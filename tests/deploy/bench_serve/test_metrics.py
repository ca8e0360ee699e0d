"""Percentiles, goodput and sums, against numbers worked out by hand."""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.deploy.bench_serve.measure import Measured, ServerUsage
from kvferry.deploy.bench_serve.metrics import Slo, concurrency, parse_slo, spread, summarize, tokens_by_second
from kvferry.deploy.bench_serve.report import as_json
from kvferry.deploy.bench_serve.workload import PlannedRequest

Code = grpc.StatusCode


def usage(**fields: int) -> ServerUsage:
    given_fields = {"prompt_tokens": 10, "cached_tokens": 0, "kv_bytes_moved": 0, "kv_bytes_bf16": 0} | fields
    return ServerUsage(**given_fields, ttft_s=0.0, prefill_compute_s=0.0, store_fetch_s=0.0, transfer_s=0.0)


def request(arrivals_s: list[float], *, status: Code = Code.OK, sent_s: float = 0.0, **fields: Any) -> Measured:
    plan = {"token_ids": np.zeros(10, np.uint32), "max_tokens": max(len(arrivals_s), 1)}
    plan |= {name: fields.pop(name) for name in ("kind", "expected") if name in fields}
    return Measured(
        planned=PlannedRequest(**plan),  # type: ignore[arg-type]
        due_s=sent_s,
        sent_s=sent_s,
        status=status,
        arrivals_s=arrivals_s,
        num_tokens=len(arrivals_s),
        ended_s=arrivals_s[-1] if arrivals_s else 0.5,
        usage=fields.pop("usage", usage()) if status is Code.OK else None,
        **fields,
    )


class TestSpread:
    def test_by_hand(self) -> None:
        values = spread([0.001 * x for x in range(1, 102)])
        assert values is not None
        assert (values.p50, values.p90, values.p99) == pytest.approx((51.0, 91.0, 100.0))
        assert (values.mean, values.median) == pytest.approx((51.0, 51.0))
        assert values.std == pytest.approx(statistics.pstdev(range(1, 102)))

    @given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
    def test_order_of_percentiles(self, seconds: list[float]) -> None:
        values = spread(seconds)
        assert values is not None
        slack = 1e-9 * (1 + 1000 * max(seconds))
        rising = [1000 * min(seconds), values.p50, values.p90, values.p99, 1000 * max(seconds)]
        assert all(low <= high + slack for low, high in pairwise(rising))
        assert values.p50 == pytest.approx(1000 * statistics.median(seconds), rel=1e-6, abs=1e-6)

    def test_nothing(self) -> None:
        assert spread([]) is None


class TestSlo:
    def test_parse(self) -> None:
        assert parse_slo([]) == Slo() and not parse_slo([])
        assert parse_slo(["ttft:500 tpot:80"]) == parse_slo(["tpot:80", "ttft:500"]) == Slo(ttft=500, tpot=80)
        assert parse_slo(["ttft:1.5,e2el:2"]) == Slo(ttft=1.5, e2el=2)

    @pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:x", "itl:5", "ttft:0", "ttft:-1", "ttft:nan", "tpot:inf"])
    def test_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="write ttft:MS"):
            parse_slo([text])

    def test_twice(self) -> None:
        with pytest.raises(ValueError, match="twice"):
            parse_slo(["ttft:5", "ttft:6"])

    def test_all_targets_must_be_met(self) -> None:
        answer = request([0.100, 0.150, 0.300])  # TTFT 100, TPOT 100, E2E 300
        assert Slo(ttft=101, tpot=101, e2el=301).met_by(answer)
        for name, value in (("ttft", 99), ("tpot", 99), ("e2el", 299)):
            assert not Slo(**{name: value}).met_by(answer)

    def test_one_token_and_failures(self) -> None:
        assert Slo(tpot=0.001).met_by(request([9.0]))
        assert not Slo(e2el=1e9).met_by(request([0.1], status=Code.UNAVAILABLE))


def test_summary_by_hand() -> None:
    requests = [
        request([0.1, 0.2, 0.4], usage=usage(cached_tokens=5, kv_bytes_moved=100, kv_bytes_bf16=600)),
        request([0.3], sent_s=1.0, usage=usage(kv_bytes_moved=100, kv_bytes_bf16=400)),
        request([0.2, 0.3], status=Code.UNAVAILABLE, sent_s=1.1, error="gone"),
        request([], status=Code.INVALID_ARGUMENT, expected=Code.INVALID_ARGUMENT, kind="bad", sent_s=1.2),
    ]
    summary = summarize(requests, duration_s=2.0, slo=Slo(ttft=200))
    assert (summary.completed, summary.failed, summary.unexpected, summary.wrong_length) == (2, 2, 1, 0)
    assert (summary.total_input_tokens, summary.total_output_tokens, summary.unfinished_output_tokens) == (20, 4, 2)
    assert (summary.request_throughput, summary.output_throughput, summary.total_token_throughput) == (1.0, 2.0, 12.0)
    assert summary.request_goodput == 0.5  # one of 2 s
    assert summary.slo_attainment == pytest.approx(1 / 3)  # of those that are meant to complete
    assert (summary.cache_hit_rate, summary.kv_bytes_ratio) == (0.25, 5.0)
    assert summary.max_concurrent_requests == 3
    assert summary.max_output_tokens_per_s == 3
    assert summary.ttft is not None and summary.ttft.mean == pytest.approx(200)
    assert summary.tpot is not None and summary.tpot.mean == pytest.approx(150)  # one request has one
    assert summary.itl is not None and summary.itl.mean == pytest.approx(150)
    assert summary.e2el is not None and summary.e2el.mean == pytest.approx(350)
    outcomes = {(o.kind, o.status): (o.count, o.expected, o.error) for o in summary.outcomes}
    assert outcomes == {
        ("normal", "OK"): (2, True, ""),
        ("normal", "UNAVAILABLE"): (1, False, "gone"),
        ("bad", "INVALID_ARGUMENT"): (1, True, ""),
    }
    fields = as_json(summary)
    assert fields["p99_ttft_ms"] == summary.ttft.p99 and fields["median_itl_ms"] == summary.itl.median
    assert "ttft" not in fields


def test_tpot_weighs_requests_and_itl_weighs_gaps() -> None:
    fast, slow = request([0.0, 0.1]), request([0.0, 0.3, 0.6, 0.9])
    summary = summarize([fast, slow], duration_s=1.0, slo=Slo())
    assert summary.tpot is not None and summary.tpot.mean == pytest.approx(200)
    assert summary.itl is not None and summary.itl.mean == pytest.approx(250)


def test_nothing_completed() -> None:
    summary = summarize([request([], status=Code.UNAVAILABLE)], duration_s=1.0, slo=Slo(ttft=5))
    assert (summary.completed, summary.failed) == (0, 1)
    assert summary.ttft is summary.tpot is summary.itl is summary.e2el is None
    assert summary.cache_hit_rate is summary.kv_bytes_ratio is None
    assert (summary.request_goodput, summary.slo_attainment) == (0.0, 0.0)
    assert as_json(summary)["mean_ttft_ms"] is None


def test_an_end_counts_before_a_start_of_the_same_moment() -> None:
    steps = concurrency([request([1.0]), request([1.0], sent_s=1.0), request([1.5], sent_s=0.5)])
    assert max(running for _, running in steps) == 2
    assert steps[-1][1] == 0


def test_tokens_by_second() -> None:
    assert tokens_by_second([request([0.2, 0.9], sent_s=0.2), request([0.1], sent_s=3.0)]) == [1, 1, 0, 1]
    assert tokens_by_second([]) == []
