"""Makes an answer's own blocks canonical for the conversation's next turn.

Blocks that decode fills are not canonical: decode and prefill sum in different orders. So when an answer is complete,
prefill is asked to compute and publish the blocks that the answer has completed, when nothing else waits there; the
prompt's blocks come from the store. The next turn then finds all of the conversation.
"""

from __future__ import annotations

import asyncio
import logging

from kvferry.decode.prefill_stream import PrefillFailed, PrefillStream

logger = logging.getLogger(__name__)


class AnswerWarmer:
    """Runs at most `max_running` requests of this kind; more are left out, for they are only a help."""

    def __init__(self, *, max_running: int = 8) -> None:
        self._max_running = max_running
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_warmed = 0
        self.num_left_out = 0

    def warm(self, stream: PrefillStream) -> None:
        """Runs `stream`, whose start says `warm`, behind everything else. Never raises, never waits."""
        if len(self._tasks) >= self._max_running:
            self.num_left_out += 1
            stream.close()
            return
        task = asyncio.create_task(self._run(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, stream: PrefillStream) -> None:
        try:
            await stream.start()
            await stream.done()
            async for _ in stream.events():
                pass
            self.num_warmed += 1
        except PrefillFailed as error:
            self.num_left_out += 1
            logger.info("an answer's blocks were not published: %s", error)
        finally:
            stream.close()
