"""The shared and surviving backend: records as plain Redis strings.

Only bytes are written and only bytes are read; whoever can write to this Redis can damage records
(the readers' checks find that) but cannot make any process load an object. Eviction is Redis's own:
run it with `maxmemory` and `maxmemory-policy allkeys-lru`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, OutOfMemoryError, RedisError, ResponseError

from kvferry.kvstore.backend import BackendStats
from kvferry.kvstore.config import DEFAULT_MAX_RECORD_BYTES
from kvferry.kvstore.errors import StoreFull, StoreUnavailable
from kvferry.kvstore.lease import LeaseTable

_KEYS_PER_COMMAND = 1024


class RedisBackend:
    """Keeps records in one Redis (or Valkey). Connects on first use; heals without a restart.

    Every operation ends within `op_timeout_s` (opening a connection within `connect_timeout_s`)
    and is tried once. `key_prefix` separates this store from other users of the database.
    """

    def __init__(
        self,
        url: str,
        *,
        key_prefix: bytes = b"kvferry:",
        connect_timeout_s: float = 0.2,
        op_timeout_s: float = 1.0,
        max_connections: int = 16,
        max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES,
    ) -> None:
        self._key_prefix = key_prefix
        self._op_timeout_s = op_timeout_s
        self._max_record_bytes = max_record_bytes
        self._place = _place(url)
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=max_connections,
            timeout=op_timeout_s,
            socket_connect_timeout=connect_timeout_s,
            socket_timeout=op_timeout_s,
            # redis-py retries by default, each time for a whole timeout.
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
        self._redis: Any = redis.asyncio.Redis.from_pool(pool)

    @property
    def leases(self) -> LeaseTable | None:
        """None: Redis evicts as it likes, so nothing can be promised."""
        return None

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See Backend.get. One round trip; a value over the limit comes back cut, so damaged."""
        async with self._errors_mapped("read"), self._redis.pipeline(transaction=False) as pipe:
            for key in keys:
                # GETRANGE, not GET: a foreign value of 512 MiB must not be loaded to be refused.
                pipe.getrange(self._name(key), 0, self._max_record_bytes)
            replies = await pipe.execute(raise_on_error=False)
        return [_value(reply) for reply in replies]

    async def put(self, key: bytes, record: bytes) -> bool:
        """See Backend.put."""
        async with self._errors_mapped("write"):
            return await self._redis.set(self._name(key), record, nx=True) is not None

    async def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """See Backend.contains. One round trip."""
        async with self._errors_mapped("read"), self._redis.pipeline(transaction=False) as pipe:
            for key in reversed(keys):  # the last one asked for is the most recently used
                pipe.exists(self._name(key))
            return [bool(reply) for reply in reversed(await pipe.execute())]

    async def delete(self, keys: Sequence[bytes] | None) -> int:
        """See Backend.delete. Deleting all scans the database; other prefixes stay."""
        deleted = 0
        if keys is None:
            async with self._errors_mapped("delete", timeout_s=None):
                batch: list[bytes] = []
                pattern = _escape_glob(self._key_prefix) + b"*"
                async for name in self._redis.scan_iter(match=pattern, count=_KEYS_PER_COMMAND):
                    batch.append(name)
                    if len(batch) == _KEYS_PER_COMMAND:
                        deleted += await self._redis.unlink(*batch)
                        batch = []
                if batch:
                    deleted += await self._redis.unlink(*batch)
            return deleted
        async with self._errors_mapped("delete"):
            return int(await self._redis.unlink(*map(self._name, keys)))

    async def stats(self) -> BackendStats:
        """See Backend.stats. Counts the whole database, other prefixes too.

        Where the ACL does not allow INFO and DBSIZE, the numbers are 0.
        """
        async with self._errors_mapped("read"), self._redis.pipeline(transaction=False) as pipe:
            pipe.dbsize()
            pipe.info("memory")
            pipe.info("stats")
            replies = await pipe.execute(raise_on_error=False)
            records, memory, counts = (None if isinstance(reply, NoPermissionError) else reply for reply in replies)
            for reply in (records, memory, counts):
                if isinstance(reply, Exception):
                    raise reply
        memory, counts = memory or {}, counts or {}
        return BackendStats(
            name="redis",
            records=int(records or 0),
            bytes=int(memory.get("used_memory", 0)),
            capacity_bytes=int(memory.get("maxmemory", 0)),
            evictions=int(counts.get("evicted_keys", 0)),
        )

    async def close(self) -> None:
        """Closes the connections. Does not touch the records."""
        await self._redis.aclose(close_connection_pool=True)

    def _name(self, key: bytes) -> bytes:
        return self._key_prefix + key

    @asynccontextmanager
    async def _errors_mapped(self, action: str, *, timeout_s: float | None = -1.0) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._op_timeout_s if timeout_s == -1.0 else timeout_s):
                yield
        except OutOfMemoryError as error:
            raise StoreFull(
                f"Redis at {self._place} is at its maxmemory; raise it or set maxmemory-policy allkeys-lru"
            ) from error
        except ResponseError as error:
            if str(error).startswith("MISCONF"):
                raise StoreFull(
                    f"Redis at {self._place} refuses writes because it cannot persist (is its "
                    "disk full?); free space or switch persistence off"
                ) from error
            raise StoreUnavailable(f"Redis at {self._place} refused to {action}: {type(error).__name__}") from error
        except (RedisError, TimeoutError, OSError) as error:
            raise StoreUnavailable(
                f"Redis at {self._place} does not answer ({type(error).__name__}); is it running?"
            ) from error


def _value(reply: Any) -> bytes | None:
    if isinstance(reply, ResponseError):
        # Something that is no string sits under the key: not a record. The node deletes it.
        if str(reply).startswith("WRONGTYPE"):
            return b""
        raise reply
    if isinstance(reply, Exception):
        raise reply
    return reply or None  # GETRANGE answers an empty string for a missing key


def _place(url: str) -> str:
    """Where the Redis is, without the password that a URL may hold."""
    parts = urlsplit(url)
    return parts.path if parts.scheme == "unix" else f"{parts.hostname}:{parts.port or 6379}"


def _escape_glob(prefix: bytes) -> bytes:
    return b"".join(b"\\" + bytes([c]) if c in b"*?[]\\^" else bytes([c]) for c in prefix)
