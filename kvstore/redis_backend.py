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

from redis.exceptions import NoPermissionError, OutOfMemoryError, RedisError, ResponseError

from kvferry.kvstore.backend import HEAD_BYTES, BackendStats, Entry, Page
from kvferry.kvstore.config import DEFAULT_MAX_RECORD_BYTES, MIB
from kvferry.kvstore.errors import InvalidRequest, StoreFull, StoreUnavailable
from kvferry.kvstore.key import KEY_BYTES
from kvferry.kvstore.known_sizes import KnownSizes
from kvferry.kvstore.lease import LeaseTable
from kvferry.kvstore.redis_place import RedisPlace

_KEYS_PER_COMMAND = 1024
_BYTES_PER_ROUND_TRIP = 32 * MIB
_WRONG_TYPE = -1


class RedisBackend:
    """Keeps records in one Redis (or Valkey). Connects on first use; heals without a restart.

    Every operation ends within `op_timeout_s` (opening a connection within `connect_timeout_s`)
    and is tried once. `key_prefix` separates this store from other users of the database.
    """

    def __init__(
        self,
        place: str | RedisPlace,
        *,
        key_prefix: bytes = b"kvferry:",
        connect_timeout_s: float = 0.2,
        op_timeout_s: float = 1.0,
        max_connections: int = 16,
        max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES,
    ) -> None:
        if isinstance(place, str):
            place = RedisPlace(url=place)
        self._key_prefix = key_prefix
        self._op_timeout_s = op_timeout_s
        self._max_record_bytes = max_record_bytes
        self._known_sizes = KnownSizes()
        self._place = place.text
        self._redis: Any = place.connect(
            max_connections=max_connections, connect_timeout_s=connect_timeout_s, op_timeout_s=op_timeout_s
        )

    @property
    def leases(self) -> LeaseTable | None:
        """None: Redis evicts as it likes, so nothing can be promised."""
        return None

    @property
    def hands_out_verified(self) -> bool:
        """False: whoever writes to Redis may have damaged a record."""
        return False

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See Backend.get. A value over the limit comes back cut, so damaged.

        One round trip for the sizes, unless `contains` or `put` learned them a moment ago, then several records in
        each, _BYTES_PER_ROUND_TRIP at most. GETRANGE would bound them without the first one, but moves records at half
        of GET's speed.
        """
        records: list[bytes | None] = []
        async with self._errors_mapped("read"):
            sizes = await self._sizes(keys)
            while len(records) < len(keys):
                start, num_bytes = len(records), 0
                end = start
                while end < len(keys) and (end == start or num_bytes + sizes[end] <= _BYTES_PER_ROUND_TRIP):
                    num_bytes += min(sizes[end], self._max_record_bytes)
                    end += 1
                records += await self._values(keys[start:end], sizes[start:end])
        return records

    async def put(self, key: bytes, record: bytes) -> bool:
        """See Backend.put."""
        async with self._errors_mapped("write"):
            stored = await self._redis.set(self._name(key), record, nx=True) is not None
        if stored:
            self._known_sizes.learn(key, len(record))
        return stored

    async def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """See Backend.contains. One round trip; it asks for the sizes, so that a get need not, and an empty value is
        none."""
        async with self._errors_mapped("read"):
            # The last one asked for is the most recently used.
            sizes = await self._ask_sizes(keys[::-1])
        return [size != 0 for size in reversed(sizes)]

    async def delete(self, keys: Sequence[bytes] | None) -> int:
        """See Backend.delete. Deleting all scans the database; other prefixes stay."""
        if keys is None:
            self._known_sizes.clear()
            return await self._delete_all()
        for key in keys:
            self._known_sizes.forget(key)
        async with self._errors_mapped("delete"), self._redis.pipeline(transaction=False) as pipe:
            # One command a key: in a cluster the keys of one command must be in one slot.
            for key in keys:
                pipe.unlink(self._name(key))
            return sum(self._value(reply) or 0 for reply in await pipe.execute(raise_on_error=False))

    async def pin(self, keys: Sequence[bytes]) -> list[bool]:
        """Raises InvalidRequest: Redis evicts as it likes."""
        raise InvalidRequest("Redis evicts as it likes and cannot pin; give the node memory or a disk")

    async def unpin(self, keys: Sequence[bytes]) -> list[bool]:
        """Raises InvalidRequest: Redis evicts as it likes."""
        raise InvalidRequest("Redis evicts as it likes and cannot pin; give the node memory or a disk")

    async def page(self, cursor: bytes, limit: int) -> Page:
        """See Backend.page. In the order of SCAN; a page may have more entries than `limit`, or none."""
        try:
            position = int(cursor or b"0")
        except ValueError:
            raise InvalidRequest("the page token is not one of this node") from None
        async with self._errors_mapped("read"):
            pattern = _escape_glob(self._key_prefix) + b"*"
            position, names = await self._redis.scan(position, match=pattern, count=limit)
            names = [name for name in names if len(name) == len(self._key_prefix) + KEY_BYTES]
            async with self._redis.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.strlen(name)
                    pipe.getrange(name, 0, HEAD_BYTES - 1)
                replies = [self._value(reply) for reply in await pipe.execute(raise_on_error=False)]
        entries = [
            Entry(name[len(self._key_prefix) :], int(size), "redis", False, None, head or b"")
            for name, size, head in zip(names, replies[::2], replies[1::2], strict=True)
            if size
        ]
        return Page(entries, b"%d" % position if position else b"")

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
        # redis-py leaves the Sentinels' own connections open.
        sentinels = getattr(self._redis.connection_pool, "sentinel_manager", None)
        await self._redis.aclose(close_connection_pool=True)
        for one in sentinels.sentinels if sentinels is not None else ():
            await one.aclose(close_connection_pool=True)

    def _name(self, key: bytes) -> bytes:
        return self._key_prefix + key

    async def _sizes(self, keys: Sequence[bytes]) -> list[int]:
        """As `_ask_sizes`, of which it asks what is not known."""
        known = {key: self._known_sizes.get(key) for key in keys}
        unknown = [key for key, size in known.items() if size is None]
        if unknown:
            known.update(zip(unknown, await self._ask_sizes(unknown), strict=True))
        return [known[key] or 0 for key in keys]

    async def _ask_sizes(self, keys: Sequence[bytes]) -> list[int]:
        """Bytes of each value; 0 where there is none, _WRONG_TYPE where it is no string."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.strlen(self._name(key))
            replies = await pipe.execute(raise_on_error=False)
        sizes = [_WRONG_TYPE if _is_wrong_type(reply) else int(self._value(reply) or 0) for reply in replies]
        for key, size in zip(keys, sizes, strict=True):
            if size > 0:
                self._known_sizes.learn(key, size)
        return sizes

    async def _values(self, keys: Sequence[bytes], sizes: Sequence[int]) -> list[bytes | None]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for key, size in zip(keys, sizes, strict=True):
                if size > self._max_record_bytes:
                    # A foreign value of 512 MiB must not be loaded to be refused.
                    pipe.getrange(self._name(key), 0, self._max_record_bytes)
                elif size > 0:
                    pipe.get(self._name(key))
            replies = iter(await pipe.execute(raise_on_error=False))
        values: list[bytes | None] = []
        for key, size in zip(keys, sizes, strict=True):
            value: bytes | None = b"" if size == _WRONG_TYPE else None
            if size > 0:
                reply = next(replies)
                value = b"" if _is_wrong_type(reply) else self._value(reply) or None
            if value is None or len(value) != size:
                # It has gone, or is another one than when its size was asked.
                self._known_sizes.forget(key)
            values.append(value)
        return values

    async def _delete_all(self) -> int:
        deleted = 0
        async with self._errors_mapped("delete", timeout_s=None):
            batch: list[bytes] = []
            pattern = _escape_glob(self._key_prefix) + b"*"
            async for name in self._redis.scan_iter(match=pattern, count=_KEYS_PER_COMMAND):
                batch.append(name[len(self._key_prefix) :])
                if len(batch) == _KEYS_PER_COMMAND:
                    deleted += await self.delete(batch)
                    batch = []
            if batch:
                deleted += await self.delete(batch)
        return deleted

    def _value(self, reply: Any) -> Any:
        """A reply of a pipeline; raises it when it is an error."""
        if _is_wrong_type(reply):
            return None
        if isinstance(reply, Exception):
            raise reply
        return reply

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


def _is_wrong_type(reply: Any) -> bool:
    """Something that is no string sits under the key: not a record. The node deletes it."""
    return isinstance(reply, ResponseError) and str(reply).startswith("WRONGTYPE")


def _escape_glob(prefix: bytes) -> bytes:
    return b"".join(b"\\" + bytes([c]) if c in b"*?[]\\^" else bytes([c]) for c in prefix)
