"""Arrivals, prompts, traces and mixes: functions of the options and the seed."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvferry.deploy.bench_serve.arrivals import arrival_times
from kvferry.deploy.bench_serve.mixed import BAD_KINDS, Mix, mixed_requests
from kvferry.deploy.bench_serve.trace import read_trace, replay
from kvferry.deploy.bench_serve.workload import PlannedRequest, TokenSource, shared_prefixes, unique_prompts

Code = grpc.StatusCode
ROW: dict[str, Any] = {"timestamp": 0, "input_length": 600, "output_length": 8, "hash_ids": [0, 1]}


def ids(requests: list[PlannedRequest]) -> list[list[int]]:
    return [request.token_ids.tolist() for request in requests]


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in zip([0.0, *times], times, strict=False)]


class TestArrivals:
    @pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
    def test_rate_and_shape(self, burstiness: float) -> None:
        times = arrival_times(20_000, rate=50.0, burstiness=burstiness, seed=3)
        assert times == sorted(times)
        assert times[-1] == pytest.approx(20_000 / 50.0)
        between = gaps(times)
        assert statistics.fmean(between) == pytest.approx(1 / 50)
        # A gamma distribution's variation coefficient is 1 / sqrt(shape).
        assert statistics.pstdev(between) * 50 == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)

    def test_poisson_gaps_are_exponential(self) -> None:
        between = np.sort(gaps(arrival_times(20_000, rate=2.0, seed=1)))
        seen = np.arange(1, len(between) + 1) / len(between)
        assert np.abs(seen - (1 - np.exp(-2.0 * between))).max() < 0.02

    def test_seed_and_infinity(self) -> None:
        assert arrival_times(9, rate=3.0, seed=1) == arrival_times(9, rate=3.0, seed=1)
        assert arrival_times(9, rate=3.0, seed=1) != arrival_times(9, rate=3.0, seed=2)
        assert arrival_times(4, rate=math.inf) == [0.0] * 4

    @pytest.mark.parametrize(("rate", "burstiness"), [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, 0.0)])
    def test_refused(self, rate: float, burstiness: float) -> None:
        with pytest.raises(ValueError, match="positive"):
            arrival_times(4, rate=rate, burstiness=burstiness)


class TestUnique:
    @given(
        seed=st.integers(0, 2**64),
        length=st.integers(1, 300),
        ratio=st.floats(0, 0.99),
        vocab_size=st.integers(2, 100_000),
    )
    @settings(max_examples=40, deadline=None)
    def test_lengths_and_ids(self, seed: int, length: int, ratio: float, vocab_size: int) -> None:
        def make() -> list[PlannedRequest]:
            tokens = TokenSource(seed=seed, vocab_size=vocab_size)
            return unique_prompts(tokens, count=8, input_len=length, output_len=5, range_ratio=ratio)

        requests = make()
        assert ids(requests) == ids(make())
        low, high = max(1, math.floor(length * (1 - ratio))), math.ceil(length * (1 + ratio))
        for request in requests:
            assert low <= len(request.token_ids) <= high
            assert 1 <= request.max_tokens <= 10
            assert request.token_ids.max() < vocab_size

    def test_nothing_is_shared(self) -> None:
        prompts = ids(unique_prompts(TokenSource(seed=0), count=50, input_len=32, output_len=1))
        assert len({tuple(prompt[:4]) for prompt in prompts}) == 50
        others = ids(unique_prompts(TokenSource(seed=1), count=50, input_len=32, output_len=1))
        assert not {tuple(prompt[:4]) for prompt in prompts} & {tuple(prompt[:4]) for prompt in others}


def test_shared_prefixes() -> None:
    options: dict[str, Any] = {"count": 60, "prefix_len": 40, "num_prefixes": 3, "suffix_len": 10, "output_len": 4}
    requests = shared_prefixes(TokenSource(seed=5), **options)
    prompts = ids(requests)
    assert prompts == ids(shared_prefixes(TokenSource(seed=5), **options))
    assert all(len(prompt) == 50 for prompt in prompts)
    assert len({tuple(prompt[:40]) for prompt in prompts}) == 3
    assert len({tuple(prompt[40:]) for prompt in prompts}) == 60


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class TestTrace:
    def test_equal_ids_are_equal_tokens(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "t.jsonl",
            ROW | {"timestamp": 4000, "input_length": 1300, "hash_ids": [0, 1, 2]},
            ROW | {"timestamp": 1000, "input_length": 1100, "hash_ids": [0, 9, 2], "session": "other fields are fine"},
            ROW | {"timestamp": 1000, "input_length": 1100, "hash_ids": [0]},
        )
        workload = replay(read_trace(path), TokenSource(seed=0), speed=2.0, window=2000)
        first, second, third = ids(list(workload.requests))
        assert workload.due_s == [0.0, 0.0, 1.5]
        assert [len(first), len(second), len(third)] == [1100, 1100, 1300]
        assert first[:512] == second[:512] == third[:512]
        assert first[512:1024] != third[512:1024]
        assert second[512:1024] not in (first[512:1024], third[512:1024])
        assert first[1024:1100] == third[1024:1100]  # one id, one block, however much of it is used

    def test_scaled(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.jsonl", ROW | {"input_length": 1300, "output_length": 9, "hash_ids": [0, 1, 2]}, ROW)
        workload = replay(read_trace(path), TokenSource(seed=0), block_tokens=64, window=2000)
        long, short = ids(list(workload.requests))
        assert (len(long), len(short)) == (163, 75)
        assert long[:75] == short
        assert [request.max_tokens for request in workload.requests] == [2, 1]

    @pytest.mark.parametrize("block_tokens", [64, 512])
    def test_what_ids_do_not_cover_is_the_requests_own(self, tmp_path: Path, block_tokens: int) -> None:
        path = write(tmp_path / "t.jsonl", *[ROW | {"input_length": 1300, "hash_ids": [0]}] * 2)
        workload = replay(read_trace(path), TokenSource(seed=0), block_tokens=block_tokens, window=2000)
        first, second = ids(list(workload.requests))
        assert len(first) == len(second) == math.ceil(1300 * block_tokens / 512)
        assert first[:block_tokens] == second[:block_tokens]
        assert first[block_tokens : block_tokens + 4] != second[block_tokens : block_tokens + 4]

    def test_what_does_not_fit_is_counted(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.jsonl", ROW, ROW | {"input_length": 100, "hash_ids": []})
        workload = replay(read_trace(path), TokenSource(seed=0), window=108)
        assert (len(workload.requests), workload.num_skipped) == (1, 1)
        with pytest.raises(ValueError, match="--trace-block"):
            replay(read_trace(path), TokenSource(seed=0), window=107)

    def test_limit_reads_no_further(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.jsonl", ROW, ROW, "bad")
        assert len(read_trace(path, limit=2)) == 2

    @pytest.mark.parametrize(
        ("line", "sentence"),
        [
            (b"{", "Expecting"),
            (b"[1]", "not an object"),
            (b"\xff\xfe{}", "utf|codec|decode"),
            (b"[" * 200_000, "nested too deeply"),
            (b"1" * 5000, "digits"),
            (json.dumps({k: v for k, v in ROW.items() if k != "timestamp"}).encode(), "timestamp"),
            (json.dumps(ROW | {"timestamp": math.nan}).encode(), "timestamp"),
            (json.dumps(ROW | {"timestamp": -1}).encode(), "timestamp"),
            (json.dumps(ROW | {"timestamp": True}).encode(), "timestamp"),
            (json.dumps(ROW | {"input_length": 0}).encode(), "input_length"),
            (json.dumps(ROW | {"input_length": 10**12}).encode(), "input_length"),
            (json.dumps(ROW | {"output_length": 1.5}).encode(), "output_length"),
            (json.dumps(ROW | {"hash_ids": "01"}).encode(), "hash_ids"),
            (json.dumps(ROW | {"hash_ids": [-1]}).encode(), "hash_ids"),
            (json.dumps(ROW | {"hash_ids": [0, 1, 2]}).encode(), "3 hash_ids for 600 tokens"),
        ],
        ids=lambda value: value[:12].decode(errors="replace") if isinstance(value, bytes) else "",
    )
    def test_bad_lines_name_file_and_line(self, tmp_path: Path, line: bytes, sentence: str) -> None:
        path = tmp_path / "t.jsonl"
        path.write_bytes(json.dumps(ROW).encode() + b"\n\n" + line + b"\n")
        with pytest.raises(ValueError, match=rf"t\.jsonl:3: .*({sentence})"):
            read_trace(path)

    @given(
        content=st.one_of(
            st.binary(max_size=200),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list(ROW)), inner),
                max_leaves=8,
            ).map(lambda value: json.dumps(value).encode()),
            st.builds(
                lambda name, value: json.dumps(ROW | {name: value}).encode(),
                st.sampled_from(list(ROW)),
                st.none() | st.integers() | st.floats() | st.lists(st.integers() | st.floats(), max_size=3),
            ),
        )
    )
    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_anything_is_read_or_refused_with_its_line(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "fuzz.jsonl"
        path.write_bytes(content)
        try:
            rows = read_trace(path)
        except ValueError as error:
            assert str(error).startswith((f"{path}:", f"{path} has no requests"))
        else:
            assert all(row.input_length > 0 and row.output_length > 0 and row.timestamp_ms >= 0 for row in rows)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            read_trace(tmp_path / "none.jsonl")


class TestMixed:
    OPTIONS: ClassVar[dict[str, Any]] = {
        "input_len": 20,
        "long_input_len": 90,
        "output_len": 6,
        "short_deadline_s": 0.01,
    }
    MIX = Mix(long=0.2, cancelled=0.15, too_short_deadline=0.1, bad=0.25)

    def test_counts_are_the_shares_and_the_order_is_the_seeds(self) -> None:
        def make(seed: int) -> list[PlannedRequest]:
            return mixed_requests(TokenSource(seed=seed), count=40, mix=self.MIX, **self.OPTIONS)

        kinds = [request.kind for request in make(1)]
        expected = {"long": 8, "cancelled": 6, "deadline": 4, "short": 12} | dict.fromkeys(BAD_KINDS, 2)
        assert Counter(kinds) == expected
        assert kinds == [request.kind for request in make(1)]
        assert ids(make(1)) == ids(make(1))
        assert kinds != [request.kind for request in make(2)]
        assert Counter(request.kind for request in make(2)) == expected

    def test_what_each_kind_is(self) -> None:
        requests = mixed_requests(TokenSource(seed=1), count=40, mix=self.MIX, **self.OPTIONS)
        for request in requests:
            match request.kind:
                case "short" | "long":
                    assert request.expected is Code.OK
                case "cancelled":
                    assert request.expected is Code.CANCELLED
                    assert request.cancel_after is not None and 0 <= request.cancel_after < request.max_tokens
                case "deadline":
                    assert (request.expected, request.timeout_s) == (Code.DEADLINE_EXCEEDED, 0.01)
                case "bad-model":
                    assert (request.expected, request.model) == (Code.NOT_FOUND, "no-such-model")
                case _:
                    assert request.expected is Code.INVALID_ARGUMENT
            assert len(request.token_ids) in {"long": (90,), "deadline": (90,), "bad-empty": (0,)}.get(
                request.kind, (20, 21)
            )

    @pytest.mark.parametrize("shares", [{"bad": 1.1}, {"long": 0.6, "cancelled": 0.6}, {"long": -0.1}])
    def test_impossible_shares(self, shares: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="shares"):
            Mix(**shares)
