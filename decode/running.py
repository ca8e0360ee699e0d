"""A sequence in the engine, seen from the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvferry.decode.engine import DecodeEngine
from kvferry.decode.sequence import Sequence, TokenEvent


class DecodeFailed(Exception):
    """The engine could not go on with a sequence."""


class RunningSequence:
    """Carries a sequence's events from the engine's thread to the event loop that made this object."""

    def __init__(self, engine: DecodeEngine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[TokenEvent | Exception] = asyncio.Queue()
        self._released = asyncio.Event()

    def put(self, item: TokenEvent | Exception) -> None:
        """Called on the engine's thread."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    def release(self) -> None:
        """Called on the engine's thread."""
        self._loop.call_soon_threadsafe(self._released.set)

    @asynccontextmanager
    async def hold(self, sequence: Sequence) -> AsyncIterator[None]:
        """Runs the sequence; when the context ends the engine no longer touches its slot and blocks."""
        self._engine.add(sequence)
        try:
            yield
        finally:
            self._engine.cancel(sequence)
            await self._until_released()

    async def _until_released(self) -> None:
        """Waits for the running step, whatever else is cancelled meanwhile: its blocks must not be given away while
        the step writes to them. The engine releases every sequence, also when it fails or closes."""
        released = asyncio.ensure_future(self._released.wait())
        cancelled: asyncio.CancelledError | None = None
        while not released.done():
            try:
                await asyncio.shield(released)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    async def events(self) -> AsyncIterator[TokenEvent]:
        """Tokens up to the last one. Raises DecodeFailed with the engine's reason."""
        while True:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise DecodeFailed(str(item)) from item
            yield item
            if item.finish_reason:
                return
