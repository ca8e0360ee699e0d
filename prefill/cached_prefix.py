"""Takes a prompt's first blocks from the store, as far as the policy finds that worth its while."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass

import numpy as np
import torch

from kvferry.kvstore.codec import Record
from kvferry.kvstore.errors import KVStoreError
from kvferry.kvstore.store import ChainStore
from kvferry.prefill.fetch_policy import FetchChoice, FetchPolicy, FetchQuestion
from kvferry.prefill.prompt_blocks import PromptBlocks

logger = logging.getLogger(__name__)

_releases: set[asyncio.Task[None]] = set()  # the event loop itself holds tasks weakly


@dataclass
class FetchOutcome:
    """What came of one request's cached blocks."""

    num_found: int = 0
    num_fetched: int = 0
    num_local: int = 0
    """Of these, that did not cross."""
    num_bytes: int = 0
    """Of whole records."""
    seconds: float = 0.0
    abandoned: bool = False
    """The policy left the fetch before its end."""
    reason: str = ""


class CachedPrefix:
    """Loads the blocks of `keys` into `blocks`, contiguous from block 0 on, verified.

    The store is only ever a help: none of its failures gets out of `fetch`; what has not come is left to compute.
    """

    def __init__(
        self,
        *,
        store: ChainStore,
        policy: FetchPolicy,
        blocks: PromptBlocks,
        keys: Sequence[bytes],
        namespace: bytes,
        on_block: Callable[[int], None],
    ) -> None:
        """`on_block(index)` is called for each block that is loaded."""
        self._store = store
        self._policy = policy
        self._blocks = blocks
        self._keys = list(keys)
        self._namespace = namespace
        self._on_block = on_block
        self._outcome = FetchOutcome()

    async def fetch(
        self, *, compute_s: Callable[[int, int], float], limit_s: float, lookup_timeout_s: float
    ) -> FetchOutcome:
        """`compute_s(first, last)`: what computing these blocks would take now; `limit_s`: the longest fetch."""
        started = time.monotonic()
        outcome = self._outcome
        choice = self._policy.begin(
            FetchQuestion(
                num_blocks=len(self._keys),
                block_bytes=self._blocks.layout.payload_bytes(1),
                compute_s=compute_s,
                limit_s=limit_s,
            )
        )
        if choice.wants_lookup():
            await self._look_up_and_load(choice, limit_s, lookup_timeout_s)
        else:
            self._policy.counters.num_lookups_skipped += 1
        outcome.seconds = time.monotonic() - started
        outcome.reason = choice.reason or "compute: the store did not answer"
        self._count()
        logger.debug("cached blocks: %s", outcome)
        return outcome

    async def _look_up_and_load(self, choice: FetchChoice, limit_s: float, lookup_timeout_s: float) -> None:
        lease_id = 0
        try:
            async with asyncio.timeout(limit_s):
                started = time.monotonic()
                found = await self._store.lookup(self._keys, lease_s=limit_s, timeout_s=lookup_timeout_s)
                lease_id = found.lease_id
                self._outcome.num_found = found.num_contiguous
                num_wanted = choice.found(found.num_contiguous, time.monotonic() - started)
                if num_wanted:
                    try:
                        await self._load(choice, self._keys[:num_wanted], lease_id, limit_s)
                    finally:
                        choice.finish()
        except (KVStoreError, ValueError, TimeoutError) as error:
            logger.warning("prefix fetch ended early, the rest is computed: %s", error or "out of time")
        finally:
            if lease_id:
                # Not awaited: an answer must not wait for it, and its failure must not hide a cancellation.
                task = asyncio.create_task(_release(self._store, lease_id))
                _releases.add(task)
                task.add_done_callback(_releases.discard)

    async def _load(self, choice: FetchChoice, keys: list[bytes], lease_id: int, limit_s: float) -> None:
        records = self._store.get(keys, lease_id=lease_id, namespace=self._namespace, timeout_s=limit_s)
        async with aclosing(records):
            for num_left in reversed(range(len(keys))):
                asked = time.monotonic()
                record = await _within(records, choice.patience_s())
                if record is None:
                    choice.gave_up(time.monotonic() - asked)
                    self._outcome.abandoned = True
                    return
                self._take(record)
                if not choice.arrived(record.nbytes, time.monotonic() - asked) and num_left:
                    self._outcome.abandoned = True
                    return

    def _take(self, record: Record) -> None:
        """Raises ValueError when it is not the next block."""
        index = self._blocks.num_ready
        block_size = self._blocks.layout.block_size
        if record.header.block_index != index or record.header.num_tokens != block_size:
            raise ValueError(f"the record says block {record.header.block_index}, not {index}")
        # The copy is writable; torch warns about the record's read-only buffer.
        payload = torch.from_numpy(np.frombuffer(record.payload, np.uint8).copy())
        self._blocks.load(index, payload)
        self._outcome.num_fetched += 1
        self._outcome.num_local += record.nbytes == 0
        self._outcome.num_bytes += record.nbytes
        self._on_block(index)

    def _count(self) -> None:
        outcome, counters = self._outcome, self._policy.counters
        counters.num_blocks_fetched += outcome.num_fetched
        counters.num_blocks_local += outcome.num_local
        counters.num_blocks_recomputed += outcome.num_found - outcome.num_fetched
        counters.num_fetches += outcome.num_fetched > 0
        counters.num_recomputed += outcome.num_found > 0 and outcome.num_fetched == 0 and not outcome.abandoned
        counters.num_abandoned += outcome.abandoned


async def _within(records: AsyncIterator[Record], seconds: float) -> Record | None:
    """The next record; None when it does not come in time. `records` has ended then."""
    try:
        async with asyncio.timeout(seconds if seconds < 1e6 else None) as waiting:
            return await anext(records)
    except TimeoutError:
        if not waiting.expired():
            raise
        return None
    except StopAsyncIteration:
        raise ValueError("the store sent fewer records than were asked for") from None


async def _release(store: ChainStore, lease_id: int) -> None:
    with suppress(KVStoreError):  # then the lease ends by itself
        await store.release(lease_id)
