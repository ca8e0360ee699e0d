"""The disk backend on a real file system: contract, eviction, restart, damage, a full and a failing disk."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.store_processes import NAMESPACE, key_of, record_of

from kvferry.kvstore import StoreFull, StoreUnavailable
from kvferry.kvstore.codec import decode_record, verify_record
from kvferry.kvstore.disk_backend import DiskBackend
from kvferry.kvstore.errors import BlockCorrupt
from kvferry.kvstore.lease import LeaseTable
from kvferry.kvstore.record_files import FolderInUse

Open = Callable[..., DiskBackend]
KEYS = [key_of(number) for number in range(40)]
SIZE = 100_000  # 25 disk blocks with its header


@pytest.fixture
def open_disk(tmp_path: Path) -> Iterator[Open]:
    """Opens the backend on the test's folder, as often as wanted; closing is the test's affair."""

    def make(capacity: int = 1 << 30, **options: Any) -> DiskBackend:
        return DiskBackend(tmp_path / "disk", capacity_bytes=capacity, **options)

    yield make


def _files(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "disk" / "records").glob("*/*"))


async def test_contract(open_disk: Open) -> None:
    disk = open_disk()
    first, second = record_of(0), record_of(1)
    assert disk.leases is not None and not disk.hands_out_verified
    assert await disk.get(KEYS[:2]) == [None, None]
    assert await disk.put(KEYS[0], first) is True
    assert await disk.put(KEYS[0], second) is False
    assert await disk.put(KEYS[2], record_of(2, 3_000_000)) is True
    assert await disk.get(KEYS[:3]) == [first, None, record_of(2, 3_000_000)]
    assert await disk.contains(KEYS[:3]) == [True, False, True]
    stats = await disk.stats()
    assert (stats.name, stats.records, stats.hits, stats.misses) == ("disk", 2, 2, 3)
    assert stats.bytes == 4096 + 3_002_368 and stats.capacity_bytes == 1 << 30
    assert await disk.delete(KEYS[:2]) == 1
    assert await disk.delete(None) == 1
    assert await disk.contains(KEYS[:3]) == [False] * 3
    assert (await disk.stats()).bytes == 0
    await disk.close()


async def test_records_pins_and_order_survive_a_restart(open_disk: Open, tmp_path: Path) -> None:
    disk = open_disk()
    for number in range(6):
        await disk.put(KEYS[number], record_of(number, SIZE))
    assert await disk.pin(KEYS[:1]) == [True]
    await disk.close()
    for age, path in enumerate(_files(tmp_path)):
        number = KEYS.index(bytes.fromhex(path.name[:64]))
        os.utime(path, (0, 1000 + number + (1000 if number == 2 else 0) + 0 * age))  # 2 was used last
    disk = open_disk(capacity=6 * 106_496)
    assert await disk.get(KEYS[:6]) == [record_of(number, SIZE) for number in range(6)]
    await disk.put(KEYS[6], record_of(6, SIZE))
    # 0 is pinned; 1 and 3 are the oldest of the others. Down to 90 % of six records: two must go.
    assert await disk.contains(KEYS[:7]) == [True, False, True, False, True, True, True]
    assert (await disk.stats()).pinned_bytes == 102_400
    await disk.close()


async def test_a_put_evicts_down_to_the_low_watermark(open_disk: Open, tmp_path: Path) -> None:
    disk = open_disk(capacity=10 * 102_400, low_watermark=0.5)
    for number in range(10):
        await disk.put(KEYS[number], record_of(number, SIZE))
    assert (await disk.stats()).evictions == 0
    await disk.contains(KEYS[:1])  # a use
    await disk.put(KEYS[10], record_of(10, SIZE))
    assert await disk.contains(KEYS[:11]) == [True, *[False] * 6, *[True] * 4]
    stats = await disk.stats()
    assert (stats.evictions, stats.records, stats.bytes) == (6, 5, 5 * 102_400)
    assert len(_files(tmp_path)) == 5, "the files are gone, too"
    await disk.close()


async def test_leased_and_pinned_records_stay(open_disk: Open) -> None:
    leases = LeaseTable()
    disk = open_disk(capacity=4 * 102_400, leases=leases, low_watermark=0.5)
    for number in range(4):
        await disk.put(KEYS[number], record_of(number, SIZE))
    leases.grant(KEYS[:1], 60)
    assert await disk.pin(KEYS[1:4]) == [True, True, False], "half of the capacity may be pinned"
    assert await disk.pin(KEYS[9:10]) == [False], "not there"
    await disk.put(KEYS[4], record_of(4, SIZE))
    assert await disk.contains(KEYS[:5]) == [True, True, True, False, True]
    leases.grant(KEYS[4:5], 60)
    with pytest.raises(StoreFull, match="leased, pinned"):
        await disk.put(KEYS[5], record_of(5, SIZE))
    assert await disk.contains(KEYS[:5]) == [True, True, True, False, True], "nothing was changed"
    assert await disk.unpin(KEYS[:3]) == [False, True, True]
    assert await disk.put(KEYS[5], record_of(5, SIZE))
    with pytest.raises(StoreFull, match="can never fit"):
        await disk.put(KEYS[6], record_of(6, 5 * 102_400))
    assert await disk.delete(None) == 3, "leased ones, too"
    await disk.close()


async def test_opening_with_less_evicts(open_disk: Open, tmp_path: Path) -> None:
    disk = open_disk()
    for number in range(8):
        await disk.put(KEYS[number], record_of(number, SIZE))
    await disk.close()
    disk = open_disk(capacity=4 * 102_400)
    assert (await disk.stats()).records == len(_files(tmp_path)) == 3
    await disk.close()


async def test_a_folder_has_one_owner(open_disk: Open, tmp_path: Path) -> None:
    disk = open_disk()
    with pytest.raises(FolderInUse, match="another store node"):
        open_disk()
    await disk.close()
    await open_disk().close()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        DiskBackend(tmp_path / "file", capacity_bytes=1)


async def test_concurrent_puts_of_one_key(open_disk: Open, tmp_path: Path) -> None:
    disk = open_disk()
    for number in range(5):
        outcomes = await asyncio.gather(*(disk.put(KEYS[number], record_of(number, 500_000)) for _ in range(4)))
        assert sorted(outcomes) == [False, False, False, True]
    assert len(_files(tmp_path)) == 5
    await disk.close()


async def test_a_delete_during_a_put_wins(open_disk: Open, tmp_path: Path) -> None:
    disk = open_disk()
    put = asyncio.create_task(disk.put(KEYS[0], record_of(0, 3_000_000)))
    await asyncio.sleep(0)
    await disk.delete(None)
    await put
    assert await disk.contains(KEYS[:1]) == [False]
    assert (await disk.stats()).bytes == 0 and _files(tmp_path) == []
    await disk.close()


async def test_every_truncation_and_any_flip_is_found(open_disk: Open, tmp_path: Path) -> None:
    """Truncated files when they are read or found; flipped bits by the record's checksum, never before it."""
    disk = open_disk()
    record = record_of(0, 64)
    for length in range(len(record)):
        await disk.put(KEYS[0], record)
        (path,) = _files(tmp_path)
        os.truncate(path, length)
        assert await disk.get(KEYS[:1]) == [None]
        assert await disk.contains(KEYS[:1]) == [False] and _files(tmp_path) == []
    assert (await disk.stats()).corrupt == len(record)
    await disk.close()
    rng = random.Random(1)
    found_at_opening = found_by_the_checksum = 0
    for _ in range(60):
        disk = open_disk()
        await disk.put(KEYS[0], record)
        await disk.close()
        (path,) = _files(tmp_path)
        damaged = bytearray(record)
        damaged[rng.randrange(len(record))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        disk = open_disk()
        if await disk.contains(KEYS[:1]) == [False]:
            found_at_opening += 1
            assert (await disk.stats()).corrupt == 1 and not path.exists()
        else:
            (read,) = await disk.get(KEYS[:1])
            assert read is not None
            with pytest.raises(BlockCorrupt):
                verify_record(read, KEYS[0])
            found_by_the_checksum += 1
        await disk.delete(None)
        await disk.close()
    assert found_at_opening > 0 and found_by_the_checksum > 0


async def test_what_lies_around_is_dropped_or_left_alone(open_disk: Open, tmp_path: Path) -> None:
    disk = open_disk()
    for number in range(3):
        await disk.put(KEYS[number], record_of(number))
    await disk.pin(KEYS[:1])
    await disk.close()
    first, second, _ = _files(tmp_path)
    os.truncate(first, 50)
    (tmp_path / "disk" / "tmp" / "torn").write_bytes(b"half a record")
    foreign = second.parent / "notes.txt"
    foreign.write_text("not ours")
    older = second.with_name(second.name[:65] + "00000000")  # of an evicted record whose removal failed
    number = int(second.name[65:], 16)
    second.rename(second.with_name(f"{second.name[:65]}{number + 7:08x}"))
    second = second.with_name(f"{second.name[:65]}{number + 7:08x}")
    older.write_bytes(second.read_bytes())
    other = key_of(99).hex()
    swapped = tmp_path / "disk" / "records" / other[:2] / f"{other}-00000001"
    swapped.parent.mkdir(exist_ok=True)
    swapped.write_bytes(second.read_bytes())  # a genuine record under another key
    pins = tmp_path / "disk" / "pins"
    pins.write_bytes(pins.read_bytes()[:-1])
    disk = open_disk()
    stats = await disk.stats()
    assert stats.records == 2
    assert stats.corrupt == 4, "the truncated one, the doubled one, the swapped one, the list of pins"
    assert stats.pinned_bytes == 0
    assert foreign.read_text() == "not ours" and not swapped.exists() and not older.exists()
    assert list((tmp_path / "disk" / "tmp").iterdir()) == []
    await disk.close()


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB; skipped where this user may not mount."""
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_a_full_disk_refuses_puts_and_reads_on(small_tmpfs: Path) -> None:
    disk = DiskBackend(small_tmpfs / "disk", capacity_bytes=1 << 30)
    stored = []
    with pytest.raises(StoreFull, match="is full") as caught:
        for number in range(20):
            await disk.put(KEYS[number], record_of(number, 1_000_000))
            stored.append(number)
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOSPC
    assert 5 <= len(stored) <= 8
    assert await disk.get(KEYS[: len(stored)]) == [record_of(number, 1_000_000) for number in stored]
    assert list((small_tmpfs / "disk" / "tmp").iterdir()) == [], "no half file takes the rest"
    assert await disk.delete(KEYS[:1]) == 1
    assert await disk.put(KEYS[30], record_of(30, 900_000)), "room again"
    assert (await disk.stats()).bytes < 8 << 20
    await disk.close()


async def test_read_and_write_errors_are_a_miss_and_a_refusal(open_disk: Open, tmp_path: Path) -> None:
    disk = open_disk()
    await disk.put(KEYS[0], record_of(0))
    await disk.put(KEYS[1], record_of(1))
    path = next(path for path in _files(tmp_path) if path.name.startswith(KEYS[0].hex()))
    path.unlink()
    path.symlink_to(tmp_path)  # opening it fails with ELOOP: a real error of the system
    assert await disk.get(KEYS[:2]) == [None, record_of(1)]
    stats = await disk.stats()
    assert (stats.records, stats.errors) == (1, 1)
    (tmp_path / "disk" / "tmp").rmdir()
    with pytest.raises(StoreUnavailable, match="cannot write"):
        await disk.put(KEYS[2], record_of(2))
    assert await disk.contains(KEYS[2:3]) == [False]
    await disk.close()


async def test_a_slow_disk_stalls_nobody(open_disk: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads and writes that hang: the loop runs on, calls end in time, and the line is bounded."""
    disk = open_disk(num_threads=1, max_waiting=2, read_timeout_s=0.2, write_timeout_s=0.2)
    await disk.put(KEYS[0], record_of(0))
    hang = threading.Event()
    real = os.open

    def hanging(path: Any, *arguments: Any, **options: Any) -> int:
        if "disk" in str(path):
            hang.wait(30)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", hanging)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticker = asyncio.create_task(tick())
    with pytest.raises(StoreUnavailable, match="did not read"):
        await disk.get(KEYS[:1])
    with pytest.raises(StoreUnavailable, match="did not write"):
        await disk.put(KEYS[1], record_of(1))
    with pytest.raises(StoreUnavailable, match="too slow"):
        await disk.put(KEYS[2], record_of(2))
    with pytest.raises(StoreUnavailable, match="waiting already"):
        await disk.get(KEYS[:1])
    assert ticks > 5, "the event loop went on"
    assert await disk.contains(KEYS[:1]) == [True]
    hang.set()
    async with asyncio.timeout(10):
        while await disk.contains(KEYS[1:2]) != [True]:  # the write that was given up ends well
            await asyncio.sleep(0.02)
    assert await disk.get(KEYS[:3]) == [record_of(0), record_of(1), None]
    ticker.cancel()
    await disk.close()


async def test_listing(open_disk: Open) -> None:
    disk = open_disk()
    for number in range(25):
        await disk.put(KEYS[number], record_of(number, 5000))
    await disk.pin(KEYS[3:4])
    cursor, entries = b"", []
    while True:
        page = await disk.page(cursor, 10)
        assert len(page.entries) <= 10
        entries += page.entries
        cursor = page.next_cursor
        if not cursor:
            break
    assert [entry.key for entry in entries] == sorted(KEYS[:25])
    assert [entry.key for entry in entries if entry.pinned] == [KEYS[3]]
    assert all(entry.tier == "disk" and entry.age_s is not None and entry.age_s < 300 for entry in entries)
    assert all(entry.head == record_of(KEYS.index(entry.key), 5000)[:256] for entry in entries)
    await disk.close()


def _kill_during_puts(tmp_path: Path, start_writer: Callable[..., Any], *, num_kills: int, seed: int) -> int:
    """Kills a writer again and again; what it said is stored must be readable, and whatever is readable must verify.

    Returns how many records were there at the end.
    """
    rng = random.Random(seed)
    folder = tmp_path / "disk"
    torn = 0
    for round_number in range(num_kills):
        writer = start_writer(folder, round_number * 100_000)
        writer.wait_for_line("stored")
        time.sleep(rng.random() * 0.15)
        deadline = time.monotonic() + 5
        while round_number % 2 and not os.listdir(folder / "tmp") and time.monotonic() < deadline:
            pass  # every other kill waits for a write to be under way
        writer.kill()
        said = [int(line.split()[1]) for line in writer.log.read_text().splitlines() if line.startswith("stored ")]
        torn += len(list((folder / "tmp").iterdir()))

        async def check(said: list[int] = said) -> int:
            disk = DiskBackend(folder, capacity_bytes=64 << 20)
            # At most 3.2 MB each, 8 more under way: so many cannot have been evicted again.
            recent = [key_of(number) for number in said[-6:]]
            assert await disk.contains(recent) == [True] * len(recent), "it was stored before the kill"
            keys = sorted(disk.keys())
            for key in keys:
                (record,) = await disk.get([key])
                assert record is not None
                decode_record(record, expected_key=key, expected_namespace=NAMESPACE)
            stats = await disk.stats()
            assert stats.bytes <= 64 << 20
            assert stats.corrupt == 0, "a kill leaves no half file under a record's name"
            await disk.close()
            return len(keys)

        num_records = asyncio.run(check())
        assert num_records > 0
    assert torn > 0, "the control: kills hit writes under way"
    return num_records


def test_kill_during_puts(tmp_path: Path, start_writer: Callable[..., Any]) -> None:
    num_kills = 60 if "KVFERRY_DEEP" in os.environ else 10
    assert _kill_during_puts(tmp_path, start_writer, num_kills=num_kills, seed=1) > 0
