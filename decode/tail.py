"""The tail of the incomplete block on its way to this worker."""

from __future__ import annotations

import hashlib

from kvferry.decode.pieces import IncomingPieces


class IncomingTail:
    """Takes a tail in pieces, layer by layer while prefill computes it, or in chunks after the handoff.

    Every method raises ValueError when the bytes are not the tail's.
    """

    def __init__(self, *, num_layers: int, tail_bytes: int) -> None:
        """`tail_bytes`: of all layers."""
        self._tail_bytes = tail_bytes
        self._buffer = bytearray()
        self._pieces = IncomingPieces([tail_bytes // num_layers] * num_layers, hashlib.sha256(), self._add_layer)
        self._is_whole = tail_bytes == 0

    @property
    def whole(self) -> bytes | None:
        """The tail, once all of it is here."""
        return bytes(self._buffer) if self._is_whole else None

    def append_chunk(self, chunk: bytes) -> None:
        self._buffer += chunk
        if len(self._buffer) > self._tail_bytes:
            raise ValueError("it is too long")
        self._is_whole = len(self._buffer) == self._tail_bytes

    def append_piece(self, offset: int, data: bytes, crc32: int) -> None:
        self._pieces.append(offset, data, crc32)
        if self._pieces.problem:
            raise ValueError(self._pieces.problem)

    def seal(self, checksum: bytes) -> None:
        """All pieces came."""
        if not self._pieces.sealed(checksum):
            raise ValueError(self._pieces.problem)
        self._is_whole = True

    def _add_layer(self, layer: int, share: bytearray) -> None:
        self._buffer += share
