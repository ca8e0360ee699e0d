"""`python -m kvferry.kvstore` as a process: start, health, drain, clear errors."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvferry.kvstore import ClientConfig, Namespace, StoreClient, block_keys
from kvferry.kvstore.__main__ import main


@pytest.mark.parametrize("backend", ["memory", "redis"])
async def test_serves_and_drains_on_sigterm(
    start_node: Callable[..., Any],
    shared_redis: Any,
    namespace: Namespace,
    make_record: Callable[..., bytes],
    backend: str,
) -> None:
    options = ["--memory", "1.5MiB"] if backend == "memory" else ["--redis", shared_redis.url]
    node = start_node("--grace", "1", *options)
    line = node.wait_for_line("serving on ")
    assert f"backend {backend}, capacity " in line
    assert node.address.startswith("127.0.0.1:")
    key = block_keys(namespace, range(32))[0]
    config = ClientConfig(address=node.address, lookup_timeout_s=5.0)
    async with StoreClient(config) as client, grpc.aio.insecure_channel(node.address) as channel:
        assert await client.put(key, make_record(key))
        stats = await client.stats()
        assert stats.backend == backend
        if backend == "memory":
            assert stats.capacity_bytes == 3 << 19
        await client.delete([key])
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service="kvferry.kvstore.v1.KVStore"), timeout=20
        )
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        node.signal(signal.SIGTERM)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert await asyncio.to_thread(node.popen.wait, 15) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "70000"], "port must be 0..65535"),
        (["--redis", "http://127.0.0.1"], "redis://"),
        (["--host", "192.0.2.1", "--port", "0", "--insecure"], "cannot listen on 192.0.2.1"),
        (["--host", "192.0.2.1", "--port", "0"], "192.0.2.1:0 may be reached by others"),
        (["--tls-cert", "x"], "--tls-cert, --tls-key and --tls-ca go together"),
        (["--cluster-token-file", "/nowhere/token"], "/nowhere/token"),
        (["--disk", "/nowhere"], "--disk and --disk-bytes go together"),
        (["--redis-cluster", "localhost"], "not host:port"),
        (["--redis", "redis://x", "--redis-cluster", "x:1"], "exactly one of"),
        (["--redis", "redis://x", "--write", "back"], "needs a memory tier"),
        (["--redis-sentinel", "x:1"], "name of a service"),
        (["--redis", "redis://x", "--redis-password-file", "/nowhere"], "/nowhere"),
        (["--memory", "lots"], "not a size"),
    ],
)
def test_errors_are_one_clear_line(arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "kvferry.kvstore", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env={"PYTHONPATH": "src"})
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_help_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "KV store node" in capsys.readouterr().out
