"""`kvferry bench serve` as a user types it, in a process of its own, against gateways in this one."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.token_server import MAX_MODEL_LEN, MODEL, TokenServicer, start_token_server

KVFERRY = (sys.executable, "-m", "kvferry.deploy.cli")


@dataclass
class Done:
    code: int
    out: str
    err: str


async def bench_serve(address: str, *arguments: str) -> Done:
    process = await asyncio.create_subprocess_exec(
        *KVFERRY,
        "bench",
        "serve",
        "--address",
        address,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(120):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return Done(process.returncode or 0, out.decode(), err.decode())


@pytest.fixture
async def served() -> AsyncIterator[tuple[TokenServicer, str]]:
    servicer = TokenServicer()
    server, address = await start_token_server(servicer)
    yield servicer, address
    await server.stop(None)


class TestReport:
    async def test_json_and_output(self, served: tuple[TokenServicer, str], tmp_path: Path) -> None:
        servicer, address = served
        path = tmp_path / "out.json"
        done = await bench_serve(
            address,
            *("--num-prompts", "20", "--input-len", "30", "--output-len", "7", "--range-ratio", "0.5"),
            *("--request-rate", "200", "--burstiness", "0.5", "--num-warmups", "2", "--seed", "4"),
            *("--goodput", "ttft:60000 tpot:60000", "--json", str(path), "--details"),
        )
        assert done.code == 0, done.err
        assert done.err == ""  # no bar without a terminal
        assert done.out.count("completed requests") == done.out.count("load average") == 1
        result = json.loads(path.read_text())
        details = result["requests"]
        assert len(servicer.requests) == 22
        assert result["num_prompts"] == result["completed"] == len(details) == 20
        assert result["failed"] == result["unexpected"] == result["wrong_length"] == 0
        assert result["total_input_tokens"] == sum(d["input_len"] for d in details)
        assert result["total_output_tokens"] == sum(d["output_len"] for d in details)
        assert result["total_input_tokens"] == sum(len(r.token_ids.ids) for r in servicer.requests[2:])
        assert [d["asked_output_len"] for d in details] == [d["output_len"] for d in details]
        assert result["request_goodput"] == result["request_throughput"] == pytest.approx(20 / result["duration"])
        assert result["slo_attainment"] == 1.0
        tokens = result["total_input_tokens"] + result["total_output_tokens"]
        assert result["total_token_throughput"] == pytest.approx(tokens / result["duration"])
        for metric in ("ttft", "tpot", "itl", "e2el", "send_lag"):
            for statistic in ("mean", "median", "std", "p50", "p90", "p99"):
                assert result[f"{statistic}_{metric}_ms"] >= 0
        assert (result["request_rate"], result["burstiness"], result["options"]["seed"]) == (200.0, 0.5, 4)

    async def test_the_seed_is_the_run(self, served: tuple[TokenServicer, str]) -> None:
        servicer, address = served
        arguments = ("--num-prompts", "6", "--workload", "shared-prefix", "--max-concurrency", "1", "--output-len", "2")
        for seed in ("1", "1", "2"):
            assert (await bench_serve(address, *arguments, "--seed", seed)).code == 0
        sent = [request.SerializeToString() for request in servicer.requests]
        assert sent[:6] == sent[6:12]
        assert not set(sent[:6]) & set(sent[12:])

    async def test_plots(self, served: tuple[TokenServicer, str], tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        _, address = served
        folder = tmp_path / "plots"
        done = await bench_serve(address, "--num-prompts", "3", "--plots", str(folder), "--goodput", "ttft:9")
        assert done.code == 0, done.err
        for name in ("serve-latency.png", "serve-timeline.png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")

    async def test_trace(self, served: tuple[TokenServicer, str], tmp_path: Path) -> None:
        servicer, address = served
        rows = [
            {"timestamp": 500, "input_length": 600, "output_length": 3, "hash_ids": [0, 1]},
            {"timestamp": 0, "input_length": 700, "output_length": 2, "hash_ids": [0, 2]},
            {"timestamp": 700, "input_length": 10_000, "output_length": 2, "hash_ids": [3]},
        ]
        trace, path = tmp_path / "trace.jsonl", tmp_path / "out.json"
        trace.write_text("\n".join(map(json.dumps, rows)))
        done = await bench_serve(
            address, "--workload", "trace", "--trace", str(trace), "--trace-speed", "10", "--json", str(path)
        )
        assert done.code == 0, done.err
        assert "1 requests of the trace do not fit" in done.out
        first, second = (list(request.token_ids.ids) for request in servicer.requests)
        assert (len(first), len(second)) == (700, 600)
        assert first[:512] == second[:512]
        result = json.loads(path.read_text())
        assert (result["completed"], result["num_skipped"], result["total_output_tokens"]) == (2, 1, 5)
        assert result["duration"] >= 0.05


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--workload", "odd"], "choose one of unique, shared-prefix, trace, mixed"),
            (["--workload", "trace"], "belong together"),
            (["--request-rate", "0"], "positive"),
            (["--request-rate", "nan"], "positive"),
            (["--burstiness", "2"], "needs a --request-rate"),
            (["--goodput", "ttft=5"], "write ttft:MS"),
            (["--details"], "--json"),
            (["--json", "/no/such/folder/out.json"], "there is no folder"),
            (["--range-ratio", "1"], "--range-ratio"),
            (["--workload", "mixed", "--bad-share", "0.9", "--long-share", "0.2"], "at most 1 together"),
        ],
        ids=str,
    )
    def test_options(self, arguments: list[str], sentence: str) -> None:
        """Before anything is asked of a gateway; in this process, for they are many."""
        from typer.testing import CliRunner

        from kvferry.deploy.cli import app

        result = CliRunner().invoke(app, ["bench", "serve", "--address", "127.0.0.1:9", *arguments])
        assert result.exit_code == 1, result.output
        assert sentence in result.output

    async def refused(self, address: str, *arguments: str) -> str:
        done = await bench_serve(address, *arguments)
        assert done.code == 1
        assert done.out == ""
        assert done.err.startswith("kvferry: ") and done.err.count("\n") == 1, done.err
        return done.err

    async def test_no_gateway(self) -> None:
        assert "No gateway answers at 127.0.0.1:9" in await self.refused("127.0.0.1:9")

    async def test_gateway_without_workers(self, served: tuple[TokenServicer, str]) -> None:
        servicer, address = served
        servicer.models = []
        assert "workers are not ready" in await self.refused(address)

    async def test_unknown_model(self, served: tuple[TokenServicer, str]) -> None:
        assert f"--model other: the gateway serves {MODEL}" in await self.refused(served[1], "--model", "other")

    async def test_window(self, served: tuple[TokenServicer, str]) -> None:
        servicer, address = served
        said = await self.refused(address, "--input-len", str(MAX_MODEL_LEN), "--output-len", "9")
        assert "8,192 tokens and an answer of 9" in said
        assert not servicer.requests

    async def test_trace_line(self, served: tuple[TokenServicer, str], tmp_path: Path) -> None:
        trace = tmp_path / "trace.jsonl"
        trace.write_text('{"timestamp": 0}\n')
        said = await self.refused(served[1], "--workload", "trace", "--trace", str(trace))
        assert "trace.jsonl:1: input_length" in said
        said = await self.refused(served[1], "--workload", "trace", "--trace", str(tmp_path / "none"))
        assert "No such file" in said

    async def test_nothing_completed(self, served: tuple[TokenServicer, str]) -> None:
        servicer, address = served
        servicer.hold.clear()
        done = await bench_serve(address, "--num-prompts", "2", "--timeout", "0.2")
        servicer.hold.set()
        assert done.code == 1
        assert "DEADLINE_EXCEEDED" in done.out and "no request completed" in done.err

    async def test_failed_warm_up(self, served: tuple[TokenServicer, str]) -> None:
        servicer, address = served
        servicer.hold.clear()
        said = await self.refused(address, "--num-warmups", "1", "--timeout", "0.2")
        servicer.hold.set()
        assert "a warm-up request ended with DEADLINE_EXCEEDED" in said

    def test_matplotlib(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from typer.testing import CliRunner

        from kvferry.deploy.cli import app

        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        result = CliRunner().invoke(app, ["bench", "serve", "--plots", str(tmp_path / "new")])
        assert result.exit_code == 1 and "kvferry[bench]" in result.output
        assert not (tmp_path / "new").exists()


async def test_the_client_needs_no_torch(served: tuple[TokenServicer, str]) -> None:
    """Not even where it is installed: a benchmark's client must leave the machine to the servers."""
    program = (
        "import sys; from kvferry.deploy.cli import app\n"
        f"try: app(['bench', 'serve', '--address', {served[1]!r}, '--num-prompts', '2'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(*sorted({'torch', 'transformers', 'ray', 'triton'} & set(sys.modules)), sep=',', end='|')"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(120):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert out.decode().endswith("\n|")


async def test_mixed_against_a_real_gateway(lab: Any, tmp_path: Path) -> None:
    """Every outcome as it was meant, counted by status; the worker holds what is to be cancelled or late."""
    worker = await lab.worker([5, 5, 1.0, 5, 5, 5, lab.end(5, reason="length")])
    gateway = await lab.gateway([worker])
    path = tmp_path / "out.json"
    done = await bench_serve(
        gateway.address,
        *("--workload", "mixed", "--num-prompts", "40", "--input-len", "20", "--long-input-len", "200"),
        *("--output-len", "6", "--bad-share", "0.25", "--short-deadline", "0.1", "--max-concurrency", "8"),
        *("--json", str(path)),
    )
    assert done.code == 0, done.err
    result = json.loads(path.read_text())
    counts = {(o["kind"], o["status"]): o["count"] for o in result["outcomes"]}
    assert {key: n for key, n in counts.items() if key[0] != "cancelled"} == {
        ("short", "OK"): 14,
        ("long", "OK"): 8,
        ("deadline", "DEADLINE_EXCEEDED"): 4,
        ("bad-empty", "INVALID_ARGUMENT"): 2,
        ("bad-token", "INVALID_ARGUMENT"): 2,
        ("bad-temperature", "INVALID_ARGUMENT"): 2,
        ("bad-max-tokens", "INVALID_ARGUMENT"): 2,
        ("bad-model", "NOT_FOUND"): 2,
    }
    assert counts["cancelled", "CANCELLED"] == 4
    assert (result["completed"], result["failed"], result["unexpected"]) == (22, 18, 0)
    assert result["total_output_tokens"] == 22 * 6
    assert sum(counts.values()) == 40
    assert not result["wrong_length"]
