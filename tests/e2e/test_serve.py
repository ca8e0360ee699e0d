"""The console script as a user runs it: real processes under a local Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

KVFERRY = str(Path(sys.executable).parent / "kvferry")
START_LIMIT_S = 180.0
STOP_LIMIT_S = 60.0


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Ray writes an authentication token below HOME."""
    home = tmp_path_factory.mktemp("home")
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return dict(os.environ, HOME=str(home), XDG_CACHE_HOME=cache)


@pytest.fixture(scope="module")
def served(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    """`kvferry serve` on free ports: (process, address, log)."""
    folder = tmp_path_factory.mktemp("served")
    config = folder / "kvferry.yaml"
    config.write_text(
        f"model: {tiny_model('qwen3')}\n"
        "preset: kv16\n"
        "block_size: 32\n"
        "gateway: {port: 0}\n"
        "store: {port: 0, bulk_port: 0, memory: 64MiB}\n"
        "prefill: {port: 0, fetch: always}\n"
        "decode: {port: 0, kv_memory: 16MiB}\n"
    )
    log = folder / "serve.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [KVFERRY, "serve", "--config", str(config)], stdout=stream, stderr=stream, text=True, env=environment
        )
    try:
        yield process, _wait_for_address(process, log), log
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_LIMIT_S)


def _wait_for_address(process: subprocess.Popen[str], log: Path) -> str:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            if line.startswith("kvferry serves on "):
                return line.rsplit(" ", 1)[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    raise AssertionError(f"not serving after {START_LIMIT_S} s: {log.read_text()}")


def _generate(address: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [KVFERRY, "generate", "--address", address, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_bench_serve(
    served: tuple[subprocess.Popen[str], str, Path], tmp_path: Path, environment: dict[str, str]
) -> None:
    """The whole product under load; tests/e2e/test_bench_serve.py looks at what is reported."""
    _, address, log = served
    result_path = tmp_path / "bench.json"
    command = [KVFERRY, "bench", "serve", "--address", address, "--json", str(result_path)]
    command += ["--num-prompts", "8", "--input-len", "70", "--output-len", "6", "--max-concurrency", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr + log.read_text()
    result = json.loads(result_path.read_text())
    assert (result["completed"], result["failed"], result["wrong_length"]) == (8, 0, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (8 * 70, 8 * 6)
    assert result["kv_bytes_moved"] > 0


def test_serve_generate_and_stop(
    served: tuple[subprocess.Popen[str], str, Path], tmp_path: Path, environment: dict[str, str]
) -> None:
    process, address, log = served
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    listening = {
        connection.laddr.ip
        for pid in family
        for connection in psutil.Process(pid).net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, listening
    assert listening

    prompt_file = tmp_path / "prompt.txt"
    prompt_file.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    arguments = ["--prompt-file", str(prompt_file), "--max-tokens", "9"]
    first = _generate(address, environment, *arguments, "--json")
    assert first.returncode == 0, first.stderr
    answer = json.loads(first.stdout)
    assert len(answer["token_ids"]) == 9
    assert answer["usage"]["cached_tokens"] == 0
    again = json.loads(_generate(address, environment, *arguments, "--json").stdout)
    assert again["token_ids"] == answer["token_ids"]
    assert again["usage"]["cached_tokens"] == again["usage"]["prompt_tokens"] // 32 * 32
    streamed = _generate(address, environment, *arguments)
    assert streamed.stdout.rstrip("\n") == answer["text"].rstrip("\n")

    refused = _generate(address, environment, "", "--raw")
    assert refused.returncode == 1
    assert "empty" in refused.stderr
    assert "Traceback" not in refused.stderr

    process.send_signal(signal.SIGTERM)
    assert process.wait(STOP_LIMIT_S) == 0, log.read_text()
    left = [pid for pid in family if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    deadline = time.monotonic() + STOP_LIMIT_S
    while left and time.monotonic() < deadline:
        time.sleep(0.2)
        left = [pid for pid in left if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    assert not left


def test_demo_on_the_real_model(tmp_path: Path, environment: dict[str, str]) -> None:
    """The demo's own verdict, on a real document and the real model; see README for what it shows."""
    result_path = tmp_path / "demo.json"
    command = [KVFERRY, "demo", "--json", str(result_path), "--max-tokens", "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(result_path.read_text())
    assert result["identical"] is True
    first, other, again, wiped = result["requests"]
    assert first["prompt_tokens"] > 3000
    assert (first["cached_tokens"], wiped["cached_tokens"]) == (0, 0)
    assert again["cached_tokens"] > 3000
    assert other["cached_tokens"] > 3000
    assert first["output_token_ids"] == again["output_token_ids"] == wiped["output_token_ids"]
    assert other["output_token_ids"] != first["output_token_ids"]
    for request in result["requests"]:
        assert request["kv_bytes_bf16"] > 5 * request["kv_bytes_moved"] > 0
        assert request["text"]
    assert 2.7 < result["effective_bits"] < 2.9
