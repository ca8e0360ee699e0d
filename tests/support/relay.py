"""A TCP relay in front of a real server: breaks every connection, as a killed process does, or is a slow link."""

from __future__ import annotations

import asyncio


class Relay:
    """Passes bytes both ways until `cut`; what the server sends can be slowed down."""

    def __init__(self) -> None:
        self.address = ""
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._bytes_per_s = float("inf")
        self._fast_bytes = 0

    async def start(self, target: str, port: int = 0) -> None:
        self._host, _, target_port = target.rpartition(":")
        self._port = int(target_port)
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def slow_down(self, bytes_per_s: float, *, after: int = 0) -> None:
        """From the server to its clients, all connections together, once `after` more bytes have passed."""
        self._bytes_per_s, self._fast_bytes = bytes_per_s, after

    def speed_up(self) -> None:
        self._bytes_per_s = float("inf")

    def cut(self) -> None:
        """Resets all connections; new ones are refused from now on."""
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def stop(self) -> None:
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_connection(self._host, self._port)
        self._writers |= {writer, other_writer}
        for source, sink, from_server in ((reader, other_writer, False), (other_reader, writer, True)):
            task = asyncio.create_task(self._pass(source, sink, from_server=from_server))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, from_server: bool) -> None:
        try:
            while data := await source.read(65536):
                while data:
                    piece = await self._throttle(data) if from_server else data
                    sink.write(piece)
                    await sink.drain()
                    data = data[len(piece) :]
        except ConnectionError:
            pass
        finally:
            self._writers.discard(sink)
            sink.close()

    async def _throttle(self, data: bytes) -> bytes:
        """The first bytes of `data`, when it is their turn."""
        if self._bytes_per_s == float("inf"):
            return data
        if self._fast_bytes:
            piece = data[: self._fast_bytes]
            self._fast_bytes -= len(piece)
            return piece
        piece = data[:1024]
        await asyncio.sleep(len(piece) / self._bytes_per_s)
        return piece
