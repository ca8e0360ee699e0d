"""`kvferry bench router --simulate`: the trace, the simulated workers, and what is counted."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest

from kvferry.deploy.bench_router.results import PolicyRound, TokenSources, imbalance, ratios, summarize
from kvferry.deploy.bench_router.simulated_worker import LruBlocks, SimulatedPrefill, SimulatedSpeeds
from kvferry.deploy.bench_router.simulation import Scenario, simulate, token_ids_of
from kvferry.deploy.bench_router.simulation_report import summarize_simulated
from kvferry.deploy.bench_router.slow_link import SlowLink
from kvferry.deploy.bench_router.synthetic_trace import SyntheticTrace, write_trace
from kvferry.deploy.bench_serve.trace import BLOCK_TOKENS, TraceRow, read_trace
from kvferry.deploy.routing.cost import Speeds
from kvferry.deploy.routing.policies import POLICIES, Policy

SIZE = 10
SPEEDS = SimulatedSpeeds(
    block_size=SIZE,
    block_bytes=1000,
    prefill=Speeds(token_s=0.1, lookup_s=0.0, fetch_latency_s=0.0, fetch_bytes_per_s=1e4),
)


def keys(name: str, count: int = 4) -> list[bytes]:
    return [f"{name}{i}".encode() for i in range(count)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[TraceRow]:
    path = tmp_path_factory.mktemp("trace") / "t.jsonl"
    write_trace(path, SyntheticTrace(num_requests=400, requests_per_s=8.0, seed=1).rows())
    return read_trace(path)


class TestPrefill:
    def test_computes_then_holds(self) -> None:
        worker, store = SimulatedPrefill(SPEEDS), LruBlocks(None)
        assert worker.prefill(0.0, keys("a"), 45, store) == pytest.approx(4.5)
        assert worker.prefill(10.0, keys("a"), 45, store) == pytest.approx(10.5)  # 5 tokens
        assert worker.tokens == {"own": 40, "store": 0, "computed": 50}

    def test_waits_for_what_it_computes_already(self) -> None:
        worker, store = SimulatedPrefill(SPEEDS), LruBlocks(None)
        worker.prefill(0.0, keys("a"), 45, store)
        assert worker.prefill(1.0, keys("a"), 45, store) == pytest.approx(5.0)

    def test_fetches(self) -> None:
        worker, store = SimulatedPrefill(SPEEDS), LruBlocks(None)
        store.add(keys("a", 3))
        assert worker.prefill(0.0, keys("a"), 45, store) == pytest.approx(0.3 + 1.5)
        assert worker.stats(0.8).prefill.queued_seconds == pytest.approx(1.0)

    def test_a_whole_prompt_in_memory_leaves_a_token_to_compute(self) -> None:
        worker, store = SimulatedPrefill(SPEEDS), LruBlocks(None)
        worker.prefill(0.0, keys("a"), 40, store)
        worker.prefill(9.0, keys("a"), 40, store)
        assert worker.tokens == {"own": 30, "store": 0, "computed": 50}


class TestTrace:
    def test_is_in_the_format_and_repeats(self, tmp_path: Path) -> None:
        made = SyntheticTrace(num_requests=200, requests_per_s=5.0, seed=3)
        assert made.rows() == made.rows()
        write_trace(tmp_path / "t.jsonl", made.rows())
        rows = read_trace(tmp_path / "t.jsonl")
        assert len(rows) == 200
        assert set(json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])) == {
            "timestamp",
            "input_length",
            "output_length",
            "hash_ids",
        }
        # A number stands for its block and all before it.
        before = {}
        for row in rows:
            for index, hash_id in enumerate(row.hash_ids):
                assert before.setdefault(hash_id, row.hash_ids[:index]) == row.hash_ids[:index]
        assert Counter(row.hash_ids[0] for row in rows).most_common(1)[0][1] > 20

    def test_prompts_share_what_their_ids_share(self) -> None:
        one, other = (
            token_ids_of(TraceRow(timestamp_ms=0, input_length=1300, output_length=1, hash_ids=ids), index)
            for index, ids in enumerate([(1, 2), (1, 3)])
        )
        assert len(one) == len(other) == 1300
        assert one[:BLOCK_TOKENS] == other[:BLOCK_TOKENS] and one[BLOCK_TOKENS:] != other[BLOCK_TOKENS:]
        assert one[-1] != other[-1]


class TestSimulation:
    @pytest.mark.parametrize("policy", POLICIES)
    def test_every_token_has_a_source(self, rows: list[TraceRow], policy: Policy) -> None:
        result = simulate(policy, rows, Scenario(num_prefill=3, num_decode=2))
        assert len(result.ttfts_s) == len(result.decision_s) == len(rows)
        assert sum(result.tokens.values()) == sum(row.input_length for row in rows)
        assert sum(result.prefill_requests) == len(rows)
        assert sum(result.decode_tokens) == sum(row.output_length for row in rows)
        summary = summarize_simulated(result)
        assert summary["simulated"] is True
        assert (summary["index_bytes"] > 0) == (policy == "prefix")

    def test_prefix_holds_more_and_stays_even(self, rows: list[TraceRow]) -> None:
        prefix, turns = (
            summarize_simulated(simulate(policy, rows, Scenario(num_prefill=4, num_decode=2, num_gateways=2)))
            for policy in ("prefix", "round-robin")
        )
        assert prefix["own_share"] > 1.2 * turns["own_share"]
        assert prefix["computed_share"] <= turns["computed_share"]
        assert prefix["median_ttft_s"] < turns["median_ttft_s"]
        assert prefix["prefill_work_imbalance"] < 1.5
        assert prefix["decode_token_imbalance"] < 1.5


class TestResults:
    def test_by_hand(self) -> None:
        def one(policy: str, number: int, ttft: float, work: tuple[float, ...]) -> PolicyRound:
            return PolicyRound(
                policy=policy,
                number=number,
                ttfts_s=(ttft, ttft, 100.0),
                prefill_work_s=work,
                prefill_requests=(2, 1, 0),
                decode_requests=(2, 1),
                tokens=TokenSources(total=100, computed=50, shared=20, own_cache=10, store=20),
                load_average=1.0,
            )

        rounds = [one("prefix", 0, 1.0, (3.0, 0.0, 0.0)), one("prefix", 1, 2.0, (0.0, 3.0, 3.0))]
        rounds += [one("round-robin", 0, 3.0, (1.0, 1.0, 1.0)), one("round-robin", 1, 3.0, (1.0, 1.0, 1.0))]
        prefix, _ = summarize(rounds)
        assert prefix["prefill_work_imbalance"] == 1.0  # over all rounds
        assert prefix["prefill_request_imbalance"] == 2.0
        assert (prefix["computed_share"], prefix["own_cache_share"]) == (0.5, 0.1)
        assert ratios(rounds, of="round-robin", to="prefix") == [3.0, 1.5]
        assert imbalance([0.0, 0.0]) == 1.0


async def test_slow_link_loses_no_byte() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(5000):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    link = SlowLink(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", bits_per_s=1e9)
    host, _, port = (await link.start()).rpartition(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port))
        sent = bytes(range(256)) * 1000
        writer.write(sent)
        async with asyncio.timeout(20):
            assert await reader.readexactly(len(sent)) == sent
        writer.close()
    finally:
        await link.stop()
        server.close()


async def test_slow_link_to_nobody_closes() -> None:
    link = SlowLink("127.0.0.1:1", bits_per_s=1e9)
    host, _, port = (await link.start()).rpartition(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(20):
            assert await reader.read() == b""
        writer.close()
    finally:
        await link.stop()
