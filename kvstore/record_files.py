"""Records as plain files of one folder. Blocking; every function may raise OSError.

    FOLDER/lock                         held while a node uses the folder
    FOLDER/pins                         keys of pinned records
    FOLDER/tmp/                         files being written; emptied on opening
    FOLDER/records/ab/abcd…-00000012    key in hex, then the number of the write

A record is written under `tmp/` and then renamed, so after a killed process each name in `records/`
has a whole file. After a power loss it may not (nothing is synced: this is a cache); the size in the
record's header and its checksum find that. Every write has a name of its own, so that removing an
evicted record cannot hit its successor.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kvferry.kvstore.backend import HEAD_BYTES
from kvferry.kvstore.codec import record_size
from kvferry.kvstore.key import KEY_BYTES

_NAME = re.compile(r"([0-9a-f]{64})-([0-9a-f]{8,16})")
_PINS_MAGIC = b"kvferry-pins\x01"
# A use is noted in the file's mtime, at most this often: the order survives a restart, roughly.
_TOUCH_AFTER_S = 60.0


class StoredFile(NamedTuple):
    """A record's file. `name` is relative to `records/`."""

    key: bytes
    name: str
    num_bytes: int
    used_at: float  # wall clock, for the order only


class Scan(NamedTuple):
    """What was in the folder."""

    files: list[StoredFile]  # oldest use first
    next_number: int
    num_dropped: int  # truncated, empty or doubled files, removed


class FolderInUse(OSError):
    """Another process keeps its records in this folder."""


class RecordFiles:
    """The files under `folder`, which this process owns until `close`. Raises OSError when it cannot."""

    def __init__(self, folder: Path) -> None:
        self._records = folder / "records"
        self._tmp = folder / "tmp"
        self._pins = folder / "pins"
        for path in (folder, self._records, self._tmp):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise FolderInUse(f"{folder} is in use by another store node; give each node its own folder") from error
        self._made: set[str] = set()

    def close(self) -> None:
        """Lets another process have the folder."""
        os.close(self._lock)

    def scan(self) -> Scan:
        """Finds the records and removes what cannot be one. Reads each file's header, no payload."""
        for leftover in self._tmp.iterdir():
            leftover.unlink()
        newest: dict[bytes, tuple[int, StoredFile]] = {}
        next_number = num_dropped = 0
        for part in os.scandir(self._records):
            if not part.is_dir(follow_symlinks=False) or len(part.name) != 2:
                continue
            self._made.add(part.name)
            for entry in os.scandir(part.path):
                match = _NAME.fullmatch(entry.name)
                if match is None or not entry.name.startswith(part.name):
                    continue  # not written here: left alone
                number = int(match[2], 16)
                next_number = max(next_number, number + 1)
                key = bytes.fromhex(match[1])
                file = _examine(entry, key, f"{part.name}/{entry.name}")
                if file is None:
                    num_dropped += 1
                    self.remove([f"{part.name}/{entry.name}"])
                    continue
                other = newest.get(key)
                if other is not None:
                    num_dropped += 1
                    loser = other[1] if other[0] < number else file
                    self.remove([loser.name])
                if other is None or other[0] < number:
                    newest[key] = (number, file)
        files = sorted((file for _, file in newest.values()), key=lambda file: file.used_at)
        return Scan(files, next_number, num_dropped)

    def write(self, name: str, record: bytes, remove: Iterable[str]) -> None:
        """Removes the files `remove`, then makes `name` visible in one step. Leaves nothing on failure."""
        self.remove(remove)
        part, _, base = name.partition("/")
        if part not in self._made:
            (self._records / part).mkdir(mode=0o700, exist_ok=True)
            self._made.add(part)
        temporary = self._tmp / base
        try:
            _write_whole(temporary, record)
            os.rename(temporary, self._records / name)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def read(self, name: str, num_bytes: int) -> bytes | None:
        """The file's bytes; None when it is not there or does not have `num_bytes` bytes."""
        try:
            file = os.open(self._records / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(file)
            if status.st_size != num_bytes:
                return None
            if time.time() - status.st_mtime > _TOUCH_AFTER_S:
                os.utime(file)
            parts = []
            while num_bytes > 0:
                part = os.read(file, num_bytes)
                if not part:
                    return None
                num_bytes -= len(part)
                parts.append(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        finally:
            os.close(file)

    def read_head(self, name: str) -> bytes:
        """The first HEAD_BYTES bytes; none when the file is not there."""
        try:
            with open(self._records / name, "rb", buffering=0) as file:
                return file.read(HEAD_BYTES) or b""
        except FileNotFoundError:
            return b""

    def remove(self, names: Iterable[str]) -> None:
        """Removes files; those that are not there are no error."""
        for name in names:
            (self._records / name).unlink(missing_ok=True)

    def write_pins(self, keys: Iterable[bytes]) -> None:
        """Replaces the list of pinned keys in one step."""
        body = _PINS_MAGIC + b"".join(keys)
        temporary = self._tmp / "pins"
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        _write_whole(temporary, body + hashlib.sha256(body).digest())
        os.rename(temporary, self._pins)

    def read_pins(self) -> list[bytes] | None:
        """The pinned keys; None when the list is damaged."""
        try:
            content = self._pins.read_bytes()
        except FileNotFoundError:
            return []
        body, digest = content[:-32], content[-32:]
        keys = body[len(_PINS_MAGIC) :]
        intact = hashlib.sha256(body).digest() == digest and body.startswith(_PINS_MAGIC)
        if not intact or len(keys) % KEY_BYTES:
            return None
        return [keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES)]

    def free_bytes(self) -> int:
        """What the file system has left."""
        status = os.statvfs(self._records)
        return status.f_bavail * status.f_frsize


def file_name(key: bytes, number: int) -> str:
    """Where the write with this number keeps the record, relative to `records/`."""
    text = key.hex()
    return f"{text[:2]}/{text}-{number:08x}"


def _examine(entry: os.DirEntry[str], key: bytes, name: str) -> StoredFile | None:
    """The file when its size is what its header says and its key is the name's."""
    try:
        if not entry.is_file(follow_symlinks=False):
            return None
        status = entry.stat(follow_symlinks=False)
        with open(entry.path, "rb", buffering=0) as file:
            head = file.read(HEAD_BYTES) or b""
    except OSError:
        return None
    if record_size(head, key) != status.st_size:
        return None
    return StoredFile(key, name, status.st_size, status.st_mtime)


def _write_whole(path: Path, content: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(file, left) :]
    finally:
        os.close(file)
