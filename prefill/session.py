"""One request on a prefill worker: take what the store has, compute the rest, publish it, hand over."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
import torch

from kvferry.kernels.sampling import SampledToken, SamplingParams
from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.codec import encode_record
from kvferry.kvstore.errors import KVStoreError
from kvferry.kvstore.key import Namespace, block_keys
from kvferry.prefill.config import PrefillConfig
from kvferry.prefill.engine import PrefillEngine, PrefillJob

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockReady:
    """Block `index` is complete; `in_store` says whether the store holds it now."""

    index: int
    in_store: bool


@dataclass(frozen=True)
class HandoffReady:
    """Prefill's result for decode."""

    first_token: SampledToken
    tail: bytes


@dataclass
class PrefillUsage:
    """What one request cost. Bytes count whole records, headers included."""

    num_cached_tokens: int = 0
    store_bytes_read: int = 0
    store_bytes_written: int = 0
    store_tokens_read: int = 0
    store_tokens_written: int = 0
    queue_seconds: float = 0.0
    fetch_seconds: float = 0.0
    compute_seconds: float = 0.0


Event = BlockReady | HandoffReady | PrefillUsage
"""A session's events, in this order: BlockReady (any number, some may follow the handoff), HandoffReady,
PrefillUsage last."""


class PrefillSession:
    """The life of one prompt. `run` drives it; `next_event` yields its events; `record` serves its blocks.

    The store is only ever a help: each of its failures ends in computing or sending the block ourselves.
    """

    def __init__(
        self,
        *,
        token_ids: list[int],
        sampling: SamplingParams,
        namespace: Namespace,
        engine: PrefillEngine,
        store: StoreClient | None,
        config: PrefillConfig,
    ) -> None:
        self._token_ids = token_ids
        self._sampling = sampling
        self._namespace = namespace.digest()
        self._keys = block_keys(namespace, token_ids)
        self._engine = engine
        self._store = store
        self._config = config
        self._blocks = engine.new_blocks(len(token_ids))
        self._usage = PrefillUsage()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    async def next_event(self) -> Event:
        return await self._events.get()

    def record(self, index: int) -> bytes:
        """The record of a complete block, the same bytes as in the store. Raises ValueError for another index."""
        if not 0 <= index < self._blocks.num_ready:
            raise ValueError(f"block {index} is not complete")
        return encode_record(
            key=self._keys[index],
            namespace=self._namespace,
            block_index=index,
            num_tokens=self._engine.layout.block_size,
            payload=[self._blocks.payload(index)],
        )

    async def run(self) -> None:
        """Runs the request to its end. Raises what the engine raised. Cancelling it stops the computation."""
        await self._fetch_cached()
        await self._compute()
        self._events.put_nowait(self._usage)

    async def _fetch_cached(self) -> None:
        """Loads the longest contiguous verified prefix from the store; at least one token is left to compute."""
        if self._store is None:
            return
        started = time.monotonic()
        wanted = self._keys[: (len(self._token_ids) - 1) // self._engine.layout.block_size]
        if not wanted:
            return
        try:
            found = await self._store.lookup(
                wanted,
                lease_s=self._config.fetch_timeout_s,
                timeout_s=self._config.lookup_timeout_s,
            )
            if found.num_contiguous:
                try:
                    await self._load(wanted[: found.num_contiguous], found.lease_id)
                finally:
                    await self._store.release(found.lease_id)
        except KVStoreError as error:
            logger.warning("prefix fetch ended early, the rest is computed: %s", error)
        except ValueError as error:
            logger.warning("a cached block does not fit this model and is computed: %s", error)
        self._usage.fetch_seconds = time.monotonic() - started
        self._usage.num_cached_tokens = self._blocks.num_ready * self._engine.layout.block_size

    async def _load(self, keys: list[bytes], lease_id: int) -> None:
        assert self._store is not None
        records = self._store.get(
            keys,
            lease_id=lease_id,
            namespace=self._namespace,
            timeout_s=self._config.fetch_timeout_s,
        )
        block_size = self._engine.layout.block_size
        async with aclosing(records):
            async for record in records:
                index = self._blocks.num_ready
                if record.header.block_index != index or record.header.num_tokens != block_size:
                    raise ValueError(f"the record says block {record.header.block_index}, not {index}")
                # The copy is writable; torch warns about the record's read-only buffer.
                payload = torch.from_numpy(np.frombuffer(record.payload, np.uint8).copy())
                self._blocks.load(index, payload)
                self._usage.store_bytes_read += record.nbytes
                self._usage.store_tokens_read += block_size
                self._events.put_nowait(BlockReady(index, in_store=True))

    async def _compute(self) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[SampledToken] = loop.create_future()
        finished_blocks: asyncio.Queue[int | None] = asyncio.Queue()

        def finish(token: SampledToken) -> None:
            if not done.done():
                done.set_result(token)
            finished_blocks.put_nowait(None)

        def fail(error: Exception) -> None:
            if not done.done():
                done.set_exception(error)
            finished_blocks.put_nowait(None)

        job = PrefillJob(
            token_ids=self._token_ids,
            sampling=self._sampling,
            blocks=self._blocks,
            on_block=lambda index: _call(loop, finished_blocks.put_nowait, index),
            on_done=lambda token: _call(loop, finish, token),
            on_error=lambda error: _call(loop, fail, error),
        )
        self._engine.submit(job)
        publisher = asyncio.create_task(self._publish(finished_blocks))
        try:
            token = await done
            self._events.put_nowait(HandoffReady(token, self._blocks.tail_bytes()))
            await publisher
        finally:
            job.cancel()
            publisher.cancel()
        self._usage.queue_seconds = job.queue_seconds or 0.0
        self._usage.compute_seconds = job.compute_seconds

    async def _publish(self, finished: asyncio.Queue[int | None]) -> None:
        """Puts each finished block while the next ones are computed, and announces it."""
        while (index := await finished.get()) is not None:
            self._events.put_nowait(BlockReady(index, in_store=await self._put(index)))

    async def _put(self, index: int) -> bool:
        if self._store is None:
            return False
        record = self.record(index)
        try:
            await self._store.put(self._keys[index], record, timeout_s=self._config.put_timeout_s)
        except KVStoreError as error:
            logger.warning("a block was not stored, decode gets it from here: %s", error)
            return False
        self._usage.store_bytes_written += len(record)
        self._usage.store_tokens_written += self._engine.layout.block_size
        return True


def _call(loop: asyncio.AbstractEventLoop, fn: object, argument: object) -> None:
    """Calls `fn(argument)` on the loop from the engine's thread; a loop that is gone needs no answer."""
    try:
        loop.call_soon_threadsafe(fn, argument)  # type: ignore[arg-type]
    except RuntimeError:
        logger.debug("the event loop is closed; a late prefill event is dropped")
