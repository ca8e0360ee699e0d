"""The bulk port of a node: gets over plain sockets, a thread for each connection.

gRPC hands out the sessions (`BulkSessions`) and carries everything else. A thread moves bytes between memory and the
socket without the GIL; what is read, leased and counted is asked of the event loop, in batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from kvferry.kvstore.bulk_batches import CLOSE_TIMEOUT_S, Batches
from kvferry.kvstore.bulk_frames import (
    HELLO_BYTES,
    MAGIC,
    MAX_RECORDS,
    MAX_REQUEST_ID_BYTES,
    READY,
    REQUEST,
    encode_failure,
    encode_missing,
    encode_records_head,
)
from kvferry.kvstore.bulk_sessions import BulkSessions
from kvferry.kvstore.bulk_socket import (
    bound_reads,
    bound_writes,
    listen_locally,
    receive_exactly,
    send_all,
    send_at_once,
)
from kvferry.kvstore.config import NodeConfig
from kvferry.kvstore.errors import InvalidRequest, KVStoreError
from kvferry.kvstore.key import KEY_BYTES
from kvferry.kvstore.node_counters import NodeCounters
from kvferry.kvstore.record_source import RecordSource
from kvferry.proto.request_id import bind_request_id

_log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 2.0
REQUEST_TIMEOUT_S = 5.0  # from a request's first bytes to its last
IDLE_TIMEOUT_S = 60.0
MAX_AGE_S = 300.0  # then the client opens a new session, and is authenticated again
_FRAME_BYTES = 1 << 20  # about: a client is woken once a frame


class BulkOffer(NamedTuple):
    """What a client needs to connect; see OpenBulkReply in kvstore.proto."""

    address: str
    session: bytes
    local: str


class BulkServer:
    """Serves gets on a port of its own, and on a Unix socket for clients of the same machine. Start and stop it on the
    node's event loop.

    The Unix socket moves twice the bytes. It has a random name in the abstract namespace, so that nothing is left
    behind and a client of another machine or container finds nobody there; where `bulk_address` leads clients somewhere
    else, it is not offered.
    """

    def __init__(self, records: RecordSource, counters: NodeCounters, config: NodeConfig) -> None:
        self.sessions = BulkSessions()
        self._records = records
        self._config = config
        self._counters = counters
        self._counting = threading.Lock()
        self._connections: set[_Connection] = set()  # only the loop changes it
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

    def open_session(self) -> BulkOffer | None:
        """A session for one connection; None when it does not listen, or has as many connections as it may."""
        if self._listening is None or len(self._connections) >= self._config.max_bulk_connections:
            return None
        return BulkOffer(self._address, self.sessions.issue(), self._local_name)

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
            connection = _Connection(self, accepted, loop, self._records, self._config)
            self._connections.add(connection)
            connection.start()

    def count_get(self) -> None:
        """A get has begun. Called by the connections' threads."""
        with self._counting:
            self._counters.bulk_gets += 1

    def forget(self, connection: _Connection) -> None:
        """The connection has ended."""
        self._connections.discard(connection)


class _Connection(threading.Thread):
    """One client. Ends by itself when the client is gone, idle or stalled; `hang_up` ends it from outside."""

    def __init__(
        self,
        server: BulkServer,
        connection: socket.socket,
        loop: asyncio.AbstractEventLoop,
        records: RecordSource,
        config: NodeConfig,
    ) -> None:
        super().__init__(name="kvstore-bulk", daemon=True)
        self.is_busy = False
        self._server = server
        self._socket = connection
        self._loop = loop
        self._records = records
        self._config = config
        self._ends_at = time.monotonic() + MAX_AGE_S

    def hang_up(self) -> None:
        """Wakes the thread from whatever it waits for on the socket."""
        with contextlib.suppress(OSError):  # it has ended just now
            self._socket.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        try:
            self._socket.setblocking(True)
            send_at_once(self._socket)
            bound_writes(self._socket, self._config.stalled_reader_s)
            if self._is_welcome():
                while time.monotonic() < self._ends_at and self._serve_one():
                    pass
        except BlockingIOError:
            _log.info("a bulk connection was closed: its client took or sent nothing for too long")
        except (OSError, EOFError):
            pass  # the client has gone; it knows what it got
        except Exception:
            _log.exception("a bulk connection failed unexpectedly")
        finally:
            self._socket.close()
            with contextlib.suppress(RuntimeError):  # the loop has ended before
                self._loop.call_soon_threadsafe(self._server.forget, self)

    def _is_welcome(self) -> bool:
        bound_reads(self._socket, HELLO_TIMEOUT_S)
        hello = receive_exactly(self._socket, HELLO_BYTES)
        if not hello.startswith(MAGIC) or not self._server.sessions.redeem(hello[len(MAGIC) :]):
            _log.warning("a bulk connection was refused: its session is unknown, used or over")
            return False
        self._socket.sendall(READY)
        return True

    def _serve_one(self) -> bool:
        """One request; False when the connection must end."""
        bound_reads(self._socket, IDLE_TIMEOUT_S)
        try:
            head = receive_exactly(self._socket, REQUEST.size)
        except BlockingIOError:
            return False  # idle
        self.is_busy = True
        try:
            num_keys, timeout_ms, lease_id, num_id_bytes = REQUEST.unpack(head)
            limit = self._config.max_keys_per_request
            if not 1 <= num_keys <= limit or num_id_bytes > MAX_REQUEST_ID_BYTES:
                error = InvalidRequest(
                    f"a request must name 1 to {limit} keys, not {num_keys}, with an id of {MAX_REQUEST_ID_BYTES} "
                    f"bytes at most, not {num_id_bytes}"
                )
                self._socket.sendall(encode_failure(0, error))
                return False
            bound_reads(self._socket, REQUEST_TIMEOUT_S)
            bind_request_id(receive_exactly(self._socket, num_id_bytes).decode("ascii", errors="replace"))
            joined = receive_exactly(self._socket, num_keys * KEY_BYTES)
            keys = [joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES)]
            _log.debug("bulk get")
            return self._reply(keys, lease_id, time.monotonic() + timeout_ms / 1000)
        finally:
            self.is_busy = False

    def _reply(self, keys: list[bytes], lease_id: int, deadline: float) -> bool:
        self._server.count_get()
        batches = Batches(self._records.read(keys, lease_id), self._loop, deadline)
        index = 0
        try:
            while index < len(keys):
                try:
                    records = batches.next()
                except TimeoutError:
                    return False  # the client has given up, too
                except KVStoreError as error:
                    self._socket.sendall(encode_failure(index, error))
                    return not isinstance(error, InvalidRequest)
                found = [record for record in records if record is not None]
                if index + len(found) < len(keys) and len(found) == len(records):
                    batches.begin_next()  # meanwhile
                for group in _groups(found):
                    send_all(self._socket, [encode_records_head(index, [len(record) for record in group]), *group])
                    index += len(group)
                if len(found) < len(records):
                    self._socket.sendall(encode_missing(index))
                    return True
                if time.monotonic() > deadline:
                    return False
            return True
        finally:
            batches.close()


def _groups(records: list[bytes]) -> Iterator[list[bytes]]:
    """Those of one frame: about _FRAME_BYTES, MAX_RECORDS at most."""
    group: list[bytes] = []
    num_bytes = 0
    for record in records:
        group.append(record)
        num_bytes += len(record)
        if num_bytes >= _FRAME_BYTES or len(group) == MAX_RECORDS:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group
