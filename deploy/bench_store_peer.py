"""Other systems' transports beside the store node in `kvferry bench store`, each in processes of its own."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

from kvferry.deploy import bench_store_mooncake

START_TIMEOUT_S = 60.0
ROUND_TIMEOUT_S = 120.0
BATCH = 8

Contender = Callable[[], Awaitable[float]]


async def mooncake_contenders(stack: AsyncExitStack, python: Path, size: int, count: int) -> dict[str, Contender]:
    """Mooncake's TCP reads, one record a call and several. `python`: an interpreter that has its package.

    Raises RuntimeError, with what the peer said, when it does not start.
    """
    return {
        name: await _start(stack, python, size, count, batch)
        for name, batch in (("Mooncake TCP read, one by one", 1), (f"Mooncake TCP read, {BATCH} at once", BATCH))
    }


async def _start(stack: AsyncExitStack, python: Path, size: int, count: int, batch: int) -> Contender:
    process = await asyncio.create_subprocess_exec(
        str(python), bench_store_mooncake.__file__, "read", str(size), str(count), str(batch),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    stack.push_async_callback(_end, process)
    await _line(process, b"ready", START_TIMEOUT_S)

    async def run() -> float:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        return float((await _line(process, b"took", ROUND_TIMEOUT_S)).split()[1])

    return run


async def _line(process: asyncio.subprocess.Process, start: bytes, timeout_s: float) -> bytes:
    """The next line with this start; the peer's own log goes to the same stream."""
    assert process.stdout is not None
    async with asyncio.timeout(timeout_s):
        while line := await process.stdout.readline():
            if line.startswith(start):
                return line
        assert process.stderr is not None
        said = (await process.stderr.read()).decode(errors="replace").strip()
    raise RuntimeError(f"the peer ended: {said[-500:]}")


async def _end(process: asyncio.subprocess.Process) -> None:
    """End of input lets the peer end its own server."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(5.0):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
