"""Fills a sequence's blocks: from this worker's pool, from the store, or straight from the prefill worker, which sends
those that it computes in pieces."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
import torch

from kvferry.decode.memory import KVMemory
from kvferry.decode.pieces import IncomingPieces
from kvferry.kvstore.codec import Record, RecordDigest, decode_record
from kvferry.kvstore.errors import KVStoreError
from kvferry.kvstore.store import Store

logger = logging.getLogger(__name__)

MAX_RECORD_OVERHEAD = 4096
"""Most bytes of a record that are not payload."""


@dataclass
class TransferUsage:
    """Bytes that crossed to this worker for one request; records count whole, headers included."""

    store_bytes_read: int = 0
    store_tokens_read: int = 0
    handoff_bytes: int = 0
    handoff_tokens: int = 0


@dataclass
class _Incoming:
    """The record that the prefill worker is sending now."""

    index: int
    record_bytes: int
    buffer: bytearray


class BlockFetcher:
    """Loads the complete blocks of one prompt into the pool, and what layers with a window need of them into a ring.

    `missing` are the indices to load; those of them that are `present` are in the pool already, and only the ring in
    `slot` lacks them. `announce` is called as prefill finishes blocks; those that the store does not give are asked for
    with `ask_prefill` and come in through `receive`. Blocks that prefill computes come in through `receive_piece` and
    `seal` instead; one of which a piece is damaged is asked for again. `loaded` is called with each index once it is
    loaded and verified: until then nobody else knows the block, whatever was written into it.
    """

    def __init__(
        self,
        *,
        keys: list[bytes],
        namespace: bytes,
        block_ids: list[int],
        missing: set[int],
        present: frozenset[int],
        slot: int,
        cache: KVMemory,
        store: Store | None,
        ask_prefill: Callable[[list[int]], Awaitable[None]],
        loaded: Callable[[int], None],
        timeout_s: float,
    ) -> None:
        self._keys = keys
        self._namespace = namespace
        self._block_ids = block_ids
        self._missing = missing
        self._present = present
        self._slot = slot
        self._cache = cache
        self._store = None if store is None else store.of_chain(keys)
        self._ask_prefill = ask_prefill
        self._loaded = loaded
        self._timeout_s = timeout_s
        self._in_store: asyncio.Queue[int] = asyncio.Queue()
        self._elsewhere: asyncio.Queue[int] = asyncio.Queue()
        self._complete = asyncio.Event()
        self._incoming: _Incoming | None = None
        self._pieces: dict[int, IncomingPieces] = {}
        self._sinks: list[torch.Tensor] = []
        self.usage = TransferUsage()
        self.completed_at: float | None = None
        """time.monotonic() when the last missing block was loaded."""
        if not missing:
            self._complete.set()

    def announce(self, index: int, *, in_store: bool) -> None:
        """Prefill has block `index`."""
        if index in self._missing:
            (self._in_store if in_store and self._store else self._elsewhere).put_nowait(index)

    def receive(self, index: int, record_bytes: int, chunk: bytes) -> None:
        """A frame of a record that the prefill worker sends. Raises BlockCorrupt or ValueError for a bad one."""
        if record_bytes:
            limit = self._cache.layout.payload_bytes(index) + MAX_RECORD_OVERHEAD
            if index not in self._missing or record_bytes > limit:
                raise ValueError(f"prefill sent block {index}, which nobody asked for")
            self._incoming = _Incoming(index, record_bytes, bytearray())
        incoming = self._incoming
        if incoming is None or incoming.index != index:
            raise ValueError(f"prefill sent a frame of block {index} out of turn")
        incoming.buffer += chunk
        if len(incoming.buffer) < incoming.record_bytes:
            return
        self._incoming = None
        record = decode_record(
            bytes(incoming.buffer),
            expected_key=self._keys[index],
            expected_namespace=self._namespace,
        )
        self.usage.handoff_bytes += record.nbytes
        self.usage.handoff_tokens += record.header.num_tokens
        self._load(index, record)

    def receive_piece(self, index: int, offset: int, data: bytes, crc32: int) -> None:
        """A piece of a block that prefill is computing. Raises ValueError when nobody asked for it."""
        if index not in self._missing:
            raise ValueError(f"prefill sent a piece of block {index}, which nobody asked for")
        if index not in self._pieces:
            self._pieces[index] = self._expect_pieces(index)
        self.usage.handoff_bytes += len(data)
        self._pieces[index].append(offset, data, crc32)

    def seal(self, index: int, checksum: bytes) -> None:
        """All pieces of a block came; `checksum` is its record's. Raises ValueError when none did."""
        pieces = self._pieces.pop(index, None)
        if pieces is None:
            raise ValueError(f"prefill sealed block {index}, of which nothing came")
        if not pieces.sealed(checksum):
            logger.warning("block %d is asked for again: %s", index, pieces.problem)
            self._elsewhere.put_nowait(index)
            return
        if index == 0 and index not in self._present:
            self._cache.keep_sinks(self._block_ids[0], torch.stack(self._sinks))
        self.usage.handoff_tokens += self._cache.layout.block_size
        self._finish(index)

    def _expect_pieces(self, index: int) -> IncomingPieces:
        layout = self._cache.layout
        digest = RecordDigest(
            key=self._keys[index],
            namespace=self._namespace,
            block_index=index,
            num_tokens=layout.block_size,
            payload_bytes=layout.payload_bytes(index),
        )
        block_id, slot = self._places(index)

        def load(layer: int, share: bytearray) -> None:
            payload = torch.frombuffer(share, dtype=torch.uint8)
            sinks = self._cache.load_layer(payload, layer, index, block_id=block_id, slot=slot)
            if sinks is not None:
                self._sinks.append(sinks)

        sizes = [layout.layer_share_bytes(layer, index) for layer in range(layout.num_layers)]
        return IncomingPieces(sizes, digest, load)

    async def run(self) -> None:
        """Ends when every missing block is loaded."""
        tasks = [
            asyncio.create_task(self._from_store()),
            asyncio.create_task(self._from_prefill()),
            asyncio.create_task(self._complete.wait()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _from_store(self) -> None:
        while True:
            wanted = await _drain(self._in_store)
            got = 0
            try:
                async with aclosing(self._get(wanted)) as records:
                    async for record in records:
                        self._load(wanted[got], record)
                        self.usage.store_bytes_read += record.nbytes
                        self.usage.store_tokens_read += record.header.num_tokens
                        got += 1
            except (KVStoreError, ValueError) as error:
                logger.warning("blocks are fetched from the prefill worker instead: %s", error)
                for index in wanted[got:]:
                    self._elsewhere.put_nowait(index)

    def _get(self, indices: list[int]) -> AsyncGenerator[Record]:
        assert self._store is not None  # nothing is announced as in the store without one
        return self._store.get([self._keys[i] for i in indices], namespace=self._namespace, timeout_s=self._timeout_s)

    async def _from_prefill(self) -> None:
        while True:
            await self._ask_prefill(await _drain(self._elsewhere))

    def _load(self, index: int, record: Record) -> None:
        header = record.header
        if header.block_index != index or header.num_tokens != self._cache.layout.block_size:
            raise ValueError(f"the record says block {header.block_index}, not {index}")
        payload = torch.from_numpy(np.frombuffer(record.payload, np.uint8).copy())
        block_id, slot = self._places(index)
        self._cache.load_block(payload, index, block_id=block_id, slot=slot)
        self._finish(index)

    def _places(self, index: int) -> tuple[int | None, int | None]:
        """Where the block goes: into the pool, unless others read it there already, and into the slot's ring."""
        block_id = None if index in self._present else self._block_ids[index]
        slot = self._slot if self._cache.in_ring(index, len(self._keys)) else None
        return block_id, slot

    def _finish(self, index: int) -> None:
        self._missing.discard(index)
        self._loaded(index)
        if not self._missing:
            self.completed_at = time.monotonic()
            self._complete.set()


async def _drain(queue: asyncio.Queue[int]) -> list[int]:
    """All that is queued, at least one."""
    items = [await queue.get()]
    while not queue.empty():
        items.append(queue.get_nowait())
    return sorted(items)
