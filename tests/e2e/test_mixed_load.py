"""200 requests of every kind, good and bad, leave nothing behind: no busy block, no lease, no task."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.decode_calls import Inside

from kvferry.decode.config import DecodeConfig
from kvferry.deploy.assembly import make_gateway
from kvferry.deploy.settings import GatewaySettings, Settings
from kvferry.deploy.worker_server import ModelRuntime
from kvferry.kvstore.config import NodeConfig
from kvferry.kvstore.memory_backend import MemoryBackend
from kvferry.kvstore.server import KVStoreServer
from kvferry.proto import worker_pb2, worker_pb2_grpc

BLOCK_BYTES = 3 * 2 * 24 * 64
NUM_BLOCKS = 40
"""So few that requests are swapped out."""
LOAD = (
    *("--workload", "mixed", "--num-prompts", "200", "--request-rate", "25", "--seed", "3"),
    *("--input-len", "80", "--long-input-len", "600", "--output-len", "60", "--range-ratio", "0.3"),
    *("--cancel-share", "0.2", "--deadline-share", "0.1", "--bad-share", "0.1"),
)


async def test_nothing_is_left(runtime: Callable[[str], ModelRuntime], serve_workers: Any, tmp_path: Path) -> None:
    backend = MemoryBackend(capacity_bytes=2**24)  # too small for all of it: eviction runs, too
    store = KVStoreServer(backend, NodeConfig())
    await store.start()
    worker = runtime("llama")
    workers = await serve_workers(
        worker, store.address, DecodeConfig(kv_memory=NUM_BLOCKS * BLOCK_BYTES, max_num_seqs=12, max_waiting=200)
    )
    settings = Settings(
        model=worker.loaded.source.path,
        served_model_name=worker.info(roles=["decode"]).model_name,
        gateway=GatewaySettings(port=0, max_concurrent=40),
    )
    gateway = await make_gateway(settings, prefill=[workers.prefill_address], decode=[workers.decode_address])
    port = await gateway.start()
    await gateway.wait_until_serving(30)
    tasks_before = {task.get_coro() for task in asyncio.all_tasks()}
    try:
        result = await _load(f"127.0.0.1:{port}", tmp_path / "load.json", workers.decode_address)
        [pool] = result["pools"]
        assert 0 < pool["mean_pool_usage"] < pool["max_pool_usage"] <= 1
        assert pool["num_swaps"] <= Inside.of(workers).admission.num_swaps  # as of the last poll
        assert result["unexpected"] == 0, result["outcomes"]
        assert {o["status"] for o in result["outcomes"]} >= {"OK", "CANCELLED", "DEADLINE_EXCEEDED", "INVALID_ARGUMENT"}
        inside = Inside.of(workers)
        assert inside.admission.num_swaps > 0
        await inside.assert_all_free()
        async with asyncio.timeout(20):
            while (stats := await _stats(workers)).prefill.num_requests or stats.decode.num_requests:
                await asyncio.sleep(0.05)
            while len(backend.leases):
                await asyncio.sleep(0.05)
            while gateway._gateway._answering.num_running or inside.engine.num_running:
                await asyncio.sleep(0.05)
        await inside.assert_all_free()  # and now that nobody asks: answers that were published held blocks until here
        stats = await _stats(workers)
        assert store.staged_bytes == 0
        assert stats.decode.pool_blocks_used == 0
        assert stats.decode.pool_blocks == stats.decode.pool_blocks_cached + sum(map(len, inside.admission.pool._free))
        await _no_more_tasks(tasks_before)
    finally:
        await gateway.stop(0)
        await store.stop(0)


async def _load(address: str, path: Path, worker: str) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvferry.deploy.cli", "bench", "serve", "--address", address),
        *("--worker", worker, "--json", str(path), *LOAD),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(300):
        _, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    result: dict[str, Any] = json.loads(path.read_text())
    return result


async def _stats(workers: Any) -> worker_pb2.WorkerStats:
    """Of both workers together."""
    decode = await worker_pb2_grpc.WorkerStub(workers.channel).Stats(worker_pb2.StatsRequest(), timeout=5)
    stats = workers.prefill_server.stats()
    stats.decode.CopyFrom(decode.decode)
    return stats


async def _no_more_tasks(before: set[Any]) -> None:
    """Tasks of requests end; gRPC servers keep tasks that wait for the next call."""

    def left() -> list[str]:
        names = (task.get_coro().__qualname__ for task in asyncio.all_tasks() if task.get_coro() not in before)
        return [name for name in names if not name.startswith("AioServer.")]

    try:
        async with asyncio.timeout(20):
            while left():
                await asyncio.sleep(0.1)
    except TimeoutError:
        pytest.fail(f"tasks are left: {left()}")
