"""Puts the frames of a Get together into records, trusting nothing that the node says."""

from __future__ import annotations

from kvferry.kvstore.errors import BlockCorrupt, BlockNotFound, InvalidRequest
from kvferry.kvstore.frames import GetChunk


class RecordAssembler:
    """Takes frames in order. Memory grows with the bytes received, up to `max_record_bytes`."""

    def __init__(self, *, num_keys: int, max_record_bytes: int) -> None:
        self._num_keys = num_keys
        self._max_record_bytes = max_record_bytes
        self._index = 0
        self._record_bytes = 0
        self._received = 0
        self._chunks: list[bytes | memoryview] = []

    def add(self, frame: GetChunk) -> bytes | memoryview | None:
        """The record that this frame completes, or None while it is incomplete.

        Raises BlockNotFound for a missing key, InvalidRequest for a record over the limit and
        BlockCorrupt for frames that do not fit together.
        """
        if frame.block != self._index or self._index >= self._num_keys:
            raise BlockCorrupt("the node sent frames of another block than the one that is due")
        if frame.missing:
            raise BlockNotFound(
                f"block {self._index} of {self._num_keys} is not in the store; recompute from it",
                index=self._index,
            )
        if not self._chunks:
            self._record_bytes = frame.record_bytes
            if self._record_bytes > self._max_record_bytes:
                raise InvalidRequest(
                    f"the stored record has {self._record_bytes} bytes, over this client's "
                    f"max_record_bytes = {self._max_record_bytes}"
                )
        if not frame.chunk:
            raise BlockCorrupt("the node sent an empty frame")
        self._received += len(frame.chunk)
        if self._received > self._record_bytes:
            raise BlockCorrupt("the node sent more bytes than it announced")
        self._chunks.append(frame.chunk)
        if self._received < self._record_bytes:
            return None
        record = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._index += 1
        self._received = 0
        self._chunks = []
        return record
