"""The disk backend: records as files, least-recently-used eviction by bytes, survives a restart."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import heapq
import time
from collections import OrderedDict
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from kvferry.kvstore.backend import BackendStats, Entry, Page
from kvferry.kvstore.errors import StoreFull, StoreUnavailable
from kvferry.kvstore.io_threads import IoThreads
from kvferry.kvstore.lease import LeaseTable
from kvferry.kvstore.pins import DEFAULT_PINNED_SHARE, PinTable
from kvferry.kvstore.record_files import RecordFiles, file_name

_T = TypeVar("_T")

_DISK_BLOCK_BYTES = 4096
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(slots=True)
class _Stored:
    name: str
    num_bytes: int
    since: float  # wall clock; for listings only


@dataclass(slots=True)
class _Write:
    """A put under way. `wanted` turns False when the key is deleted meanwhile."""

    task: asyncio.Task[None]
    wanted: bool = True


class DiskBackend:
    """Keeps records as files under `folder`; opening it finds those of an earlier node again.

    `capacity_bytes` bounds the files, each rounded up to 4 KiB. When a put would pass it, records
    go, the least recently used first, until `low_watermark` of the capacity is used: one put pays
    for many. Leased and pinned records stay; pins are kept over a restart.

    The index is in memory, so `contains` does no I/O. All I/O runs in `num_threads` threads and is
    given up after `read_timeout_s` or `write_timeout_s`. A full disk refuses a put (StoreFull);
    what cannot be read is missing, and counted in `errors` or `corrupt`. Raises OSError when the folder
    cannot be used, FolderInUse when another node has it. Opening blocks for the scan, about 50 µs
    a record.
    """

    def __init__(
        self,
        folder: Path,
        *,
        capacity_bytes: int,
        leases: LeaseTable | None = None,
        low_watermark: float = 0.9,
        max_pinned_share: float = DEFAULT_PINNED_SHARE,
        num_threads: int = 2,
        max_waiting: int = 64,
        read_timeout_s: float = 0.8,
        write_timeout_s: float = 4.0,
    ) -> None:
        if capacity_bytes < 1:
            raise ValueError("capacity_bytes must be positive")
        if not 0 < low_watermark <= 1:
            raise ValueError(f"low_watermark must be over 0 and at most 1, not {low_watermark}")
        self._folder = folder
        self._capacity_bytes = capacity_bytes
        self._low_bytes = int(capacity_bytes * low_watermark)
        self._leases = leases if leases is not None else LeaseTable()
        self._pins = PinTable(capacity_bytes=capacity_bytes, max_share=max_pinned_share)
        self._read_timeout_s = read_timeout_s
        self._write_timeout_s = write_timeout_s
        self._index: OrderedDict[bytes, _Stored] = OrderedDict()  # oldest use first
        self._writes: dict[bytes, _Write] = {}
        self._bytes = 0  # of the index and of the writes under way
        self._evictions = self._hits = self._misses = self._corrupt = self._errors = 0
        self._pins_changed = asyncio.Lock()
        self._files = RecordFiles(folder)
        self._threads = IoThreads(num_threads=num_threads, max_waiting=max_waiting, name="kvstore-disk")
        self._open()

    @property
    def leases(self) -> LeaseTable:
        """The leases that keep records from eviction."""
        return self._leases

    @property
    def hands_out_verified(self) -> bool:
        """False: a file may have been damaged."""
        return False

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See Backend.get. Reads all of them in one job."""
        wanted = {key: stored for key in keys if (stored := self._index.get(key)) is not None}
        self._misses += len(keys) - len(wanted)
        if not wanted:
            return [None] * len(keys)
        found = await self._bounded(self._threads.run(partial(self._read, wanted)), self._read_timeout_s, "read")
        for key, stored in wanted.items():
            record = found[key]
            if isinstance(record, bytes):
                self._hits += 1
                continue
            self._misses += 1
            if record is None:
                self._corrupt += 1  # gone, cut or extended by somebody else
            else:
                self._errors += 1
            await self._forget(key, stored)
        return [record if isinstance(record := found.get(key), bytes) else None for key in keys]

    async def put(self, key: bytes, record: bytes) -> bool:
        """See Backend.put. Ends when the file has its name."""
        while (write := self._writes.get(key)) is not None:
            with contextlib.suppress(StoreFull, StoreUnavailable):  # another call's; this one tries for itself
                await self._bounded(asyncio.shield(write.task), self._write_timeout_s, "write")
            if key in self._index:
                return False
            if self._writes.get(key) is write:
                raise StoreUnavailable("another put of this record does not end; the disk is too slow")
        if key in self._index:
            return False
        if self._threads.is_full:  # before records are taken out for this one
            raise StoreUnavailable("too many disk operations are waiting; the disk is too slow")
        victims = self._make_room(_cost(len(record)))
        self._bytes += _cost(len(record))
        name = file_name(key, self._next_number)
        self._next_number += 1
        # A task of its own: a caller that goes away must not leave a file that the index does not know.
        task = asyncio.create_task(self._store(key, name, record, victims), name="kvstore-disk-put")
        task.add_done_callback(_seen)
        self._writes[key] = _Write(task)
        await self._bounded(asyncio.shield(task), self._write_timeout_s, "write")
        return True

    async def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """See Backend.contains. No I/O; the first key becomes the most recently used one."""
        for key in reversed(keys):
            if key in self._index:
                self._index.move_to_end(key)
        return [key in self._index for key in keys]

    async def delete(self, keys: Sequence[bytes] | None) -> int:
        """See Backend.delete. Removes leased and pinned records, too."""
        for key in self._writes if keys is None else keys:
            if (write := self._writes.get(key)) is not None:
                write.wanted = False
        gone = [stored for key in list(self._index if keys is None else keys) if (stored := self._drop(key))]
        if gone:
            await self._remove_files([stored.name for stored in gone])
        return len(gone)

    async def pin(self, keys: Sequence[bytes]) -> list[bool]:
        """See Backend.pin. Ends when the pins are on disk."""
        done = [
            key in self._index and self._pins.pin(key, _cost(self._index[key].num_bytes))
            for key in keys
        ]  # fmt: skip
        await self._keep_pins()
        return done

    async def unpin(self, keys: Sequence[bytes]) -> list[bool]:
        """See Backend.unpin."""
        done = [self._pins.unpin(key) for key in keys]
        await self._keep_pins()
        return done

    async def page(self, cursor: bytes, limit: int) -> Page:
        """See Backend.page. In the order of the keys; reads the head of each record of the page."""
        now = time.time()
        keys = heapq.nsmallest(limit + 1, (key for key in self._index if key > cursor))
        stored = [(key, self._index[key]) for key in keys[:limit]]

        def heads() -> list[bytes]:
            return [self._files.read_head(one.name) for _, one in stored]

        found = await self._bounded(self._threads.run(heads), self._write_timeout_s, "read")
        entries = [
            Entry(key, one.num_bytes, "disk", key in self._pins, max(0.0, now - one.since), head)
            for (key, one), head in zip(stored, found, strict=True)
        ]
        return Page(entries, keys[limit - 1] if len(keys) > limit else b"")

    async def stats(self) -> BackendStats:
        """See Backend.stats. Asks the disk, so that a probe notices whether it answers."""
        await self._bounded(self._threads.run(self._files.free_bytes), self._read_timeout_s, "read")
        return BackendStats(
            name="disk",
            records=len(self._index),
            bytes=self._bytes,
            capacity_bytes=self._capacity_bytes,
            evictions=self._evictions,
            pinned_bytes=self._pins.pinned_bytes,
            hits=self._hits,
            misses=self._misses,
            corrupt=self._corrupt,
            errors=self._errors,
        )

    async def close(self) -> None:
        """Waits for the puts under way, then lets go of the folder. The records stay."""
        tasks = [write.task for write in self._writes.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=self._write_timeout_s)
        self._threads.close()
        self._files.close()

    def keys(self) -> set[bytes]:
        """The keys that are present now."""
        return set(self._index)

    def holds(self, key: bytes) -> bool:
        """Whether the key is present or being written. Does not count as a use."""
        return key in self._index or key in self._writes

    def _open(self) -> None:
        try:
            scan = self._files.scan()
            pinned = self._files.read_pins()
        except BaseException:
            self._files.close()
            raise
        self._next_number = scan.next_number
        self._corrupt += scan.num_dropped + (pinned is None)
        for file in scan.files:
            self._index[file.key] = _Stored(file.name, file.num_bytes, file.used_at)
            self._bytes += _cost(file.num_bytes)
        for key in pinned or ():
            if key in self._index:
                self._pins.pin(key, _cost(self._index[key].num_bytes))
        if self._bytes > self._capacity_bytes:  # opened with less than before
            with contextlib.suppress(StoreFull):
                self._files.remove(self._make_room(0))

    def _make_room(self, cost: int) -> list[str]:
        """Takes victims out of the index; returns their files. Raises StoreFull and changes nothing."""
        if self._bytes + cost <= self._capacity_bytes:
            return []
        if cost > self._capacity_bytes:
            raise StoreFull(
                f"a record of {cost} bytes can never fit the disk tier's {self._capacity_bytes} bytes; give it more"
            )
        victims: list[bytes] = []
        left = self._bytes
        for key, stored in self._index.items():
            if left + cost <= min(self._low_bytes, self._capacity_bytes):
                break
            if not self._leases.is_pinned(key) and key not in self._pins:
                victims.append(key)
                left -= _cost(stored.num_bytes)
        if left + cost > self._capacity_bytes:
            raise StoreFull(
                "every record on disk that could make room is leased, pinned or being written; put again later, "
                "unpin records or give the disk tier more bytes"
            )
        self._evictions += len(victims)
        return [dropped.name for key in victims if (dropped := self._drop(key))]

    async def _store(self, key: bytes, name: str, record: bytes, victims: list[str]) -> None:
        try:
            await self._threads.run(partial(self._files.write, name, record, victims))
        except OSError as error:
            self._bytes -= _cost(len(record))
            if error.errno in _NO_ROOM:
                raise StoreFull(
                    f"the disk under {self._folder} is full; free space or give the disk tier fewer bytes"
                ) from error
            raise StoreUnavailable(f"cannot write under {self._folder}: {error.strerror}") from error
        except StoreUnavailable:
            self._bytes -= _cost(len(record))
            raise
        else:
            if self._writes[key].wanted:
                self._index[key] = _Stored(name, len(record), time.time())
            else:
                self._bytes -= _cost(len(record))
                await self._remove_files([name])
        finally:
            del self._writes[key]

    def _read(self, wanted: dict[bytes, _Stored]) -> dict[bytes, bytes | OSError | None]:
        found: dict[bytes, bytes | OSError | None] = {}
        for key, stored in wanted.items():
            try:
                found[key] = self._files.read(stored.name, stored.num_bytes)
            except OSError as error:
                found[key] = error
        return found

    def _drop(self, key: bytes) -> _Stored | None:
        stored = self._index.pop(key, None)
        if stored is not None:
            self._bytes -= _cost(stored.num_bytes)
            self._pins.unpin(key)
        return stored

    async def _forget(self, key: bytes, stored: _Stored) -> None:
        if self._index.get(key) is stored:
            self._drop(key)
            try:
                await self._remove_files([stored.name])
            except StoreUnavailable:
                self._errors += 1  # it is out of the index, that is enough

    async def _remove_files(self, names: Iterable[str]) -> None:
        try:
            await self._bounded(
                self._threads.run(partial(self._files.remove, names)), self._write_timeout_s, "delete from"
            )
        except OSError as error:
            # The index does not have them any more. After a restart they are found again, and are still
            # what their checksums say.
            raise StoreUnavailable(f"cannot delete under {self._folder}: {error.strerror}") from error

    async def _keep_pins(self) -> None:
        async with self._pins_changed:
            try:
                await self._bounded(
                    self._threads.run(partial(self._files.write_pins, list(self._pins))), self._write_timeout_s, "write"
                )
            except OSError as error:
                raise StoreUnavailable(f"cannot keep the pins under {self._folder}: {error.strerror}") from error

    async def _bounded(self, work: Awaitable[_T], timeout_s: float, action: str) -> _T:
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError as error:
            raise StoreUnavailable(f"the disk under {self._folder} did not {action} within {timeout_s} s") from error


def _cost(num_bytes: int) -> int:
    return -(-num_bytes // _DISK_BLOCK_BYTES) * _DISK_BLOCK_BYTES


def _seen(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # its caller may have gone; failures are counted
