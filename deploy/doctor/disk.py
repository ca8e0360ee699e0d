"""The disk tier's folders, and the place where Ray keeps its sockets and logs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from kvferry.deploy.doctor.finding import Finding, gib, problem, warning
from kvferry.deploy.settings import Settings

NETWORK = ("9p", "ceph", "cifs", "fuse", "glusterfs", "lustre", "nfs", "nfs4", "smb3")
MEMORY = ("ramfs", "tmpfs")
FULL_BYTES = 64 << 20
"""Less free room than this: no record fits for long."""
RAY_BYTES = 1 << 30


def disk_findings(settings: Settings) -> Iterator[Finding]:
    disk = settings.store.disk
    if disk is not None and not settings.store.nodes:
        for index in range(settings.store.count):
            config = settings.store.store_config(index).disk if settings.store.redis is None else None
            folder = config.folder if config else disk.path.expanduser()
            yield from check_folder(folder, disk.bytes)
    temporary = Path(tempfile.gettempdir())
    free = shutil.disk_usage(temporary).free
    if free < RAY_BYTES:
        yield warning("temporary files", f"{gib(free)} free in {temporary}", "Ray's logs may fill it: set TMPDIR")
    else:
        yield Finding("temporary files", f"{gib(free)} free in {temporary}")


def check_folder(folder: Path, wanted_bytes: int) -> Iterator[Finding]:
    """A folder of records that may take `wanted_bytes`."""
    topic = f"disk tier {folder}"
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        yield problem(topic, f"{place} is no folder", "choose another store.disk.path")
        return
    if error := _write_error(place, is_ours=place == folder):
        yield problem(
            topic, f"not writable: {error}", f"let this user write to {place}, or choose another store.disk.path"
        )
        return
    kind = _filesystem(place)
    free, used = shutil.disk_usage(place).free, _size(folder)
    room = free + used
    value = f"{kind}, {gib(free)} free, {gib(used)} of {gib(wanted_bytes)} used"
    if free < FULL_BYTES and used < wanted_bytes:
        yield problem(topic, value, "it is full: records are refused; make room or choose another store.disk.path")
    elif room < wanted_bytes:
        yield warning(
            topic, value, f"it fills up before store.disk.bytes is reached: set it to {gib(room * 0.9)} or less"
        )
    elif kind in MEMORY:
        yield warning(topic, value, "that is memory, and gone after a restart: use store.memory, or a real disk")
    elif kind.split(".")[0] in NETWORK:
        yield warning(topic, value, "a network's pauses are the tier's: a local disk is better, Redis for sharing")
    else:
        yield Finding(topic, value)


def _write_error(folder: Path, *, is_ours: bool) -> str:
    """Empty when a file can be written there. Into a folder that is not the tier's, nothing is written."""
    if not is_ours:
        return "" if os.access(folder, os.W_OK | os.X_OK) else "permission denied"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # A full disk is told by its free room.
        return "" if error.errno in (28, 122) else (error.strerror or type(error).__name__)
    return ""


def _filesystem(folder: Path) -> str:
    path = str(folder.resolve())
    mounts = [m for m in psutil.disk_partitions(all=True) if Path(path).is_relative_to(m.mountpoint)]
    return max(mounts, key=lambda m: len(m.mountpoint)).fstype if mounts else "unknown"


def _size(folder: Path) -> int:
    """Of the records there: files in one level of folders, as the tier lays them out."""
    total = 0
    for path in folder.rglob("*") if folder.is_dir() else ():
        try:
            total += path.stat().st_blocks * 512 if path.is_file() else 0
        except OSError:  # evicted meanwhile
            continue
    return total
