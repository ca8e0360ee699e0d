"""Tiers below memory that break while a request uses them: Redis, the disk, a node of a Redis Cluster.

A real node with so little memory that nearly every record of the prefix comes from the tier below. The fault happens
after a given byte of the request; the oracle is the request without a store.
"""

from __future__ import annotations

import asyncio
import random
import resource
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import redis
from support.fault_relay import Direction, FaultRelay
from support.processes import NodeProcess, RedisProcess
from support.store_processes import RedisCluster
from support.store_requests import (
    BLOCK_SIZE,
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

from kvferry.kvstore.node_answers import NodeStats

MEMORY = ("--memory", "25kB", "--bulk-port", "off")  # two records; all that clients get crosses the relay


async def stats_of(node: NodeProcess) -> NodeStats:
    async with store_client(node.address) as direct:
        return await answered(direct.stats)


async def until_available(node: NodeProcess) -> None:
    """The tier's breaker closes by itself."""
    async with asyncio.timeout(LIMIT_S):
        while not all(tier.available for tier in (await stats_of(node)).tiers):
            await asyncio.sleep(0.05)


async def prepare(node: NodeProcess, requests: Requests, is_warm: bool) -> None:
    """The store is in use again, and has the prefix or does not."""
    await until_available(node)
    await requests.until_the_store_is_used()
    async with asyncio.timeout(LIMIT_S), store_client(node.address) as direct:
        if not is_warm:
            await answered(lambda: direct.delete(requests.keys))
        while is_warm and (await answered(lambda: direct.lookup(requests.keys))).num_contiguous < NUM_BLOCKS:
            await requests.ask()
            await until_available(node)
            await requests.until_the_store_is_used()


@pytest.fixture
async def redis_relay() -> AsyncIterator[FaultRelay]:
    """Between a node and its Redis."""
    relay = FaultRelay()
    await relay.start()
    yield relay
    await relay.stop()


@pytest.mark.timeout(1800 if IS_DEEP else 300)
@pytest.mark.parametrize("fault", ["restart", "flush", "full", "stop"])
async def test_redis_breaks_during_a_request(
    fault: str,
    relay: FaultRelay,
    redis_relay: FaultRelay,
    requests: Requests,
    start_node: Callable[..., NodeProcess],
    start_redis: Callable[..., RedisProcess],
) -> None:
    rng = random.Random(4)
    server = start_redis()
    redis_relay.target = f"127.0.0.1:{server.port}"
    node = start_node(*MEMORY, "--redis", f"redis://{redis_relay.address}/0")
    relay.target = node.address
    happened = 0
    admin = redis.Redis(port=server.port)

    def break_redis() -> None:
        nonlocal happened
        happened += 1
        if fault == "flush":
            admin.flushall()
            assert admin.dbsize() == 0
        elif fault == "full":
            admin.config_set("maxmemory", 1)
        else:
            server.signal(signal.SIGKILL if fault == "restart" else signal.SIGSTOP)

    async def mend() -> None:
        nonlocal server, admin
        if fault == "full":
            admin.config_set("maxmemory", 0)
        elif fault == "stop":
            server.signal(signal.SIGCONT)
        elif fault == "restart" and server.popen.poll() is not None:
            admin.close()
            server = await asyncio.to_thread(start_redis, port=server.port)
            admin = redis.Redis(port=server.port)

    async def restart_soon() -> None:
        while server.popen.poll() is None:
            await asyncio.sleep(0.005)
        await mend()

    async def prepare_phase(is_warm: bool) -> None:
        await prepare(node, requests, is_warm)
        if is_warm:
            assert int(admin.dbsize()) >= NUM_BLOCKS - 2, "all but those that memory took and Redis could not"

    await prepare_phase(True)
    sizes = await bytes_by_phase(redis_relay, requests, prepare_phase)
    assert sizes[False, "up"] > 50_000 < sizes[True, "down"], "the control: the records come from Redis and go there"
    phases: list[tuple[bool, Direction]] = [(False, "up"), (True, "down")]
    errors = 0
    count = 12 if IS_DEEP else 2
    for is_warm, direction in phases:
        for place in places(sizes[is_warm, direction], count, rng):
            await prepare_phase(is_warm)
            redis_relay.arm(direction, place, break_redis)
            restarting = asyncio.create_task(restart_soon()) if fault == "restart" else None
            await requests.ask()
            redis_relay.watch()
            errors = max(errors, (await stats_of(node)).tiers[1].errors)
            if restarting is not None and server.popen.poll() is None:
                restarting.cancel()
            await asyncio.gather(*([restarting] if restarting else []), return_exceptions=True)
            await mend()
    assert happened == redis_relay.fired >= 0.7 * count * len(phases), "the control: it broke during requests"
    assert errors > 0 or fault == "flush", "and the tier counted it"
    admin.close()


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(params=["full", "limit"])
def fill(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Callable[[NodeProcess, bool], None]]:
    """A folder, and what makes it full and empty again: the file system itself, or the process's limit on a file."""
    if request.param == "limit":

        def limit(node: NodeProcess, is_full: bool) -> None:
            _, hard = resource.prlimit(node.popen.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(node.popen.pid, resource.RLIMIT_FSIZE, (4096 if is_full else hard, hard))

        return tmp_path / "disk", limit
    folder = request.getfixturevalue("small_tmpfs")
    filler = folder / "filler"

    def full(node: NodeProcess, is_full: bool) -> None:
        filler.unlink(missing_ok=True)
        if not is_full:
            return
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass  # no room left, as wanted

    return folder / "disk", full


async def test_disk_is_full_during_a_request(
    relay: FaultRelay,
    requests: Requests,
    start_node: Callable[..., NodeProcess],
    fill: tuple[Path, Callable[[NodeProcess, bool], None]],
) -> None:
    """What it had it keeps; what it refuses goes to decode directly."""
    folder, set_full = fill
    node = start_node(*MEMORY, "--disk", str(folder), "--disk-bytes", "1GB")
    relay.target = node.address
    sizes = await bytes_by_phase(relay, requests, lambda is_warm: prepare(node, requests, is_warm))
    rounds = places(sizes[False, "up"], 12 if IS_DEEP else 3, random.Random(5))
    num_refused = 0
    for place in rounds:
        await prepare(node, requests, False)
        before = (await stats_of(node)).tiers[1].errors
        relay.arm("up", place, lambda: set_full(node, True))
        await requests.ask()
        relay.watch()
        disk = (await stats_of(node)).tiers[1]
        num_refused += disk.errors > before and disk.records < NUM_BLOCKS
        await requests.ask()  # with what there is, still full
        set_full(node, False)
    assert relay.fired >= num_refused >= 0.6 * len(rounds), "the control: records were refused in mid-request"
    await bytes_by_phase(relay, requests, lambda is_warm: prepare(node, requests, is_warm))  # in use again


@pytest.mark.timeout(1800 if IS_DEEP else 300)
async def test_cluster_node_is_lost_during_a_request(
    relay: FaultRelay, requests: Requests, tmp_path: Path, start_node: Callable[..., NodeProcess]
) -> None:
    """Stopped again and again, in the end killed: its share of the prefix is computed."""
    cluster = RedisCluster(tmp_path)
    try:
        node = start_node(*MEMORY, "--redis-cluster", ",".join(cluster.addresses))
        relay.target = node.address
        sizes = await bytes_by_phase(relay, requests, lambda is_warm: prepare(node, requests, is_warm))
        rng = random.Random(6)
        shares = []
        for one in cluster.nodes:
            with redis.Redis(port=one.port) as admin:
                shares.append(int(admin.dbsize()))
        assert sum(shares) == NUM_BLOCKS
        lost = cluster.nodes[shares.index(max(shares))]  # at least 4 blocks, of which memory has 2 at most
        rounds = [(phase, place) for phase in PHASES[:3] for place in places(sizes[phase], 8 if IS_DEEP else 1, rng)]
        num_met = 0
        for number, (phase, place) in enumerate([*rounds, ((True, "up"), sizes[True, "up"] // 2)]):
            is_last = number == len(rounds)
            await prepare(node, requests, phase[0])
            relay.arm(phase[1], place, lambda last=is_last: lost.signal(signal.SIGKILL if last else signal.SIGSTOP))
            before = await stats_of(node)
            await requests.ask()
            if relay.fired > num_met:
                num_met += 1
                answer = await requests.ask()  # and one that begins without that node
                assert answer.num_cached_tokens < NUM_BLOCKS * BLOCK_SIZE
                tier, old = (await stats_of(node)).tiers[1], before.tiers[1]
                assert tier.errors + tier.refused > old.errors + old.refused
            relay.watch()
            lost.signal(signal.SIGCONT)
            if not is_last:
                # Its own breaker: there is nothing to wait for but a block of its share.
                async with asyncio.timeout(LIMIT_S):
                    while (await requests.ask()).num_cached_tokens < NUM_BLOCKS * BLOCK_SIZE:
                        await asyncio.sleep(0.1)
        assert num_met >= 0.7 * len(rounds), "the control: it was lost in mid-request"
    finally:
        cluster.kill()
