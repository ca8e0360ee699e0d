"""`kvferry bench serve` in a process of its own, against a real store, real workers and a real gateway."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from kvferry.deploy.assembly import make_gateway
from kvferry.deploy.settings import GatewaySettings, Settings
from kvferry.deploy.worker_server import ModelRuntime

BLOCK_SIZE = 32
WINDOW = 2048
COUNTS = ("prompt_tokens", "cached_tokens", "kv_bytes_moved", "kv_bytes_bf16")


@pytest.fixture
async def address(runtime: Callable[[str], ModelRuntime], serve_workers: Any, make_store: Any) -> AsyncIterator[str]:
    worker = runtime("llama")
    workers = await serve_workers(worker, (await make_store()).address)
    settings = Settings(
        model=worker.loaded.source.path,
        served_model_name=worker.info(roles=["decode"]).model_name,
        gateway=GatewaySettings(port=0),
    )
    gateway = await make_gateway(settings, prefill=[workers.prefill_address], decode=[workers.decode_address])
    port = await gateway.start()
    await gateway.wait_until_serving(30)
    yield f"127.0.0.1:{port}"
    await gateway.stop(0)


async def bench_serve(address: str, path: Path, *arguments: str) -> dict[str, Any]:
    """The JSON of a run, its sums checked."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvferry.deploy.cli", "bench", "serve", "--address", address),
        *("--json", str(path), "--details", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(240):
        _, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert err == b""
    result: dict[str, Any] = json.loads(path.read_text())
    _check_sums(result)
    return result


def _check_sums(result: dict[str, Any]) -> None:
    details = result["requests"]
    done = [d for d in details if d["status"] == "OK"]
    assert len(details) == result["num_prompts"] == result["completed"] + result["failed"]
    assert sum(o["count"] for o in result["outcomes"]) == len(details)
    assert len(done) == result["completed"]
    usages = [d["usage"] for d in done]
    prompt_tokens, cached, moved, bf16 = (sum(u[name] for u in usages) for name in COUNTS)
    assert [u["prompt_tokens"] for u in usages] == [d["input_len"] for d in done]
    assert [d["output_len"] for d in done] == [d["asked_output_len"] for d in done]
    assert result["total_input_tokens"] == prompt_tokens
    assert result["total_output_tokens"] == sum(d["output_len"] for d in done)
    assert result["cached_tokens"] == cached
    assert result["cache_hit_rate"] == pytest.approx(cached / prompt_tokens)
    assert (result["kv_bytes_moved"], result["kv_bytes_bf16"]) == (moved, bf16)
    assert result["kv_bytes_ratio"] == pytest.approx(bf16 / moved)
    for request in done:
        assert len(request["itls"]) == request["output_len"] - 1
        assert request["ttft"] + sum(request["itls"]) <= request["ended"]
        assert request["usage"]["ttft_s"] <= request["ttft"]
        assert request["sent"] + request["ended"] <= result["duration"]
    assert result["mean_ttft_ms"] == pytest.approx(1000 * sum(d["ttft"] for d in done) / len(done))
    for throughput, tokens in (
        ("request_throughput", len(done)),
        ("output_throughput", result["total_output_tokens"]),
        ("total_token_throughput", result["total_output_tokens"] + prompt_tokens),
    ):
        assert result[throughput] == pytest.approx(tokens / result["duration"])


async def test_cold_then_the_same_again(address: str, tmp_path: Path) -> None:
    arguments = ("--num-prompts", "6", "--input-len", "100", "--output-len", "5", "--max-concurrency", "2")
    cold = await bench_serve(address, tmp_path / "cold.json", *arguments, "--num-warmups", "1")
    assert (cold["completed"], cold["total_input_tokens"], cold["total_output_tokens"]) == (6, 600, 30)
    assert cold["cached_tokens"] == 0
    assert 1 <= cold["max_concurrent_requests"] <= 2
    again = await bench_serve(address, tmp_path / "again.json", *arguments)
    assert again["cached_tokens"] == 6 * 96  # whole blocks only
    other = await bench_serve(address, tmp_path / "other.json", *arguments, "--seed", "1")
    assert other["cached_tokens"] == 0


async def test_shared_prefixes_hit(address: str, tmp_path: Path) -> None:
    result = await bench_serve(
        address,
        tmp_path / "out.json",
        *("--workload", "shared-prefix", "--num-prompts", "10", "--num-prefixes", "2", "--prefix-len", "128"),
        *("--suffix-len", "20", "--output-len", "3", "--max-concurrency", "1", "--goodput", "e2el:600000"),
    )
    assert result["total_input_tokens"] == 10 * 148
    assert result["cached_tokens"] == 8 * 128  # all but the first prompt of each prefix
    assert result["request_goodput"] == result["request_throughput"]


async def test_trace_blocks_hit(address: str, tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1024, "output_length": 16, "hash_ids": [0, 1]},
        {"timestamp": 90_000, "input_length": 1536, "output_length": 8, "hash_ids": [0, 1, 2]},
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = await bench_serve(
        address,
        tmp_path / "out.json",
        *("--workload", "trace", "--trace", str(trace), "--trace-speed", "30", "--trace-block", "128"),
    )
    first, second = result["requests"]
    assert (first["input_len"], second["input_len"]) == (256, 384)
    assert (first["output_len"], second["output_len"]) == (4, 2)
    assert second["due"] == pytest.approx(3.0)
    assert (first["usage"]["cached_tokens"], second["usage"]["cached_tokens"]) == (0, 256)


async def test_mixed_ends_as_meant(address: str, tmp_path: Path) -> None:
    """Deadlines of 1 ms: nothing is answered so fast, on any machine."""
    result = await bench_serve(
        address,
        tmp_path / "out.json",
        *("--workload", "mixed", "--num-prompts", "30", "--input-len", "40", "--long-input-len", "300"),
        *("--output-len", "200", "--bad-share", "0.2", "--short-deadline", "0.001", "--request-rate", "20"),
    )
    counts = {(o["kind"], o["status"]): o["count"] for o in result["outcomes"]}
    assert counts["deadline", "DEADLINE_EXCEEDED"] == counts["cancelled", "CANCELLED"] == 3
    assert (counts["short", "OK"], counts["long", "OK"]) == (12, 6)
    assert counts["bad-model", "NOT_FOUND"] == 1
    assert sum(n for (kind, _), n in counts.items() if kind.startswith("bad-")) == 6
    assert (result["completed"], result["failed"], result["unexpected"]) == (18, 12, 0)


async def test_a_worker_without_a_pool_is_refused(address: str) -> None:
    for worker, sentence in ((address, "does not answer (UNIMPLEMENTED)"), ("127.0.0.1:9", "does not answer")):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "kvferry.deploy.cli", "bench", "serve", "--address", address),
            *("--worker", worker, "--num-prompts", "1"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, err = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 1
        assert sentence in err.decode()


async def test_what_the_gateway_refuses_is_said_before_the_run(address: str) -> None:
    for arguments, sentence in (
        (("--input-len", str(WINDOW)), "2,048"),
        (("--vocab-size", "10000000"), "too large for this model"),
        (("--model", "other"), "the gateway serves"),
    ):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "kvferry.deploy.cli", "bench", "serve", "--address", address, *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(120):
            out, err = await process.communicate()
        assert process.returncode == 1
        assert (out, sentence in err.decode()) == (b"", True), err
