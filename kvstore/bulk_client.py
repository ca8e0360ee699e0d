"""A client's connections to the bulk port of its node: opened with sessions from gRPC, kept, and used again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc.aio

from kvferry.kvstore.bulk_frames import MAGIC, READY, SESSION_BYTES
from kvferry.kvstore.bulk_socket import bound_writes, is_quiet, local_address, send_at_once
from kvferry.kvstore.config import ClientConfig
from kvferry.proto import kvstore_pb2 as pb

_log = logging.getLogger(__name__)

MAX_IDLE_S = 30.0
RETRY_S = 10.0
"""After a bulk port could not be used: how long gRPC is used before it is tried again."""


class BulkConnections:
    """Connections for one purpose, while the node's bulk port can be used. Use it on one event loop.

    `max_running`: at one time, each with a thread of `executor`.
    """

    def __init__(
        self,
        config: ClientConfig,
        open_session: Callable[[], Awaitable[pb.OpenBulkReply]],
        *,
        max_running: int,
        name: str,
    ) -> None:
        self._config = config
        self._open_session = open_session
        self._max_running = max_running
        self._idle: list[tuple[socket.socket, float]] = []
        self._num_running = 0
        self._try_again_at = 0.0
        self._is_closed = False
        self.executor = ThreadPoolExecutor(max_running, thread_name_prefix=name)

    async def take(self) -> socket.socket | None:
        """A blocking connection, to be given back; None when gRPC has to do."""
        if self._num_running >= self._max_running:
            return None
        self._num_running += 1
        try:
            connection = self._reused() or await self._opened()
        except BaseException:
            self._num_running -= 1
            raise
        if connection is None or self._is_closed:
            self._num_running -= 1
            if connection is not None:
                connection.close()
            return None
        return connection

    def give_back(self, connection: socket.socket, can_be_reused: bool) -> None:
        """Nobody uses it any more."""
        self._num_running -= 1
        if can_be_reused and not self._is_closed:
            self._idle.append((connection, time.monotonic()))
        else:
            connection.close()

    def close(self) -> None:
        """Closes what is idle; whoever has a connection ends it."""
        self._is_closed = True
        for connection, _ in self._idle:
            connection.close()
        self._idle.clear()
        self.executor.shutdown(wait=False)

    def _reused(self) -> socket.socket | None:
        while self._idle:
            connection, since = self._idle.pop()
            if time.monotonic() - since < MAX_IDLE_S and is_quiet(connection):
                return connection
            connection.close()
        return None

    async def _opened(self) -> socket.socket | None:
        if time.monotonic() < self._try_again_at:
            return None
        reason = "the node offers none"
        try:
            offer = await self._open_session()
            if offer.address:
                if len(offer.session) != SESSION_BYTES:
                    raise ValueError("the node's session is none")
                async with asyncio.timeout(self._config.lookup_timeout_s):
                    connection = await self._connect(offer)
                    return await self._greet(connection, offer.session)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return None  # the node is away or slow: the call over gRPC will say so
            reason = f"the node answered {error.code().name}"
        except (OSError, ValueError, EOFError, TimeoutError) as error:
            reason = f"{type(error).__name__}: {error}"
        self._try_again_at = time.monotonic() + RETRY_S
        _log.info("no bulk port at %s (%s): records go over gRPC", self._config.address, reason)
        return None

    async def _connect(self, offer: pb.OpenBulkReply) -> socket.socket:
        """Raises OSError or ValueError."""
        loop = asyncio.get_running_loop()
        if offer.local and self._config.use_local and sys.platform == "linux":
            with contextlib.suppress(OSError):  # nobody has this name here: the node is on another machine
                return await _connected(socket.AF_UNIX, 0, local_address(offer.local))
        host, _, port = offer.address.rpartition(":")
        host = (host or self._config.address.rpartition(":")[0]).strip("[]")
        found = await loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        family, _, protocol, _, where = found[0]
        return await _connected(family, protocol, where)

    async def _greet(self, connection: socket.socket, session: bytes) -> socket.socket:
        """The connection, which it closes otherwise. Raises OSError or EOFError."""
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(connection, MAGIC + session)
            if await loop.sock_recv(connection, 1) != READY:
                raise EOFError("the node refused the session")
            connection.setblocking(True)
            bound_writes(connection, self._config.progress_timeout_s)
        except BaseException:
            connection.close()
            raise
        return connection


async def _connected(family: int, protocol: int, address: Any) -> socket.socket:
    """Non-blocking. Raises OSError."""
    connection = socket.socket(family, socket.SOCK_STREAM, protocol)
    try:
        connection.setblocking(False)
        send_at_once(connection)
        await asyncio.get_running_loop().sock_connect(connection, address)
    except BaseException:
        connection.close()
        raise
    return connection
