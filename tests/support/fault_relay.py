"""A TCP relay that counts bytes and, after a given one, does something to its target, the connections or a bit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal

from kvferry.kvstore.bulk_frames import MAGIC

Direction = Literal["up", "down"]
"""Up: from the client to the server."""


class FaultRelay:
    """Passes bytes both ways; one fault at a time is armed, and happens between two bytes.

    `passed` counts bytes by direction since the last `arm` or `watch`, over all connections; `fired` counts the faults
    that happened. While the target does not answer, connections are closed as soon as they are made. With a
    `bulk_target` connections that begin as those to a bulk port do lead there.
    """

    def __init__(self) -> None:
        self.address = ""
        self.target = ""
        self.bulk_target = ""
        self.fired = 0
        self.passed: dict[Direction, int] = {"up": 0, "down": 0}
        self._armed: tuple[Direction, int, Callable[[], None] | None] | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def watch(self) -> None:
        """Counts from 0, without a fault."""
        self._armed = None
        self.passed = {"up": 0, "down": 0}

    def arm(self, direction: Direction, after: int, fault: Callable[[], None] | None) -> None:
        """After `after` more bytes in that direction, `fault` is called; None: a bit of the next byte is flipped."""
        self.watch()
        self._armed = (direction, after, fault)

    def cut(self) -> None:
        """Resets all connections; new ones are taken."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def stop(self) -> None:
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = b""
        try:
            if self.bulk_target:
                first = await reader.readexactly(len(MAGIC))
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.transport.abort()
            return
        host, _, port = (self.bulk_target if first == MAGIC else self.target).rpartition(":")
        try:
            other_reader, other_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, other_writer}
        ways: tuple[tuple[Direction, asyncio.StreamReader, asyncio.StreamWriter, bytes], ...]
        ways = (("up", reader, other_writer, first), ("down", other_reader, writer, b""))
        for way in ways:
            task = asyncio.create_task(self._pass(*way))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(
        self, direction: Direction, source: asyncio.StreamReader, sink: asyncio.StreamWriter, first: bytes
    ) -> None:
        try:
            while data := first or await source.read(65536):
                first = b""
                sink.write(await self._through(direction, data, sink))
                await sink.drain()
        except ConnectionError:
            pass  # the fault, or a side that has gone
        finally:
            self._writers.discard(sink)
            sink.close()

    async def _through(self, direction: Direction, data: bytes, sink: asyncio.StreamWriter) -> bytes:
        """What is still to be sent of `data`."""
        before = self.passed[direction]
        self.passed[direction] += len(data)
        if self._armed is None or self._armed[0] != direction or self.passed[direction] <= self._armed[1]:
            return data
        _, after, fault = self._armed
        self._armed = None
        self.fired += 1
        at = after - before
        if fault is None:
            return data[:at] + bytes([data[at] ^ (1 << (after % 8))]) + data[at + 1 :]
        sink.write(data[:at])
        await sink.drain()
        await asyncio.sleep(0.002 * (after % 2))  # every other time the other side has read them
        fault()
        return data[at:]
