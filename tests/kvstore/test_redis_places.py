"""Redis in its other shapes, all of them real: a cluster of three, Sentinels, TLS, ACL users."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from support.processes import RedisProcess
from support.store_processes import RedisCluster, Sentinel, key_of, record_of, tls_front

from kvferry.kvstore import StoreFull, StoreUnavailable
from kvferry.kvstore.errors import InvalidRequest
from kvferry.kvstore.redis_backend import RedisBackend
from kvferry.kvstore.redis_cluster_backend import RedisClusterBackend
from kvferry.kvstore.redis_place import RedisPlace, RedisTls
from kvferry.kvstore.store_config import StoreConfig, make_backend

KEYS = [key_of(number) for number in range(40)]
# What docs/configuration.md says that a node's user needs.
COMMANDS = ["+get", "+getrange", "+set", "+unlink", "+scan", "+strlen"]
CLUSTER_COMMANDS = [*COMMANDS, "+cluster|slots"]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RedisCluster]:
    cluster = RedisCluster(tmp_path)
    yield cluster
    cluster.kill()


@asynccontextmanager
async def _cluster_backend(cluster: RedisCluster, **options: Any) -> AsyncIterator[RedisClusterBackend]:
    place = RedisPlace(cluster=cluster.addresses, **options.pop("place", {}))
    # Generous: two shared cores. What a lost node costs is counted in waits, not in seconds.
    backend = RedisClusterBackend(
        place, **{"op_timeout_s": 5.0, "lookup_timeout_s": 5.0, "connect_timeout_s": 2.0, **options}
    )
    yield backend
    await backend.close()


async def _all_pages(backend: Any, limit: int = 10) -> list[bytes]:
    cursor, keys = b"", []
    while True:
        page = await backend.page(cursor, limit)
        keys += [entry.key for entry in page.entries]
        cursor = page.next_cursor
        if not cursor:
            return keys


async def test_cluster_contract(cluster: RedisCluster) -> None:
    async with _cluster_backend(cluster) as backend:
        assert backend.leases is None and not backend.hands_out_verified
        for number in range(39):
            assert await backend.put(KEYS[number], record_of(number)) is True
        assert await backend.put(KEYS[0], record_of(1)) is False
        assert await backend.get(KEYS) == [*(record_of(number) for number in range(39)), None]
        assert await backend.contains(KEYS) == [True] * 39 + [False]
        for node in cluster.nodes:
            with redis.Redis(port=node.port) as admin:
                assert 0 < int(admin.dbsize()) < 39, "every node has its share"
        assert sorted(await _all_pages(backend)) == sorted(KEYS[:39])
        stats = await backend.stats()
        assert (stats.name, stats.records, stats.errors) == ("redis", 39, 0)
        assert await backend.delete(KEYS[:5]) == 5
        assert await backend.delete(None) == 34
        with pytest.raises(InvalidRequest):
            await backend.page(b"7:", 10)
        with pytest.raises(InvalidRequest):
            await backend.pin(KEYS[:1])


@pytest.mark.parametrize("way", ["stop", "kill"])
async def test_a_lost_cluster_node_is_misses_and_the_others_answer(cluster: RedisCluster, way: str) -> None:
    async with _cluster_backend(cluster, lookup_timeout_s=0.3, op_timeout_s=0.5, cool_down_s=0.2) as backend:
        for number in range(40):
            await backend.put(KEYS[number], record_of(number))
        lost = cluster.nodes[1]
        with redis.Redis(port=lost.port) as admin:
            num_lost = int(admin.dbsize())
        lost.signal(signal.SIGSTOP) if way == "stop" else lost.kill()
        present = await backend.contains(KEYS)
        assert present.count(False) == num_lost > 0
        errors = (await backend.stats()).errors
        assert errors == 1, "the one call that found it"
        for _ in range(20):
            assert await backend.contains(KEYS) == present
        records = await backend.get(KEYS)
        assert [record is not None for record in records] == present
        stats = await backend.stats()
        assert stats.refused > 20 and stats.records == 40 - num_lost
        missing = present.index(False)
        with pytest.raises(StoreUnavailable, match="cluster node"):
            await backend.put(KEYS[missing], record_of(missing))
        with pytest.raises(StoreUnavailable, match="not deleted"):
            await backend.delete(KEYS)
        if way == "kill":
            return
        lost.signal(signal.SIGCONT)
        async with asyncio.timeout(20):
            while await backend.contains(KEYS[missing : missing + 1]) != [True]:
                await asyncio.sleep(0.05)


async def test_a_moved_slot_is_found_again(cluster: RedisCluster) -> None:
    async with _cluster_backend(cluster) as backend:
        await backend.put(KEYS[0], record_of(0))
        slot = redis.crc.key_slot(b"kvferry:" + KEYS[0])
        admins = [redis.Redis(port=node.port) for node in cluster.nodes]
        try:
            source = next(i for i, admin in enumerate(admins) if admin.dbsize())
            target = (source + 1) % 3
            target_id = admins[target].execute_command("CLUSTER", "MYID")
            admins[source].delete(b"kvferry:" + KEYS[0])
            for admin in admins:
                admin.execute_command("CLUSTER", "SETSLOT", slot, "NODE", target_id)
            assert await backend.get(KEYS[:1]) == [None], "MOVED is a miss"
            async with asyncio.timeout(20):
                while True:
                    try:
                        assert await backend.put(KEYS[0], record_of(0)) is True
                        break
                    except StoreUnavailable:  # the picture of the slots is a second old at most
                        await asyncio.sleep(0.1)
            assert admins[target].dbsize() == 1
            assert await backend.get(KEYS[:1]) == [record_of(0)]
        finally:
            for admin in admins:
                admin.close()


async def test_no_cluster_node_at_all(tmp_path: Path) -> None:
    backend = RedisClusterBackend(RedisPlace(cluster=("127.0.0.1:1",)), op_timeout_s=0.5)
    for call in (backend.contains(KEYS), backend.get(KEYS), backend.stats()):
        with pytest.raises(StoreUnavailable, match="no node"):
            await call
    await backend.close()


async def test_a_cluster_found_later(tmp_path: Path) -> None:
    """The node may start before its cluster."""
    cluster = RedisCluster(tmp_path)
    try:
        for node in cluster.nodes:
            node.signal(signal.SIGSTOP)
        async with _cluster_backend(cluster, op_timeout_s=0.3, connect_timeout_s=0.1) as backend:
            with pytest.raises(StoreUnavailable):
                await backend.contains(KEYS)
            for node in cluster.nodes:
                node.signal(signal.SIGCONT)
            async with asyncio.timeout(20):
                while True:
                    try:
                        assert await backend.contains(KEYS[:1]) == [False]
                        break
                    except StoreUnavailable:
                        await asyncio.sleep(0.1)
    finally:
        cluster.kill()


async def test_sentinel_finds_the_master_and_its_successor(tmp_path: Path) -> None:
    master = RedisProcess(tmp_path)
    replica = RedisProcess(tmp_path, "--replicaof", "127.0.0.1", str(master.port))
    sentinel = Sentinel(tmp_path, master, "blocks")
    place = RedisPlace(sentinels=(f"127.0.0.1:{sentinel.port}",), service="blocks")
    backend = RedisBackend(place, op_timeout_s=5.0, connect_timeout_s=5.0)
    try:
        assert await backend.put(KEYS[0], record_of(0)) is True
        with redis.Redis(port=replica.port) as admin, redis.Redis(port=sentinel.port) as watch:
            async with asyncio.timeout(30):
                while not admin.dbsize() or not watch.execute_command("SENTINEL", "REPLICAS", "blocks"):
                    await asyncio.sleep(0.1)  # replicated, and the Sentinel knows the replica
        master.kill()
        with pytest.raises(StoreUnavailable):
            await backend.get(KEYS[:1])
        async with asyncio.timeout(60):
            while True:
                try:
                    assert await backend.put(KEYS[1], record_of(1)) is True
                    break
                except StoreUnavailable:
                    await asyncio.sleep(0.2)
        assert await backend.get(KEYS[:2]) == [record_of(0), record_of(1)]
        with redis.Redis(port=replica.port) as admin:
            assert admin.dbsize() == 2
    finally:
        await backend.close()
        for process in (sentinel, replica, master):
            process.kill()


async def test_tls_with_and_without_a_client_certificate(tmp_path: Path, shared_redis: Any) -> None:
    ca, cert, key = (str(tmp_path / name) for name in ("ca.pem", "client.pem", "client.key"))
    prefix = str(tmp_path).encode()
    async with tls_front(tmp_path, shared_redis.port, need_client=True) as port:

        async def stored(tls: RedisTls | None, url: str = f"rediss://127.0.0.1:{port}/0") -> bool:
            backend = RedisBackend(
                RedisPlace(url=url, tls=tls), key_prefix=prefix, op_timeout_s=5.0, connect_timeout_s=5.0
            )
            try:
                return await backend.put(KEYS[0], record_of(0)) and await backend.get(KEYS[:1]) == [record_of(0)]
            finally:
                await backend.close()

        assert await stored(RedisTls(ca=ca, cert=cert, key=key))
        with pytest.raises(StoreUnavailable):
            await stored(RedisTls(ca=ca))  # no client certificate
        with pytest.raises(StoreUnavailable):
            await stored(RedisTls(cert=cert, key=key))  # an authority that the system does not know
        with pytest.raises(StoreUnavailable):
            await stored(None, f"redis://127.0.0.1:{port}/0")  # plain text


def _restrict(port: int, commands: list[str]) -> None:
    with redis.Redis(port=port) as admin:
        admin.acl_setuser("app", enabled=True, passwords=["+hunter2"], keys=["kvferry:*"], commands=commands)


async def _fill_and_use(backend: Any) -> None:
    for number in range(20):
        assert await backend.put(KEYS[number], record_of(number)) is True
    assert await backend.get(KEYS[:20]) == [record_of(number) for number in range(20)]
    assert (await backend.contains(KEYS)).count(True) == 20
    assert sorted(await _all_pages(backend)) == sorted(KEYS[:20])
    await backend.stats()
    assert await backend.delete(KEYS[:1]) == 1
    assert await backend.delete(None) == 19


async def test_the_least_privileged_user_is_enough_and_gets_no_further(
    shared_redis: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _restrict(shared_redis.port, COMMANDS)
    caplog.set_level(logging.DEBUG)
    place = RedisPlace(url=shared_redis.url, user="app", password="hunter2")
    backend = make_backend(StoreConfig(memory_bytes=None, redis=place))
    await _fill_and_use(backend)
    await backend.close()
    other = RedisBackend(place, key_prefix=b"other:", op_timeout_s=5.0)
    for call in (other.put(KEYS[0], b"x"), other.get(KEYS[:1]), other.contains(KEYS[:1]), other.delete(KEYS[:1])):
        with pytest.raises(StoreUnavailable, match="NoPermission") as error:
            await call
        assert "hunter2" not in str(error.value)
    await other.close()
    with redis.Redis(port=shared_redis.port, username="app", password="hunter2") as client:
        for command in (("FLUSHALL",), ("CONFIG", "GET", "*"), ("KEYS", "*"), ("EVAL", "return 1", "0")):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)
    wrong = RedisBackend(RedisPlace(url=shared_redis.url, user="app", password="wr0ng"), op_timeout_s=5.0)
    with pytest.raises(StoreUnavailable) as error:
        await wrong.get(KEYS[:1])
    await wrong.close()
    for secret in ("hunter2", "wr0ng"):
        assert secret not in str(error.value) + caplog.text + repr(place)


async def test_the_least_privileged_user_of_a_cluster(cluster: RedisCluster) -> None:
    for node in cluster.nodes:
        _restrict(node.port, CLUSTER_COMMANDS)
    async with _cluster_backend(cluster, place={"user": "app", "password": "hunter2"}) as backend:
        await _fill_and_use(backend)
    async with _cluster_backend(cluster, place={"user": "app", "password": "hunter2"}, key_prefix=b"other:") as backend:
        with pytest.raises(StoreUnavailable, match="NoPermission"):
            await backend.put(KEYS[0], b"x")
        assert await backend.get(KEYS[1:2]) == [None]
        assert (await backend.stats()).errors >= 1


async def test_long_records_among_short_ones_and_bounded_round_trips(
    shared_redis: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [1000, 3_000_000, 10, 5_000_000, 1 << 20, 200]
    backend = RedisBackend(shared_redis.url, key_prefix=str(tmp_path).encode(), op_timeout_s=20.0)
    records = [record_of(number, size) for number, size in enumerate(sizes)]
    for key, record in zip(KEYS, records, strict=False):
        await backend.put(key, record)
    monkeypatch.setattr("kvferry.kvstore.redis_backend._BYTES_PER_ROUND_TRIP", 4_000_000)
    asked: list[int] = []
    real = backend._values

    async def counted(keys: Any, sizes: Any) -> Any:
        asked.append(sum(sizes))
        return await real(keys, sizes)

    monkeypatch.setattr(backend, "_values", counted)
    assert await backend.get(KEYS[:7]) == [*records, None]
    assert len(asked) == 3 and sum(asked) == sum(map(len, records))
    assert sorted(asked)[-2] <= 4_000_000, "only the record of 5 MB is over it, alone"
    await backend.delete(None)
    await backend.close()


async def test_a_full_cluster_node_is_store_full(tmp_path: Path) -> None:
    cluster = RedisCluster(tmp_path, "--maxmemory", "6mb", "--maxmemory-policy", "noeviction")
    try:
        async with _cluster_backend(cluster) as backend:
            with pytest.raises(StoreFull, match="maxmemory"):
                for number in range(40):
                    await backend.put(KEYS[number], record_of(number, 900_000))
            assert (await backend.stats()).errors == 0, "a full node is not a lost one"
    finally:
        cluster.kill()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"url": "http://x"},
        {"url": "redis://"},
        {"url": "redis://x", "cluster": ("x:1",)},
        {"cluster": ("x",)},
        {"cluster": ("x:0",)},
        {"cluster": (":1",)},
        {"sentinels": ("x:1",)},
        {"service": "s", "url": "redis://x"},
        {"url": "redis://x", "tls": RedisTls()},
        {"url": "rediss://x", "tls": RedisTls(key="k")},
        {"url": "redis://u:hunter2@x", "password": "hunter2"},
    ],
)
def test_impossible_places(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as error:
        RedisPlace(**options)
    assert "hunter2" not in str(error.value)
