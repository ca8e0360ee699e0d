"""Tiers composed: what goes where, who is asked, and what a dead, full or damaged tier costs. Redis is real."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from support.store_processes import key_of, record_of

from kvferry.kvstore import StoreFull, StoreUnavailable
from kvferry.kvstore.disk_backend import DiskBackend
from kvferry.kvstore.errors import InvalidRequest
from kvferry.kvstore.guarded_tier import GuardedTier, TierLimits
from kvferry.kvstore.lease import LeaseTable
from kvferry.kvstore.memory_backend import MemoryBackend
from kvferry.kvstore.redis_backend import RedisBackend
from kvferry.kvstore.redis_place import RedisPlace
from kvferry.kvstore.store_config import DiskConfig, StoreConfig, make_backend
from kvferry.kvstore.tiered_backend import TieredBackend
from kvferry.kvstore.verifier import Verifier

KEYS = [key_of(number) for number in range(60)]
SIZE = 100_000
COST = 102_400  # of a record on disk


def _config(tmp_path: Path, url: str | None = None, **options: Any) -> StoreConfig:
    disk = options.pop("disk_bytes", 1 << 30)
    return StoreConfig(
        disk=DiskConfig(folder=tmp_path / "disk", capacity_bytes=disk) if disk else None,
        redis=RedisPlace(url=url) if url else None,
        **{"memory_bytes": 1 << 30, **options},
    )


def _tiered(config: StoreConfig) -> TieredBackend:
    backend = make_backend(config)
    assert isinstance(backend, TieredBackend)
    return backend


async def _by_tier(backend: TieredBackend) -> dict[str, Any]:
    return {tier.name: tier for tier in (await backend.stats()).tiers}


async def test_contract(tmp_path: Path) -> None:
    backend = _tiered(_config(tmp_path))
    assert backend.leases is not None and backend.hands_out_verified
    assert await backend.get(KEYS[:2]) == [None, None]
    assert await backend.put(KEYS[0], record_of(0)) is True
    assert await backend.put(KEYS[0], record_of(1)) is False
    assert await backend.get(KEYS[:1]) == [record_of(0)]
    assert await backend.contains(KEYS[:2]) == [True, False]
    assert await backend.delete(KEYS[:2]) == 1
    assert await backend.get(KEYS[:1]) == [None]
    for number in range(5):
        await backend.put(KEYS[number], record_of(number))
    assert await backend.delete(None) == 5
    assert await backend.contains(KEYS[:5]) == [False] * 5
    await backend.close()


async def test_written_through_to_every_tier_and_read_from_any(tmp_path: Path, start_redis: Callable[..., Any]) -> None:
    config = _config(tmp_path, start_redis().url)
    backend = _tiered(config)
    for number in range(3):
        await backend.put(KEYS[number], record_of(number, SIZE))
    assert {name: tier.records for name, tier in (await _by_tier(backend)).items()} == {
        "memory": 3,
        "disk": 3,
        "redis": 3,
    }
    assert (await backend.stats()).name == "memory+disk+redis"
    await backend.close()

    backend = _tiered(config)  # as after a restart: memory is empty
    assert await backend.contains(KEYS[:4]) == [True, True, True, False]
    assert await backend.get(KEYS[:2]) == [record_of(0, SIZE), record_of(1, SIZE)]
    tiers = await _by_tier(backend)
    assert (tiers["memory"].promoted, tiers["disk"].hits, tiers["redis"].hits) == (2, 2, 0)
    assert await backend.get(KEYS[:2]) == [record_of(0, SIZE), record_of(1, SIZE)]
    assert (await _by_tier(backend))["disk"].hits == 2, "from memory this time"
    await backend.close()

    other = _tiered(_config(tmp_path / "other", config.redis and config.redis.url))  # another node, same Redis
    assert await other.get(KEYS[:4]) == [*(record_of(number, SIZE) for number in range(3)), None]
    tiers = await _by_tier(other)
    assert (tiers["redis"].hits, tiers["redis"].misses, tiers["disk"].records) == (3, 1, 0)
    assert await other.put(KEYS[0], record_of(0, SIZE)) is False
    await other.close()


async def test_eviction_from_memory_demotes_what_the_disk_does_not_have(
    tmp_path: Path, start_redis: Callable[..., Any]
) -> None:
    url = start_redis().url
    first = _tiered(_config(tmp_path / "a", url, disk_bytes=None))
    for number in range(6):
        await first.put(KEYS[number], record_of(number, SIZE))
    await first.close()
    backend = _tiered(_config(tmp_path / "b", url, memory_bytes=4 * COST))
    for number in range(6):
        await backend.get([KEYS[number]])  # from Redis into memory, and the oldest two out again
    assert await backend.drain(10) == 0
    tiers = await _by_tier(backend)
    assert (tiers["memory"].evictions, tiers["disk"].records) == (2, 2)
    assert await backend.get(KEYS[:2]) == [record_of(0, SIZE), record_of(1, SIZE)]
    assert (await _by_tier(backend))["disk"].hits == 2
    await backend.close()


async def test_write_back_is_bounded_and_loses_nothing_that_memory_still_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = LeaseTable()
    disk = DiskBackend(tmp_path / "disk", capacity_bytes=1 << 30, leases=leases)
    verifier = Verifier()
    tier = GuardedTier("disk", disk, limits=TierLimits(put_timeout_s=30), verifier=verifier)
    memory = MemoryBackend(capacity_bytes=20 * COST, leases=leases)
    backend = TieredBackend(
        memory=memory, lower=[tier], leases=leases, verifier=verifier, write="back", max_behind_bytes=5 * COST
    )
    gate = asyncio.Event()
    real = disk.put

    async def slow(key: bytes, record: bytes) -> bool:
        await gate.wait()
        return await real(key, record)

    monkeypatch.setattr(disk, "put", slow)
    for number in range(12):
        assert await backend.put(KEYS[number], record_of(number, SIZE)) is True  # none of them waits for the disk
    assert await backend.contains(KEYS[:12]) == [True] * 12
    assert (await _by_tier(backend))["disk"].dropped == 7
    gate.set()
    assert await backend.drain(10) == 0
    assert (await _by_tier(backend))["disk"].records == 5
    for number in range(12, 32):  # memory turns over: what was dropped is offered again as it leaves
        await backend.put(KEYS[number], record_of(number, SIZE))
        assert await backend.drain(10) == 0
    assert (await _by_tier(backend))["disk"].records == 32
    assert await backend.get(KEYS[:32]) == [record_of(number, SIZE) for number in range(32)]
    await backend.close()


async def test_closing_writes_down_what_waits(tmp_path: Path) -> None:
    config = _config(tmp_path, write="back")
    backend = _tiered(config)
    for number in range(20):
        await backend.put(KEYS[number], record_of(number, SIZE))
    await backend.close()
    backend = _tiered(config)
    assert await backend.contains(KEYS[:20]) == [True] * 20
    await backend.close()


async def test_a_delete_reaches_what_waits_and_what_is_being_read(tmp_path: Path) -> None:
    config = _config(tmp_path, write="back")
    backend = _tiered(config)
    for number in range(10):
        await backend.put(KEYS[number], record_of(number, 1_000_000))
    assert await backend.delete(None) == 10
    await backend.drain(10)
    assert await backend.contains(KEYS[:10]) == [False] * 10
    for number in range(10):
        await backend.put(KEYS[number], record_of(number, 1_000_000))
    await backend.close()
    backend = _tiered(config)
    reading = asyncio.create_task(backend.get(KEYS[:10]))
    await asyncio.sleep(0)
    await backend.delete(KEYS[:10])
    await reading
    assert await backend.contains(KEYS[:10]) == [False] * 10, "a read that began before does not bring them back"
    await backend.close()


@pytest.mark.parametrize("way", ["stop", "kill"])
async def test_a_dead_redis_costs_one_bounded_wait(tmp_path: Path, start_redis: Callable[..., Any], way: str) -> None:
    process = start_redis()
    backend = _tiered(_config(tmp_path, process.url))
    for number in range(4):
        await backend.put(KEYS[number], record_of(number, SIZE))
    if way == "stop":
        process.signal(signal.SIGSTOP)
    else:
        process.kill()
    loop_time = time.monotonic()
    assert await backend.contains(KEYS[:8]) == [True] * 4 + [False] * 4
    first = time.monotonic() - loop_time
    tier = next(tier for tier in backend._lower if tier.name == "redis")
    assert not tier.is_available, "one unanswered look-up opened the breaker"
    # The bound itself is the limit that was set, not a stopwatch: the machine may be busy.
    assert tier.counts.errors == 1 and first < 30
    assert tier._limits.lookup_timeout_s <= 0.25
    for _ in range(50):
        assert await backend.contains(KEYS[:8]) == [True] * 4 + [False] * 4
    assert await backend.get(KEYS[:5]) == [*(record_of(number, SIZE) for number in range(4)), None]
    assert await backend.put(KEYS[5], record_of(5)) is True
    assert tier.counts.errors == 1 and tier.counts.refused >= 52, "nothing waited for it again"
    with pytest.raises(StoreUnavailable, match="not deleted"):
        await backend.delete(KEYS[:1])
    assert await backend.contains(KEYS[:1]) == [False], "deleted in the other tiers all the same"
    if way == "stop":
        process.signal(signal.SIGCONT)
    else:
        start_redis(port=process.port)
    async with asyncio.timeout(15):
        while not tier.is_available:
            await asyncio.sleep(0.05)
    assert await backend.put(KEYS[6], record_of(6)) is True
    assert (await tier.get(KEYS[6:7])) == [record_of(6)]
    await backend.close()


async def test_a_damaged_record_in_a_lower_tier_is_dropped_and_the_next_tier_asked(
    tmp_path: Path, start_redis: Callable[..., Any]
) -> None:
    process = start_redis()
    config = _config(tmp_path, process.url)
    backend = _tiered(config)
    for number in range(3):
        await backend.put(KEYS[number], record_of(number, SIZE))
    await backend.close()
    rng = random.Random(3)
    for path in (tmp_path / "disk" / "records").glob("*/*"):
        damaged = bytearray(path.read_bytes())
        damaged[rng.randrange(256, len(damaged))] ^= 4
        path.write_bytes(damaged)
    with redis.Redis(port=process.port) as admin:
        admin.setrange(b"kvferry:" + KEYS[2], 5000, b"\xff\x00\xff\x00")
    backend = _tiered(config)
    assert await backend.get(KEYS[:3]) == [record_of(0, SIZE), record_of(1, SIZE), None]
    tiers = await _by_tier(backend)
    assert (tiers["disk"].corrupt, tiers["redis"].corrupt, tiers["memory"].records) == (3, 1, 2)
    assert tiers["disk"].records == 0 and await backend.contains(KEYS[2:3]) == [False]
    await backend.close()


async def test_a_full_disk_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        backend = _tiered(_config(tmp_path))
        for number in range(10):
            assert await backend.put(KEYS[number], record_of(number, 1_000_000)) is True
        tiers = await _by_tier(backend)
        assert tiers["disk"].errors >= 6 and tiers["disk"].available, "each refusal is counted"
        assert tiers["disk"].records + tiers["disk"].errors == 10
        assert await backend.get(KEYS[:10]) == [record_of(number, 1_000_000) for number in range(10)]
        await backend.close()
        backend = _tiered(_config(tmp_path, memory_bytes=None))
        with pytest.raises(StoreFull, match="no tier"):
            for number in range(10, 14):
                await backend.put(KEYS[number], record_of(number, 1_000_000))
        await backend.close()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_a_hanging_disk_opens_its_breaker_and_memory_goes_on(tmp_path: Path) -> None:
    """A disk that does not answer, as one behind a lost network: here its only thread is taken."""
    leases, verifier = LeaseTable(), Verifier()
    disk = DiskBackend(tmp_path / "disk", capacity_bytes=1 << 30, leases=leases, num_threads=1)
    limits = TierLimits(get_timeout_s=0.2, put_timeout_s=0.2, probe_timeout_s=0.2, cool_down_s=0.1)
    tier = GuardedTier("disk", disk, limits=limits, verifier=verifier)
    backend = TieredBackend(
        memory=MemoryBackend(capacity_bytes=1 << 30, leases=leases), lower=[tier], leases=leases, verifier=verifier
    )
    read_end, write_end = os.pipe()
    blocked = asyncio.create_task(disk._threads.run(lambda: os.read(read_end, 1)))
    await asyncio.sleep(0.05)
    assert await backend.put(KEYS[0], record_of(0)) is True
    assert not tier.is_available and tier.counts.errors == 1
    assert await backend.put(KEYS[1], record_of(1)) is True
    assert tier.counts.refused == 1
    assert await backend.get(KEYS[:2]) == [record_of(0), record_of(1)]
    os.write(write_end, b"x")
    await blocked
    async with asyncio.timeout(15):
        while not tier.is_available:
            await asyncio.sleep(0.02)
    assert await backend.put(KEYS[2], record_of(2)) is True
    assert disk.holds(KEYS[2])
    await backend.close()
    os.close(read_end)
    os.close(write_end)


async def test_pins_and_leases_hold_in_every_local_tier(tmp_path: Path, start_redis: Callable[..., Any]) -> None:
    url = start_redis().url
    backend = _tiered(_config(tmp_path, url, memory_bytes=6 * COST, disk_bytes=10 * COST))
    for number in range(4):
        await backend.put(KEYS[number], record_of(number, SIZE))
    assert await backend.pin([KEYS[0], KEYS[50]]) == [True, False]
    assert backend.leases is not None
    backend.leases.grant(KEYS[1:2], 600)
    for number in range(4, 40):
        await backend.put(KEYS[number], record_of(number, SIZE))
    memory, disk = backend._memory, backend._disk
    assert memory is not None and disk is not None
    for key in KEYS[:2]:
        assert memory.holds(key) and disk.holds(key)
    for key in KEYS[2:4]:
        assert not memory.holds(key) and not disk.holds(key), "the control: the others were evicted"
    tiers = await _by_tier(backend)
    assert tiers["memory"].pinned_bytes > 0 and tiers["disk"].pinned_bytes == COST
    assert await backend.pin(KEYS[2:3]) == [True], "only Redis had it: it came up first"
    assert disk.holds(KEYS[2])
    assert await backend.unpin(KEYS[:3]) == [True, False, True]
    for number in range(40, 60):
        await backend.put(KEYS[number], record_of(number, SIZE))
    assert not disk.holds(KEYS[0]) and disk.holds(KEYS[1])
    await backend.close()


async def test_listing_goes_tier_by_tier(tmp_path: Path, start_redis: Callable[..., Any]) -> None:
    process = start_redis()
    backend = _tiered(_config(tmp_path, process.url))
    for number in range(30):
        await backend.put(KEYS[number], record_of(number))
    cursor, entries = b"", []
    while True:
        page = await backend.page(cursor, 7)
        entries += page.entries
        cursor = page.next_cursor
        if not cursor:
            break
    for tier in ("memory", "disk", "redis"):
        assert sorted({entry.key for entry in entries if entry.tier == tier}) == sorted(KEYS[:30])
    for bad in (b"\x03", b"\xff", b"\x02nonsense"):
        with pytest.raises(InvalidRequest):
            await backend.page(bad, 10)
    process.kill()
    assert (await backend.page(b"\x02", 10)).entries == [], "a dead tier is left out"
    await backend.close()


async def test_redis_alone_cannot_pin(shared_redis: Any) -> None:
    backend = make_backend(StoreConfig(memory_bytes=None, redis=RedisPlace(url=shared_redis.url)))
    assert isinstance(backend, RedisBackend)
    for call in (backend.pin, backend.unpin):
        with pytest.raises(InvalidRequest, match="cannot pin"):
            await call(KEYS[:1])
    await backend.close()


def test_impossible_stores(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one tier"):
        make_backend(StoreConfig(memory_bytes=None))
    with pytest.raises(ValueError, match="needs a memory tier"):
        make_backend(_config(tmp_path, memory_bytes=None, write="back"))
    with pytest.raises(ValueError, match="lookup_timeout_s"):
        TierLimits(lookup_timeout_s=0)
