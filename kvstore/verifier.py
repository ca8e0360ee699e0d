"""Checks records beside the event loop, so that hashing a large one stalls nobody."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")

# SHA-256 runs at about 1 GB/s here: 256 KiB is 0.25 ms, a hop to a thread and back about 0.1 ms.
INLINE_BYTES = 256 << 10


class Verifier:
    """Threads of its own: the loop's default executor may be full of other people's work."""

    def __init__(self) -> None:
        threads = min(4, os.cpu_count() or 1)
        self._executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="kvstore-verify")

    async def run(self, num_bytes: int, check: Callable[[], _T]) -> _T:
        """The result of `check`, which hashes `num_bytes` bytes (hashlib releases the GIL)."""
        if num_bytes <= INLINE_BYTES:
            return check()
        return await asyncio.get_running_loop().run_in_executor(self._executor, check)

    def close(self) -> None:
        """Lets the threads end once their current checks are done."""
        self._executor.shutdown(wait=False, cancel_futures=True)
