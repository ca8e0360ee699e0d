"""The metrics endpoint: what it answers, and that nobody who asks can hold up the process."""

from __future__ import annotations

import asyncio
import http.client
import socket
import threading
import time
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from kvferry.kvstore import metrics_endpoint
from kvferry.kvstore.backend import BackendStats
from kvferry.kvstore.config import NodeConfig
from kvferry.kvstore.errors import StoreUnavailable
from kvferry.kvstore.memory_backend import MemoryBackend
from kvferry.kvstore.metric_families import Described, gauge
from kvferry.kvstore.metrics_endpoint import MAX_SCRAPES, MetricsEndpoint, MetricsPlace
from kvferry.kvstore.node import NodeCounters
from kvferry.kvstore.node_metrics import node_families
from kvferry.kvstore.server import KVStoreServer

ANSWER = Described("answer", "Of a test.")


async def families() -> list[Metric]:
    return [gauge(ANSWER, [({"role": "one"}, 42)])]


@pytest.fixture
async def port() -> AsyncIterator[int]:
    endpoint = MetricsEndpoint(MetricsPlace(), families)
    yield await endpoint.start()
    await endpoint.stop()


def get(port: int, path: str = "/metrics") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, reply.read().decode()
    finally:
        connection.close()


def values(text: str) -> dict[str, float]:
    return {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}


async def test_tells_the_loops_values_and_the_process(port: int) -> None:
    status, text = await asyncio.to_thread(get, port)
    assert status == 200
    assert values(text)["kvferry_answer"] == 42
    assert values(text)["process_open_fds"] > 3
    assert (await asyncio.to_thread(get, port, "/metrics?name[]=kvferry_answer"))[0] == 200
    assert (await asyncio.to_thread(get, port, "/"))[0] == 404


async def test_a_busy_loop_answers_503_in_time_and_recovers(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_endpoint, "SNAPSHOT_TIMEOUT_S", 0.2)
    told: list[int] = []
    asking = threading.Thread(target=lambda: told.append(get(port)[0]))
    asking.start()
    deadline = time.monotonic() + 10
    while not told and time.monotonic() < deadline:
        time.sleep(0.05)  # the loop does nothing else meanwhile
    asking.join()
    assert told == [503]
    assert (await asyncio.to_thread(get, port))[0] == 200


async def test_silent_clients_are_few_and_are_ended(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_endpoint._Handler, "timeout", 1.0)
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(MAX_SCRAPES)]
    try:
        await asyncio.sleep(0.3)  # every one of them has its thread
        with pytest.raises((OSError, http.client.HTTPException)):
            await asyncio.to_thread(get, port)
        for connection in silent:
            connection.settimeout(10)
            assert await asyncio.to_thread(connection.recv, 1) == b"", "ended by the endpoint"
        assert (await asyncio.to_thread(get, port))[0] == 200
    finally:
        for connection in silent:
            connection.close()


async def test_a_taken_port_says_what_to_change(port: int) -> None:
    with pytest.raises(OSError, match=rf"cannot serve metrics on 127.0.0.1:{port}.*metrics.port_offset"):
        await MetricsEndpoint(MetricsPlace(port=port), families).start()
    with pytest.raises(ValueError, match="70000"):
        MetricsPlace(port=70000)


async def test_one_family_for_two_roles() -> None:
    registries = []
    for role in ("prefill", "decode"):
        registry = CollectorRegistry()
        Counter("kvferry_moved", "Of a test.", ["role"], registry=registry).labels(role=role).inc(3)
        registries.append(registry)
    endpoint = MetricsEndpoint(MetricsPlace(), families, also=registries)
    port = await endpoint.start()
    try:
        _, text = await asyncio.to_thread(get, port)
    finally:
        await endpoint.stop()
    assert text.count("# TYPE kvferry_moved_total counter") == 1
    assert 'kvferry_moved_total{role="prefill"} 3.0' in text and 'kvferry_moved_total{role="decode"} 3.0' in text


async def test_a_node_serves_and_stops() -> None:
    server = KVStoreServer(MemoryBackend(capacity_bytes=1 << 20), NodeConfig(metrics=MetricsPlace()))
    await server.start()
    try:
        status, text = await asyncio.to_thread(get, server.metrics_port)
        assert status == 200 and 'kvferry_store_tier_capacity_bytes{tier="memory"}' in text
    finally:
        await server.stop(0)
    with pytest.raises(OSError):
        await asyncio.to_thread(get, server.metrics_port)


async def test_a_lost_backend_is_told_and_the_counters_stay() -> None:
    class Lost(MemoryBackend):
        async def stats(self) -> BackendStats:
            raise StoreUnavailable("gone")

    told = {
        sample.name: sample.value
        for family in await node_families(NodeCounters(hits=7), 0, Lost(capacity_bytes=1))
        for sample in family.samples
    }
    assert told["kvferry_store_backend_up"] == 0 and told["kvferry_store_hits_total"] == 7
    assert not any("tier" in name for name in told)
