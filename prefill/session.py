"""One request on a prefill worker: take what the store has, compute the rest, publish it, hand over."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from kvferry.kernels.sampling import SampledToken, SamplingParams
from kvferry.kvstore.codec import encode_record
from kvferry.kvstore.errors import KVStoreError
from kvferry.kvstore.key import Namespace, block_keys
from kvferry.kvstore.store import ChainStore, Store
from kvferry.prefill.config import PrefillConfig
from kvferry.prefill.engine import PrefillEngine
from kvferry.prefill.errors import DeadlinePassed
from kvferry.prefill.job import PrefillJob

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class BlockReady:
    """Block `index` is complete; `in_store` says whether the store holds it now."""

    index: int
    in_store: bool


@dataclass(frozen=True)
class HandoffReady:
    """Prefill's result for decode. `usage` lacks what is still being published."""

    first_tokens: list[SampledToken]
    """Of each answer."""
    tail: bytes
    usage: PrefillUsage


Event = BlockReady | HandoffReady | PrefillUsage
"""One BlockReady for each complete block, before or after the one HandoffReady, which a request that only warms the
store does not have; one PrefillUsage as the last."""

LATE_PASS_S = 1.0
"""How long after the deadline the engine may say that it has passed."""

_releases: set[asyncio.Task[None]] = set()  # the event loop itself holds tasks weakly

