"""The sequences of one request: in the engine, or swapped out and waiting for room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import NamedTuple, TypeVar

from kvferry.decode.admission import Admission, Reservation
from kvferry.decode.engine import DecodeEngine
from kvferry.decode.memory import HeldKV, KVMemory
from kvferry.decode.sequence import Sequence, TokenEvent

T = TypeVar("T")


class DecodeFailed(Exception):
    """The engine could not go on with a sequence."""


class ChoiceEvent(NamedTuple):
    """A token of one of the request's answers."""

    choice: int
    event: TokenEvent


class SequenceGroup:
    """`SequenceListener` that carries a request's sequences from the engine's thread to the event loop that made it.

    While the group runs it answers the pool: it asks for a block whenever a sequence has filled one, and when it is
    preempted it copies everything to host memory, gives its room back, waits, and goes on with the next token.
    """

    def __init__(
        self,
        *,
        engine: DecodeEngine,
        cache: KVMemory,
        admission: Admission,
        room: Reservation,
        max_blocks: int,
        prefix_caching: bool,
    ) -> None:
        """`room` holds one block for each of its keys, and one spare for each sequence that will fill any;
        `max_blocks`: complete blocks of a sequence when it has all its tokens; `prefix_caching`: other requests may
        share the prompt's blocks."""
        self._engine = engine
        self._cache = cache
        self._admission = admission
        self._room = room
        self._max_blocks = max_blocks
        self._prefix_caching = prefix_caching
        self._num_prompt_blocks = len(room.keys)
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[ChoiceEvent | Exception] = asyncio.Queue()
        self._live: list[Sequence] = []
        self._in_engine: set[Sequence] = set()
        self._changed = asyncio.Event()
        self._preempted = False
        self._error: Exception | None = None
        self._growing: dict[asyncio.Task[None], Sequence] = {}

    # The engine's thread calls these.

    def token(self, sequence: Sequence, event: TokenEvent) -> None:
        self._loop.call_soon_threadsafe(self._on_token, sequence, event)

    def error(self, sequence: Sequence, error: Exception) -> None:
        self._loop.call_soon_threadsafe(self._on_error, error)

    def block_used(self, sequence: Sequence) -> None:
        self._loop.call_soon_threadsafe(self._on_block_used, sequence)

    def released(self, sequence: Sequence) -> None:
        self._loop.call_soon_threadsafe(self._on_released, sequence)

    # Everything else runs on the event loop.

    @asynccontextmanager
    async def run(self, sequences: list[Sequence]) -> AsyncIterator[None]:
        """Decodes. The room is given back after the last token, or when the context ends: whichever comes first, a
        client that reads slowly holds none. The engine no longer touches it then."""
        self._live = list(sequences)
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            await finish(asyncio.gather(task, return_exceptions=True))

    async def events(self) -> AsyncIterator[ChoiceEvent]:
        """Tokens up to the last one of the last answer. Raises DecodeFailed with the engine's reason."""
        unfinished = len(self._live)
        while unfinished:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise DecodeFailed(str(item)) from item
            unfinished -= bool(item.event.finish_reason)
            yield item

    async def _run(self) -> None:
        try:
            while self._live:
                await self._decode()
                if self._live:
                    await self._swap()
        except Exception as error:
            self._queue.put_nowait(error)
        finally:
            await self._leave_engine()
            self._admission.release(self._room)

    async def _decode(self) -> None:
        """Returns when every sequence has its last token or the group was preempted; none is in the engine then.
        Raises what the engine raised for any of them."""
        self._preempted = False
        for sequence in self._live:
            self._engine.add(sequence)
            self._in_engine.add(sequence)
        self._admission.allow_swap(self._room, self._preempt)
        while self._in_engine and not self._preempted and self._error is None:
            self._changed.clear()
            await self._changed.wait()
        await self._leave_engine()
        if self._error is not None:
            raise self._error

    async def _swap(self) -> None:
        live, prompt = self._live, self._num_prompt_blocks
        saved = await finish(asyncio.to_thread(self._cache.swap_out, self._held()))
        own = [s.num_blocks - prompt for s in live]
        spare = [s.num_blocks < self._max_blocks for s in live]
        await self._admission.swap_out(self._room, num_blocks=prompt + sum(own) + sum(spare), num_slots=len(live))
        rest = iter(self._room.block_ids[prompt:])
        for sequence, slot, num_own, has_spare in zip(live, self._room.slots, own, spare, strict=True):
            sequence.slot = slot
            sequence.block_ids = self._room.block_ids[:prompt] + [next(rest) for _ in range(num_own + has_spare)]
        present = self._room.shared
        await finish(asyncio.to_thread(self._cache.swap_in, saved, self._held(), present=present))
        if self._prefix_caching:
            for key, block_id in zip(self._room.keys, self._room.block_ids, strict=False):
                self._admission.pool.publish(block_id, key)

    def _held(self) -> HeldKV:
        live, prompt = self._live, self._num_prompt_blocks
        return HeldKV(
            prompt=live[0].block_ids[:prompt],
            own=[s.block_ids[prompt : s.num_blocks] for s in live],
            slots=[s.slot for s in live],
            tail_lens=[s.tail_len for s in live],
        )

    async def _leave_engine(self) -> None:
        for task in list(self._growing):
            task.cancel()
        for sequence in self._in_engine:
            self._engine.remove(sequence)
        await finish(self._until_released())
        for task in list(self._growing):  # of blocks that were filled while the running step ended
            task.cancel()

    async def _until_released(self) -> None:
        """The running step ends first: the blocks must not be given away while it writes to them. The engine
        releases every sequence, also when it fails or closes."""
        while self._in_engine:
            self._changed.clear()
            await self._changed.wait()

    async def _grow(self, sequence: Sequence) -> None:
        self._engine.grant(sequence, await self._admission.grow(self._room))

    def _preempt(self) -> None:
        self._preempted = True
        self._changed.set()

    def _on_token(self, sequence: Sequence, event: TokenEvent) -> None:
        if event.finish_reason:
            self._live.remove(sequence)
        self._queue.put_nowait(ChoiceEvent(sequence.choice, event))

    def _on_error(self, error: Exception) -> None:
        self._error = error
        self._changed.set()

    def _on_block_used(self, sequence: Sequence) -> None:
        if sequence in self._in_engine and len(sequence.block_ids) < self._max_blocks and not self._preempted:
            task = asyncio.create_task(self._grow(sequence))
            self._growing[task] = sequence
            task.add_done_callback(lambda t: self._growing.pop(t))

    def _on_released(self, sequence: Sequence) -> None:
        self._in_engine.discard(sequence)
        self._changed.set()


async def finish(work: Awaitable[T]) -> T:
    """Waits to the end of `work` whatever else is cancelled meanwhile, and only then passes the cancellation on."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()
