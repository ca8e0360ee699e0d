"""One request on a prefill worker: take what the store has, compute the rest, publish it, hand over."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, TypeVar, TypeVarTuple

from kvferry.kernels.sampling import SampledToken, SamplingParams
from kvferry.kvstore.codec import RecordDigest, encode_record
from kvferry.kvstore.errors import KVStoreError
from kvferry.kvstore.key import Namespace, block_keys
from kvferry.kvstore.store import Store
from kvferry.prefill.cached_prefix import CachedPrefix
from kvferry.prefill.config import PrefillConfig
from kvferry.prefill.engine import PrefillEngine
from kvferry.prefill.errors import DeadlinePassed
from kvferry.prefill.fetch_policy import FetchPolicy
from kvferry.prefill.job import PrefillJob
from kvferry.prefill.pieces import PieceQueue

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
    num_blocks_fetched: int = 0
    num_blocks_recomputed: int = 0
    """Computed although the store had them."""
    fetch_abandoned: bool = False
    fetch_choice: str = ""
    """What was chosen for the cached blocks, and why; empty when there was nothing to choose."""


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
    tail_bytes: int
    tail: bytes
    """Empty when it goes in pieces."""
    usage: PrefillUsage


Event = BlockReady | HandoffReady | PrefillUsage
"""One BlockReady for each complete block that does not go in pieces, before or after the one HandoffReady, which a
request that only warms the store does not have; one PrefillUsage as the last."""

LATE_PASS_S = 1.0
"""How long after the deadline the engine may say that it has passed."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


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
        fetch_policy: FetchPolicy,
        config: PrefillConfig,
        remaining_s: float | None,
        priority: int = 0,
        warm: bool = False,
        num_answers: int = 1,
        pieces_of: Collection[int] | None = None,
    ) -> None:
        """`remaining_s`: until the request's deadline; None: the config's. `warm`: publish complete blocks, no more.
        `pieces_of`: blocks that go in `pieces` as they are computed, and then the tail does, too; None: neither."""
        if warm:
            token_ids = token_ids[: len(token_ids) // namespace.block_size * namespace.block_size]
        self._has_told_not_stored = False
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
        self._fetch_policy = fetch_policy
        self._config = config
        self._fetch_budget_s = min(config.fetch_timeout_s, self._remaining_s / 4)
        self._blocks = engine.new_blocks(len(token_ids))
        self._usage = PrefillUsage()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._progress = asyncio.Event()
        self._unannounced: set[int] = set()
        self.pieces = None if pieces_of is None or warm else PieceQueue(self._blocks, pieces_of, self._digest_of)
        """What goes to the caller while it is computed."""
        self.handed_over = False
        """Everything is computed; only publishing may be left."""

    async def until_complete(self, index: int) -> None:
        """Waits until block `index` is: who got a damaged piece may ask for the block before it is packed in all
        layers. Raises ValueError for a block that the prompt does not have."""
        if not 0 <= index < self._blocks.num_blocks:
            raise ValueError(f"the prompt has no block {index}")
        while index >= self._blocks.num_ready:
            self._progress.clear()
            await self._progress.wait()

    def close(self) -> None:
        """The caller takes nothing more; publishing may go on."""
        if self.pieces is not None:
            self.pieces.close()
            self.pieces = None  # it knows this session, too

    @property
    def usage(self) -> PrefillUsage:
        """What the request has cost so far."""
        return self._usage

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

    def _digest_of(self, index: int) -> RecordDigest:
        return RecordDigest(
            key=self._keys[index],
            namespace=self._namespace,
            block_index=index,
            num_tokens=self._engine.layout.block_size,
            payload_bytes=self._engine.layout.payload_bytes(index),
        )

    async def run(self) -> None:
        """Runs the request to its end. Raises what the engine raised, DeadlinePassed among it. Cancelling it stops the
        computation."""
        if self._token_ids:
            await self._fetch_cached()
            await self._compute()
        self._events.put_nowait(self._usage)

    async def _fetch_cached(self) -> None:
        """Loads a contiguous verified prefix from the store, where that is faster than computing it. At least one token
        is left to compute, unless only blocks are wanted."""
        left = 0 if self._warm else 1
        size = self._engine.layout.block_size
        wanted = self._keys[: (len(self._token_ids) - left) // size]
        if self._store is None or not wanted:
            return
        prefix = CachedPrefix(
            store=self._store,
            policy=self._fetch_policy,
            blocks=self._blocks,
            keys=wanted,
            namespace=self._namespace,
            on_block=lambda index: self._events.put_nowait(BlockReady(index, in_store=True)),
        )
        outcome = await prefix.fetch(
            compute_s=lambda first, last: self._engine.seconds_for(first * size, last * size),
            limit_s=self._fetch_budget_s,
            lookup_timeout_s=self._config.lookup_timeout_s,
        )
        usage = self._usage
        usage.fetch_seconds = outcome.seconds
        usage.num_cached_tokens = usage.store_tokens_read = outcome.num_fetched * size
        usage.store_bytes_read = outcome.num_bytes
        usage.num_blocks_fetched = outcome.num_fetched
        usage.num_blocks_recomputed = outcome.num_found - outcome.num_fetched
        usage.fetch_abandoned = outcome.abandoned
        usage.fetch_choice = outcome.reason

    async def _compute(self) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[list[SampledToken]] = loop.create_future()
        finished_blocks: asyncio.Queue[tuple[int, float] | None] = asyncio.Queue()

        def finish_block(index: int) -> None:
            self._progress.set()
            if self.pieces is not None and self.pieces.covers(index):
                self.pieces.block_packed(index)
            else:
                self._unannounced.add(index)
            finished_blocks.put_nowait((index, time.monotonic()))

        def finish(tokens: list[SampledToken]) -> None:
            done.set_result(tokens)
            self._progress.set()
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
        if self.pieces is not None:
            job.on_layer = _on_loop(loop, done, self.pieces.layer_packed)
        self._engine.submit(job)
        publisher = asyncio.create_task(self._publish(finished_blocks, done))
        try:
            tokens = await self._until_deadline(done)
            self._usage.queue_seconds = job.queue_seconds or 0.0
            self._usage.compute_seconds = job.compute_seconds
            self.handed_over = True
            if not self._warm:
                tail_bytes = self._blocks.tail_size
                tail = self._blocks.tail_bytes() if self.pieces is None else b""
                self._events.put_nowait(HandoffReady(tokens, tail_bytes, tail, replace(self._usage)))
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

    async def _publish(
        self, finished: asyncio.Queue[tuple[int, float] | None], computed: asyncio.Future[list[SampledToken]]
    ) -> None:
        """Puts each finished block and announces it: at once where decode waits for it, else when the prompt is
        computed, or after `publish_delay_s`. A put takes the processor from the passes, and a short prompt's first
        token need not wait for it."""
        while (block := await finished.get()) is not None:
            index, finished_at = block
            wait_s = finished_at + self._config.publish_delay_s - time.monotonic()
            if index not in self._unannounced and wait_s > 0:
                await asyncio.wait([computed], timeout=wait_s)
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
            # One line a request: with a lost store this is true of every block of every prompt.
            level = logging.DEBUG if self._has_told_not_stored else logging.WARNING
            self._has_told_not_stored = True
            logger.log(level, "block %d was not stored, decode gets it from here: %s", index, error)
            return False
        if stored:  # else it was there, and its bytes did not cross
            self._usage.store_bytes_written += len(record)
            self._usage.store_tokens_written += self._engine.layout.block_size
        return True


def _on_loop(
    loop: asyncio.AbstractEventLoop, done: asyncio.Future[Any], fn: Callable[[*Ts], None]
) -> Callable[[*Ts], None]:
    """`fn` as a callback for the engine's thread; nothing happens once `done` is settled or the loop is closed."""

    def on_loop(*arguments: *Ts) -> None:
        if not done.done():
            fn(*arguments)

    def call(*arguments: *Ts) -> None:
        try:
            loop.call_soon_threadsafe(on_loop, *arguments)
        except RuntimeError:
            logger.debug("the event loop is closed; a late prefill event is dropped")

    return call
