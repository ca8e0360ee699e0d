"""Puts that are not committed yet: bounded bytes, nothing visible, nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvferry.kvstore.config import FRAME_BYTES
from kvferry.kvstore.errors import InvalidRequest, StoreFull


class StagedRecord:
    """The bytes of one put so far. Memory grows with what arrived, not with what was announced."""

    def __init__(self, key: bytes, record_bytes: int) -> None:
        self.key = key
        self._record_bytes = record_bytes
        self._received = 0
        self._chunks: list[bytes | memoryview] = []

    def append(self, chunk: bytes | memoryview) -> None:
        """Adds the next chunk. Raises InvalidRequest when it is too long or one too many."""
        if len(chunk) > FRAME_BYTES:
            raise InvalidRequest(f"a chunk must be at most {FRAME_BYTES} bytes, not {len(chunk)}")
        if self._received + len(chunk) > self._record_bytes:
            raise InvalidRequest(f"the put sent more than the {self._record_bytes} bytes it announced")
        self._received += len(chunk)
        self._chunks.append(chunk)

    def join(self) -> bytes:
        """The whole record, once all its bytes are here; else raises InvalidRequest."""
        if self._received != self._record_bytes:
            raise InvalidRequest(
                f"the put announced {self._record_bytes} bytes and committed after {self._received}; nothing was stored"
            )
        record = b"".join(self._chunks)
        self._chunks.clear()
        return record


class Staging:
    """Room for staged records, counted by their announced sizes."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0

    @property
    def staged_bytes(self) -> int:
        """Bytes reserved now."""
        return self._bytes

    @contextmanager
    def stage(self, key: bytes, record_bytes: int) -> Iterator[StagedRecord]:
        """Reserves room while the body runs, however it ends. Raises StoreFull without room."""
        self.reserve(record_bytes)
        try:
            yield StagedRecord(key, record_bytes)
        finally:
            self.release(record_bytes)

    def reserve(self, num_bytes: int) -> None:
        """The same until `release`. Raises StoreFull without room."""
        if self._bytes + num_bytes > self._max_bytes:
            raise StoreFull(
                f"{self._bytes} bytes of other puts are in progress and the node stages at most "
                f"{self._max_bytes}; put again later or raise max_staged_bytes"
            )
        self._bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        """Gives reserved room back."""
        self._bytes -= num_bytes
