"""Blocks on their way to decode while they are computed: layer by layer, as slices of their payload."""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from typing import Protocol

from kvferry.kvstore.codec import Buffer, RecordDigest
from kvferry.prefill.prompt_blocks import PromptBlocks

PIECE_BYTES = 256 * 1024
"""Most bytes of a piece, and about the most of a message of pieces: what a handoff may have to wait for."""


class _Digest(Protocol):
    def update(self, part: Buffer, /) -> None: ...

    def digest(self) -> bytes: ...


@dataclass(frozen=True)
class Piece:
    """Bytes [offset, offset + len(data)) of a block's payload, or of the tail."""

    index: int
    offset: int
    data: bytes

    @property
    def crc32(self) -> int:
        return zlib.crc32(self.data)


@dataclass(frozen=True)
class Seal:
    """All pieces of a block are sent; its record has this checksum."""

    index: int
    checksum: bytes


class _Outgoing:
    """One block: how far it is packed, and how far it is cut into pieces."""

    def __init__(self, blocks: PromptBlocks, index: int, digest: _Digest) -> None:
        self._index = index
        self._num_layers = blocks.layout.num_layers
        self._pieces = self._cut(blocks, digest)
        self.num_ready = 0
        """Layers that are packed."""
        self._num_cut = 0

    @property
    def has_next(self) -> bool:
        return self._num_cut < self.num_ready

    def next(self) -> Piece | Seal:
        return next(self._pieces)

    def close(self) -> None:
        """Lets the blocks go: the generator and this object hold each other."""
        self._pieces.close()

    def _cut(self, blocks: PromptBlocks, digest: _Digest) -> Generator[Piece | Seal]:
        offset = 0
        for layer in range(self._num_layers):
            share = blocks.layer_share(self._index, layer)
            digest.update(share)
            for begin in range(0, len(share), PIECE_BYTES):
                data = bytes(share[begin : begin + PIECE_BYTES])
                last = begin + PIECE_BYTES >= len(share)
                if last and layer + 1 < self._num_layers:
                    self._num_cut += 1
                yield Piece(self._index, offset, data)
                offset += len(data)
        self._num_cut += 1
        yield Seal(self._index, digest.digest())


class PieceQueue:
    """The pieces of one request's blocks, in the order in which they can go. Lives on one event loop.

    It holds no bytes: what waits is named by layer, and copied out of the request's blocks when it is taken. So a
    receiver that is slow holds up nobody, and costs no memory but that of its own blocks, which are there anyway.
    """

    def __init__(self, blocks: PromptBlocks, wanted: Collection[int], digest_of: Callable[[int], RecordDigest]) -> None:
        """`wanted`: block indices; the tail goes, too. `digest_of` starts the checksum of a block's record."""
        self._blocks = blocks
        self._wanted = frozenset(wanted)
        self._digest_of = digest_of
        self._outgoing: dict[int, _Outgoing] = {}
        self._started: set[int] = set()
        self._ready = asyncio.Event()

    def covers(self, index: int) -> bool:
        """Whether the block goes this way once it is computed."""
        return index in self._wanted

    def layer_packed(self, first: int, end: int, layer: int) -> None:
        """Layer `layer` of the blocks [first, end), or of the tail, is packed; the layers below are, too."""
        for index in range(first, end):
            self._advance(index, layer + 1)

    def block_packed(self, index: int) -> None:
        """The block is packed in all layers."""
        self._advance(index, self._blocks.layout.num_layers)

    async def next(self) -> list[Piece | Seal]:
        """Waits for pieces; takes about `PIECE_BYTES`, lower layers first."""
        while not (taken := self._take()):
            self._ready.clear()
            await self._ready.wait()
        return taken

    def close(self) -> None:
        """Nothing more is taken. The request's memory is then free at once, not when Python next looks for cycles."""
        for outgoing in self._outgoing.values():
            outgoing.close()
        self._outgoing.clear()

    def _advance(self, index: int, num_layers: int) -> None:
        if index not in self._started:
            if not self._is_wanted(index):
                return
            self._started.add(index)
            tail = index == self._blocks.num_blocks
            self._outgoing[index] = _Outgoing(self._blocks, index, hashlib.sha256() if tail else self._digest_of(index))
        outgoing = self._outgoing.get(index)
        if outgoing is not None:
            outgoing.num_ready = max(outgoing.num_ready, num_layers)
            self._ready.set()

    def _is_wanted(self, index: int) -> bool:
        return index in self._wanted or (index == self._blocks.num_blocks and self._blocks.tail_len > 0)

    def _take(self) -> list[Piece | Seal]:
        taken: list[Piece | Seal] = []
        num_bytes = 0
        while num_bytes < PIECE_BYTES:
            ready = [outgoing for outgoing in self._outgoing.items() if outgoing[1].has_next]
            if not ready:
                break
            for index, outgoing in ready:
                part = outgoing.next()
                taken.append(part)
                if isinstance(part, Seal):
                    self._outgoing.pop(index).close()
                else:
                    num_bytes += len(part.data)
                if num_bytes >= PIECE_BYTES:
                    break
        return taken
