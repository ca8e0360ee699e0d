"""A block, or the tail, whose bytes come layer by layer while prefill computes it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Protocol


class Digest(Protocol):
    """hashlib's objects, or a `RecordDigest`."""

    def update(self, part: bytes, /) -> None: ...

    def digest(self) -> bytes: ...


class IncomingPieces:
    """Takes the pieces of one block, in order, and gives each layer to `load` as soon as it is whole.

    What was loaded counts only once `sealed` says that all of it is the block it should be. After a damaged piece, or
    a layer that `load` refuses with ValueError, nothing more is loaded, and `sealed` says no.
    """

    def __init__(self, layer_bytes: Sequence[int], digest: Digest, load: Callable[[int, bytearray], None]) -> None:
        """`layer_bytes`: of each layer; `load(layer, share)` may keep `share`."""
        self._layer_bytes = layer_bytes
        self._digest = digest
        self._load = load
        self._layer = 0
        self._num_received = 0
        self._share = bytearray()
        self.problem = ""
        """What is wrong with the bytes so far."""

    def append(self, offset: int, data: bytes, crc32: int) -> None:
        if self.problem:
            return
        try:
            self._append(offset, data, crc32)
        except ValueError as error:
            self.problem = str(error)

    def sealed(self, checksum: bytes) -> bool:
        """Whether every layer was loaded and all of them together have this checksum; see `problem` if not."""
        if not self.problem and self._layer < len(self._layer_bytes):
            self.problem = f"{self._layer} of {len(self._layer_bytes)} layers came"
        if not self.problem and self._digest.digest() != checksum:
            self.problem = "the pieces together are not the record"
        return not self.problem

    def _append(self, offset: int, data: bytes, crc32: int) -> None:
        if zlib.crc32(data) != crc32:
            raise ValueError("a piece is damaged")
        if offset != self._num_received or self._layer == len(self._layer_bytes):
            raise ValueError("a piece is out of place")
        size = self._layer_bytes[self._layer]
        if len(self._share) + len(data) > size:
            raise ValueError("a piece reaches into the next layer")
        self._num_received += len(data)
        self._digest.update(data)
        self._share += data
        if len(self._share) == size:
            share, self._share = self._share, bytearray()
            self._load(self._layer, share)
            self._layer += 1
