"""A relay that lets so many bits a second through in each direction, for all connections together."""

from __future__ import annotations

import asyncio
import time

CHUNK_BYTES = 16 * 1024


class SlowLink:
    """In front of one address. A token bucket without a burst: a chunk leaves when its time has come."""

    def __init__(self, target: str, *, bits_per_s: float) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._bytes_per_s = bits_per_s / 8
        self._free_at = [0.0, 0.0]  # of each direction
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        """host:port of the relay."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Ends all connections."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            other_reader, other_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.close()  # as a refused connection, for whoever connects
            return
        for direction, (source, sink) in enumerate(((reader, other_writer), (other_reader, writer))):
            task = asyncio.create_task(self._relay(source, sink, direction))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _relay(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, direction: int) -> None:
        try:
            while data := await source.read(CHUNK_BYTES):
                now = time.monotonic()
                leaves_at = max(self._free_at[direction], now) + len(data) / self._bytes_per_s
                self._free_at[direction] = leaves_at
                await asyncio.sleep(leaves_at - now)
                sink.write(data)
                await sink.drain()
        except ConnectionError:
            pass  # one end is gone: so is the connection
        finally:
            sink.close()