T = TypeVar("T")


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
        store: Store | None,
        config: PrefillConfig,
        remaining_s: float | None,
        priority: int = 0,
        warm: bool = False,
        num_answers: int = 1,
    ) -> None:
        """`remaining_s`: until the request's deadline; None: the config's. `warm`: publish complete blocks, no more."""
        if warm:
            token_ids = token_ids[: len(token_ids) // namespace.block_size * namespace.block_size]
        self._token_ids = token_ids
        self._tenant = namespace.tenant
        self._priority = priority
        self._warm = warm
        self._num_answers = num_answers
        self._remaining_s = config.default_timeout_s if remaining_s is None else remaining_s
        self._deadline = time.monotonic() + self._remaining_s
        self._sampling = sampling
        self._namespace = namespace.digest()
        self._keys = block_keys(namespace, token_ids)
        self._engine = engine
        self._store = None if store is None else store.of_chain(self._keys)
        self._config = config
        self._fetch_budget_s = min(config.fetch_timeout_s, self._remaining_s / 4)
        self._blocks = engine.new_blocks(len(token_ids))
        self._usage = PrefillUsage()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._unannounced: set[int] = set()
        self.handed_over = False
        """Everything is computed; only publishing may be left."""

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
        """Runs the request to its end. Raises what the engine raised, DeadlinePassed among it. Cancelling it stops the
        computation."""
        if self._token_ids:
            await self._fetch_cached()
            await self._compute()
        self._events.put_nowait(self._usage)

    async def _fetch_cached(self) -> None:
        """Loads the longest contiguous verified prefix from the store. At least one token is left to compute, unless
        only blocks are wanted."""
        left = 0 if self._warm else 1
        wanted = self._keys[: (len(self._token_ids) - left) // self._engine.layout.block_size]
        if self._store is None or not wanted:
            return
        started = time.monotonic()
        lease_id = 0
        try:
            async with asyncio.timeout(self._fetch_budget_s):
                found = await self._store.lookup(
                    wanted, lease_s=self._fetch_budget_s, timeout_s=self._config.lookup_timeout_s
                )
                lease_id = found.lease_id
                if found.num_contiguous:
                    await self._load(self._store, wanted[: found.num_contiguous], lease_id)
        except (KVStoreError, ValueError, TimeoutError) as error:
            logger.warning("prefix fetch ended early, the rest is computed: %s", error or "out of time")
        finally:
            if lease_id:
                # Not awaited: an answer must not wait for it, and its failure must not hide a cancellation.
                task = asyncio.create_task(_release(self._store, lease_id))
                _releases.add(task)
                task.add_done_callback(_releases.discard)
        self._usage.fetch_seconds = time.monotonic() - started
        self._usage.num_cached_tokens = self._blocks.num_ready * self._engine.layout.block_size

    async def _load(self, store: ChainStore, keys: list[bytes], lease_id: int) -> None:
        records = store.get(keys, lease_id=lease_id, namespace=self._namespace, timeout_s=self._fetch_budget_s)
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
        done: asyncio.Future[list[SampledToken]] = loop.create_future()
        finished_blocks: asyncio.Queue[int | None] = asyncio.Queue()

        def finish_block(index: int) -> None:
            self._unannounced.add(index)
            finished_blocks.put_nowait(index)

        def finish(tokens: list[SampledToken]) -> None:
            done.set_result(tokens)
            finished_blocks.put_nowait(None)

        def fail(error: Exception) -> None:
            done.set_exception(error)

        job = PrefillJob(
            token_ids=self._token_ids,
            sampling=self._sampling,
            blocks=self._blocks,
            on_block=_on_loop(loop, done, finish_block),
            on_done=_on_loop(loop, done, finish),
            on_error=_on_loop(loop, done, fail),
            tenant=self._tenant,
            priority=self._priority,
            warm=self._warm,
            num_answers=self._num_answers,
            deadline=self._deadline,
            keys=self._keys,
        )
        self._engine.submit(job)
        publisher = asyncio.create_task(self._publish(finished_blocks))
        try:
            tokens = await self._until_deadline(done)
            self._usage.queue_seconds = job.queue_seconds or 0.0
            self._usage.compute_seconds = job.compute_seconds
            self.handed_over = True
            if not self._warm:
                self._events.put_nowait(HandoffReady(tokens, self._blocks.tail_bytes(), replace(self._usage)))
            await self._finish_publishing(publisher)
        finally:
            job.cancel()
            publisher.cancel()

    async def _until_deadline(self, done: asyncio.Future[T]) -> T:
        """The engine ends a late job between passes; this holds even when a pass does not end."""
        try:
            async with asyncio.timeout(max(self._deadline - time.monotonic(), 0.0) + LATE_PASS_S):
                return await done
        except TimeoutError:
            raise DeadlinePassed("the request's time was over before its prompt was computed") from None

    async def _finish_publishing(self, publisher: asyncio.Task[None]) -> None:
        """Gives the store a moment, then offers what it has not taken from here, and goes on publishing. A request that
        only warms the store waits for it: nobody waits for the request."""
        grace_s = self._config.publish_timeout_s if self._warm else self._config.publish_grace_s
        await asyncio.wait([publisher], timeout=grace_s)
        for index in sorted(self._unannounced):
            self._announce(index, in_store=False)
        done, _ = await asyncio.wait([publisher], timeout=self._config.publish_timeout_s)
        if done:
            publisher.result()
        else:
            logger.warning("the store is too slow: some blocks of a prompt were not stored")

    async def _publish(self, finished: asyncio.Queue[int | None]) -> None:
        """Puts each finished block while the next ones are computed, and announces it."""
        while (index := await finished.get()) is not None:
            self._announce(index, in_store=await self._put(index))

    def _announce(self, index: int, *, in_store: bool) -> None:
        if index in self._unannounced:
            self._unannounced.remove(index)
            self._events.put_nowait(BlockReady(index, in_store))

    async def _put(self, index: int) -> bool:
        """Whether the store holds the block now."""
        if self._store is None:
            return False
        try:
            record = self.record(index)
            stored = await self._store.put(self._keys[index], record, timeout_s=self._config.put_timeout_s)
        except KVStoreError as error:
            logger.warning("a block was not stored, decode gets it from here: %s", error)
            return False
        if stored:  # else it was there, and its bytes did not cross
            self._usage.store_bytes_written += len(record)
            self._usage.store_tokens_written += self._engine.layout.block_size
        return True


async def _release(store: ChainStore, lease_id: int) -> None:
    with suppress(KVStoreError):  # then the lease ends by itself
        await store.release(lease_id)


def _on_loop(
    loop: asyncio.AbstractEventLoop, done: asyncio.Future[Any], fn: Callable[[T], None]
) -> Callable[[T], None]:
    """`fn` as a callback for the engine's thread; nothing happens once `done` is settled or the loop is closed."""

    def on_loop(argument: T) -> None:
        if not done.done():
            fn(argument)

    def call(argument: T) -> None:
        try:
            loop.call_soon_threadsafe(on_loop, argument)
        except RuntimeError:
            logger.debug("the event loop is closed; a late prefill event is dropped")

    return call
