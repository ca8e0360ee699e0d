"""The bulk port of a node: gets and puts over plain sockets, a thread for each connection.

gRPC hands out the sessions (`BulkSessions`) and carries everything else. A thread (`bulk_connection`) moves bytes
between memory and the socket without the GIL; what is read, leased and counted is asked of the event loop, in batches.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import sys
import time
from typing import NamedTuple

from kvferry.kvstore.bulk_batches import CLOSE_TIMEOUT_S
from kvferry.kvstore.bulk_connection import BulkService, Connection
from kvferry.kvstore.bulk_sessions import BulkSessions, Purpose
from kvferry.kvstore.bulk_socket import listen_locally
from kvferry.kvstore.config import NodeConfig
from kvferry.kvstore.node_counters import NodeCounters
from kvferry.kvstore.record_sink import RecordSink
from kvferry.kvstore.record_source import RecordSource

_log = logging.getLogger(__name__)


class BulkOffer(NamedTuple):
    """What a client needs to connect; see OpenBulkReply in kvstore.proto."""

    address: str
    session: bytes
    local: str


class BulkServer:
    """Serves gets and puts on a port of its own, and on a Unix socket for clients of the same machine. Start and stop
    it on the node's event loop.

    The Unix socket moves twice the bytes. It has a random name in the abstract namespace, so that nothing is left
    behind and a client of another machine or container finds nobody there; where `bulk_address` leads clients somewhere
    else, it is not offered.
    """

    def __init__(self, records: RecordSource, sink: RecordSink, counters: NodeCounters, config: NodeConfig) -> None:
        self.sessions = BulkSessions()
        self._config = config
        self._service = BulkService(self.sessions, records, sink, counters, config)
        self._connections: set[Connection] = set()  # only the loop changes it
        self._listening: socket.socket | None = None
        self._local: socket.socket | None = None
        self._accepting: list[asyncio.Task[None]] = []
        self._address = ""
        self._local_name = ""

    @property
    def num_connections(self) -> int:
        return len(self._connections)

    @property
    def port(self) -> int:
        """0 while it does not listen."""
        return 0 if self._listening is None else int(self._listening.getsockname()[1])

    async def start(self) -> None:
        """Listens. Raises OSError when it cannot."""
        host, port = self._config.host, self._config.bulk_port or 0
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listening = socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            raise OSError(f"cannot listen on {host}, bulk port {port}: is it taken? ({error.strerror})") from error
        self._listening = listening
        self._address = self._config.bulk_address or f":{self.port}"
        if self._config.bulk_address is None and sys.platform == "linux":
            self._local_name = f"kvferry-bulk-{secrets.token_hex(16)}"
            self._local = listen_locally(self._local_name)
        for taking in (self._listening, self._local):
            if taking is not None:
                taking.setblocking(False)
                self._accepting.append(asyncio.create_task(self._accept(taking), name="kvstore-bulk-accept"))

    def open_session(self, purpose: Purpose) -> BulkOffer | None:
        """A session for one connection; None when it does not listen, or has as many connections as it may."""
        if self._listening is None or len(self._connections) >= self._config.max_bulk_connections:
            return None
        return BulkOffer(self._address, self.sessions.issue(purpose), self._local_name)

    async def stop(self, grace_s: float) -> None:
        """Takes no more connections, lets running gets end within `grace_s`, then closes all."""
        for accepting in self._accepting:
            accepting.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        for listening in (self._listening, self._local):
            if listening is not None:
                listening.close()
        self._listening = self._local = None
        deadline = time.monotonic() + grace_s
        while any(connection.is_busy for connection in self._connections) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        for connection in self._connections:
            connection.hang_up()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while self._connections and time.monotonic() < deadline:  # the threads take their leave on this loop
            await asyncio.sleep(0.005)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listening)
            except OSError as error:  # too many open files, or the peer has gone
                _log.warning("cannot take a bulk connection: %s", error)
                await asyncio.sleep(0.1)
                continue
            if len(self._connections) >= self._config.max_bulk_connections:
                accepted.close()
                continue
            connection = Connection(accepted, self._service, loop, self._forget)
            self._connections.add(connection)
            connection.start()

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
