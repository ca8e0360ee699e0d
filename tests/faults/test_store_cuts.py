"""The way to the store broken after every number of bytes: its node killed, its connections cut, a bit of it flipped.

A few places in every run; with `KVFERRY_DEEP` (`make test-deep`) hundreds. The oracle is the request without a store.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fault_relay import FaultRelay
from support.processes import NodeProcess
from support.store_requests import (
    IS_DEEP,
    LIMIT_S,
    NUM_BLOCKS,
    PHASES,
    Requests,
    answered,
    bytes_by_phase,
    places,
    store_client,
)

from kvferry.kvstore.codec import decode_record, verify_record
from kvferry.kvstore.config import NodeConfig
from kvferry.kvstore.disk_backend import DiskBackend
from kvferry.kvstore.lease import LeaseTable
from kvferry.kvstore.memory_backend import MemoryBackend
from kvferry.kvstore.server import KVStoreServer


async def records_on_disk(folder: Path, requests: Requests) -> int:
    """How many records a dead node has left; all of them must be whole."""
    disk = DiskBackend(folder, capacity_bytes=64 << 20, read_timeout_s=LIMIT_S)
    keys = sorted(disk.keys())
    assert set(keys) <= set(requests.keys)
    for key, record in zip(keys, await disk.get(keys), strict=True):
        assert record is not None
        decode_record(record, expected_key=key, expected_namespace=requests.namespace)
    assert (await disk.stats()).corrupt == 0, "a record is there whole or not at all"
    await disk.close()
    return len(keys)


@pytest.mark.timeout(1800 if IS_DEEP else 300)
async def test_node_killed_after_any_byte(
    relay: FaultRelay,
    requests: Requests,
    tmp_path: Path,
    start_node: Callable[..., NodeProcess],
) -> None:
    """SIGKILL in every step of puts and gets. What is on its disk afterwards is whole records, and is used again."""
    kills = (44, 44, 22, 22) if IS_DEEP else (4, 4, 2, 2)
    tiers = ("--memory", "64MiB", "--disk", str(tmp_path / "disk"), "--disk-bytes", "64MiB")
    tiers += ("--bulk-address", relay.address)
    rng = random.Random(1)
    node = start_node(*tiers)
    relay.target, relay.bulk_target = node.address, node.bulk_address

    async def prepare(is_warm: bool) -> None:
        await requests.until_the_store_is_used()
        if is_warm:
            await requests.ask()
            return
        async with store_client(node.address) as direct:
            await answered(direct.delete_all)

    sizes = await bytes_by_phase(relay, requests, prepare)
    killed = survived = 0
    for phase, count in zip(PHASES, kills, strict=True):
        is_warm, direction = phase
        for place in places(sizes[phase], count, rng):
            await prepare(is_warm)
            fired = relay.fired
            relay.arm(direction, place, node.kill)
            await requests.ask()
            relay.watch()
            if relay.fired == fired:  # bytes of a request without a prefix vary with who was first
                continue
            killed += 1
            assert node.popen.returncode == -signal.SIGKILL
            found = await records_on_disk(tmp_path / "disk", requests)
            survived += found
            assert found == NUM_BLOCKS or not is_warm, "what was stored before outlives the kill"
            node = start_node(*tiers)
            relay.target, relay.bulk_target = node.address, node.bulk_address
    assert killed == relay.fired >= 0.8 * sum(kills), "the control: the kills were in the middle of requests"
    assert survived > 0
    assert sum(client.counters.bulk_gets for client in requests.clients) > 0


@pytest.mark.timeout(1800 if IS_DEEP else 300)
@pytest.mark.parametrize("fault", ["cut", "flip"])
async def test_connections_broken_after_any_byte(fault: str, relay: FaultRelay, requests: Requests) -> None:
    """Connections reset, or a bit flipped on its way, where no checksum of TCP finds it. The node lives on: it keeps no
    lease, no half put and no record that is not what it should be."""
    counts = (60, 60, 30, 30) if IS_DEEP else (4, 4, 2, 2)
    rng = random.Random(2)
    leases = LeaseTable()
    backend = MemoryBackend(capacity_bytes=64 << 20, leases=leases)
    server = KVStoreServer(backend, NodeConfig(bulk_address=relay.address))
    await server.start()
    assert server.bulk is not None
    relay.target, relay.bulk_target = server.address, f"127.0.0.1:{server.bulk.port}"
    num_leased = 0

    def cut() -> None:
        nonlocal num_leased
        num_leased += len(leases) > 0
        relay.cut()

    async def prepare(is_warm: bool) -> None:
        await requests.until_the_store_is_used()
        if not is_warm:
            await backend.delete(None)
            return
        async with asyncio.timeout(LIMIT_S):
            while not all(await backend.contains(requests.keys)):
                await requests.ask()
                await requests.until_the_store_is_used()

    try:
        sizes = await bytes_by_phase(relay, requests, prepare)
        genuine = dict(zip(requests.keys, await backend.get(requests.keys), strict=True))
        for phase, count in zip(PHASES, counts, strict=True):
            is_warm, direction = phase
            for place in places(sizes[phase], count, rng):
                await prepare(is_warm)
                relay.arm(direction, place, cut if fault == "cut" else None)
                await requests.ask()
                relay.watch()
                for key in sorted(backend.keys()):
                    (record,) = await backend.get([key])
                    assert record is not None
                    verify_record(record, key)
                    assert record == genuine[key]
        assert relay.fired >= 0.8 * sum(counts), "the control: the faults were in the middle of requests"
        assert fault == "flip" or num_leased > 0, "and some of them while a lease was held"
        assert fault == "cut" or server.counters.rejected + requests.num_corrupt > 0, "and some of them inside records"
        assert server.staged_bytes == 0
        assert server.counters.bulk_gets > 0
        async with asyncio.timeout(LIMIT_S):
            while len(leases):  # one whose release was lost ends by itself
                await asyncio.sleep(0.05)
    finally:
        await server.stop(0.2)
