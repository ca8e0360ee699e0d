"""The Redis backend against a real server, and against one that answers errors on purpose."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis

from kvferry.kvstore import StoreFull, StoreUnavailable
from kvferry.kvstore.known_sizes import KNOWN_S, MAX_KEYS, KnownSizes
from kvferry.kvstore.redis_backend import RedisBackend

_KEYS = [bytes([number]) * 32 for number in range(12)]


@asynccontextmanager
async def _backend(url: str, **options: Any) -> AsyncIterator[RedisBackend]:
    backend = RedisBackend(url, **{"op_timeout_s": 5.0, **options})
    yield backend
    await backend.close()


@pytest.fixture
def prefix(tmp_path: Any) -> bytes:
    return str(tmp_path).encode() + b"*["  # glob characters, to be escaped


async def test_contract(shared_redis: Any, prefix: bytes) -> None:
    async with _backend(shared_redis.url, key_prefix=prefix) as backend:
        assert backend.leases is None
        assert await backend.get(_KEYS[:2]) == [None, None]
        assert await backend.put(_KEYS[0], b"one") is True
        assert await backend.put(_KEYS[0], b"two") is False
        assert await backend.put(_KEYS[2], bytes(range(256))) is True
        assert await backend.get(_KEYS[:3]) == [b"one", None, bytes(range(256))]
        assert await backend.contains(_KEYS[:3]) == [True, False, True]
        assert await backend.delete(_KEYS[:2]) == 1
        assert await backend.contains(_KEYS[:3]) == [False, False, True]


async def test_delete_all_leaves_other_prefixes(shared_redis: Any, prefix: bytes) -> None:
    async with (
        _backend(shared_redis.url, key_prefix=prefix) as mine,
        _backend(shared_redis.url, key_prefix=prefix[:-1] + b"x") as other,
    ):
        for key in _KEYS:
            await mine.put(key, b"mine")
        await other.put(_KEYS[0], b"other")
        assert await mine.delete(None) == len(_KEYS)
        assert await mine.delete(None) == 0
        assert await other.get(_KEYS[:1]) == [b"other"]
        assert await other.delete(None) == 1


async def test_stats(shared_redis: Any) -> None:
    async with _backend(shared_redis.url) as backend:
        stats = await backend.stats()
    assert stats.name == "redis"
    assert stats.bytes > 0
    assert stats.records >= 0 and stats.capacity_bytes == 0


async def test_foreign_values_come_back_bounded(shared_redis: Any, prefix: bytes) -> None:
    with redis.Redis(port=shared_redis.port) as admin:
        admin.set(prefix + _KEYS[0], bytes(1000))
        admin.rpush(prefix + _KEYS[1], "a list")
        admin.set(prefix + _KEYS[2], "good")
    async with _backend(shared_redis.url, key_prefix=prefix, max_record_bytes=100) as backend:
        cut, wrong_type, good = await backend.get(_KEYS[:3])
        assert cut is not None and len(cut) == 101, "one over the limit, so it is refused"
        assert wrong_type == b""
        assert good == b"good"


async def test_a_get_after_a_lookup_is_one_round_trip(shared_redis: Any, prefix: bytes) -> None:
    async with _backend(shared_redis.url, key_prefix=prefix) as backend:
        for number in range(3):
            await backend.put(_KEYS[number], bytes(100 + number))
        backend._known_sizes.clear()
        with redis.Redis(port=shared_redis.port) as admin:

            def asked() -> int:
                return int(admin.info("commandstats").get("cmdstat_strlen", {}).get("calls", 0))

            before = asked()
            assert await backend.contains(_KEYS[:4]) == [True, True, True, False]
            assert asked() == before + 4
            for _ in range(2):
                assert await backend.get(_KEYS[:3]) == [bytes(100), bytes(101), bytes(102)]
            assert asked() == before + 4
            assert await backend.get(_KEYS[2:4]) == [bytes(102), None]
            assert asked() == before + 5
            await backend.delete(_KEYS[:1])
            admin.delete(prefix + _KEYS[1])
            assert await backend.get(_KEYS[:3]) == [None, None, bytes(102)]
            assert asked() == before + 6
            admin.set(prefix + _KEYS[1], bytes(7))
            assert await backend.get(_KEYS[1:3]) == [bytes(7), bytes(102)]
            assert asked() == before + 7


async def test_what_a_lookup_says_of_a_foreign_type(shared_redis: Any, prefix: bytes) -> None:
    """It is there, so that the get finds it damaged and the node deletes it."""
    with redis.Redis(port=shared_redis.port) as admin:
        admin.rpush(prefix + _KEYS[0], "a list")
        admin.set(prefix + _KEYS[1], b"")
    async with _backend(shared_redis.url, key_prefix=prefix) as backend:
        assert await backend.contains(_KEYS[:2]) == [True, False]
        assert await backend.get(_KEYS[:2]) == [b"", None]


def test_sizes_are_known_for_a_while() -> None:
    now = 0.0
    sizes = KnownSizes(clock=lambda: now)
    sizes.learn(_KEYS[0], 5)
    assert (sizes.get(_KEYS[0]), sizes.get(_KEYS[1])) == (5, None)
    sizes.forget(_KEYS[0])
    sizes.forget(_KEYS[1])
    assert sizes.get(_KEYS[0]) is None
    sizes.learn(_KEYS[0], 6)
    now = KNOWN_S
    assert sizes.get(_KEYS[0]) is None
    for number in range(MAX_KEYS + 1):
        sizes.learn(number.to_bytes(32, "big"), 1)
    assert sizes.get(bytes(32)) is None and sizes.get((1).to_bytes(32, "big")) == 1
    sizes.clear()
    assert sizes.get((1).to_bytes(32, "big")) is None


async def test_full_redis_is_store_full(start_redis: Callable[..., Any]) -> None:
    process = start_redis("--maxmemory", "8mb", "--maxmemory-policy", "noeviction")
    async with _backend(process.url) as backend:
        with pytest.raises(StoreFull, match="maxmemory"):
            for number in range(20):
                await backend.put(bytes([number]) * 32, bytes(1 << 20))
        assert await backend.contains(_KEYS[:1]) == [True], "reads go on"


async def test_lru_redis_evicts(start_redis: Callable[..., Any]) -> None:
    process = start_redis("--maxmemory", "8mb", "--maxmemory-policy", "allkeys-lru")
    async with _backend(process.url) as backend:
        for number in range(20):
            assert await backend.put(bytes([number]) * 32, bytes(1 << 20))
        stats = await backend.stats()
        assert 0 < stats.evictions < 20
        assert stats.capacity_bytes == 8 << 20


async def test_stopped_redis_is_unavailable_in_time_and_heals(
    start_redis: Callable[..., Any],
) -> None:
    process = start_redis()
    async with _backend(process.url, op_timeout_s=0.2) as backend:
        await backend.put(_KEYS[0], b"record")
        process.signal(signal.SIGSTOP)
        for call in (backend.get, backend.contains, backend.delete):
            start = time.monotonic()
            with pytest.raises(StoreUnavailable, match="does not answer"):
                await call(_KEYS[:1])
            assert time.monotonic() - start < 3.0
        with pytest.raises(StoreUnavailable):
            await backend.put(_KEYS[1], b"record")
        with pytest.raises(StoreUnavailable):
            await backend.stats()
        process.signal(signal.SIGCONT)
        async with asyncio.timeout(10):
            while True:
                try:
                    assert await backend.get(_KEYS[:3]) is not None
                    break
                except StoreUnavailable:
                    await asyncio.sleep(0.05)


@asynccontextmanager
async def _erring_redis(reply: bytes) -> AsyncIterator[str]:
    """Answers every command with one error."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(reply * data.count(b"*"))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    yield f"redis://user:secret@127.0.0.1:{port}/0" if b"AUTH" in reply else (f"redis://127.0.0.1:{port}/0")
    server.close()


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        (b"-MISCONF Errors writing to the AOF file: No space left\r\n", StoreFull, "persist"),
        (b"-OOM command not allowed when used memory > 'maxmemory'\r\n", StoreFull, "maxmemory"),
        (b"-READONLY You can't write against a read only replica.\r\n", StoreUnavailable, "Read"),
        (b"-NOPERM no permissions to run this\r\n", StoreUnavailable, "NoPermission"),
        (b"-LOADING Redis is loading the dataset in memory\r\n", StoreUnavailable, "BusyLoading"),
        (b"-WRONGPASS invalid AUTH\r\n", StoreUnavailable, "127.0.0.1"),
        (b"nonsense\r\n", StoreUnavailable, "127.0.0.1"),
    ],
)
async def test_redis_errors_are_mapped(reply: bytes, kind: type[Exception], words: str) -> None:
    async with _erring_redis(reply) as url, _backend(url, op_timeout_s=1.0) as backend:
        with pytest.raises(kind, match=words) as error:
            await backend.put(_KEYS[0], b"record")
        assert "secret" not in str(error.value)


async def test_restricted_user_still_gets_stats(start_redis: Callable[..., Any]) -> None:
    process = start_redis()
    with redis.Redis(port=process.port) as admin:
        admin.acl_setuser(
            "app",
            enabled=True,
            passwords=["+secret"],
            keys=["kvferry:*"],
            commands=["+get", "+strlen", "+set", "+unlink"],
        )
    url = process.url.replace("127.0.0.1", "app:secret@127.0.0.1")
    async with _backend(url) as backend:
        assert await backend.put(_KEYS[0], b"record")
        assert await backend.get(_KEYS[:1]) == [b"record"]
        assert await backend.contains(_KEYS[:1]) == [True]
        assert (await backend.stats()).records == 0
        assert await backend.delete(_KEYS[:1]) == 1
    async with _backend(url, key_prefix=b"other:") as backend:
        with pytest.raises(StoreUnavailable, match="NoPermission"):
            await backend.put(_KEYS[0], b"record")
