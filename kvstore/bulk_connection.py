"""One client's connection to a node's bulk port: a thread that serves its requests, one after the other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from kvferry.kvstore.bulk_batches import Batches
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
from kvferry.kvstore.bulk_sessions import BulkSessions, Purpose
from kvferry.kvstore.bulk_socket import bound_reads, bound_writes, receive_exactly, send_all, send_at_once
from kvferry.kvstore.bulk_taking import take_records
from kvferry.kvstore.config import NodeConfig
from kvferry.kvstore.errors import InvalidRequest, KVStoreError
from kvferry.kvstore.key import KEY_BYTES
from kvferry.kvstore.node_counters import NodeCounters
from kvferry.kvstore.record_sink import RecordSink
from kvferry.kvstore.record_source import RecordSource
from kvferry.proto.request_id import bind_request_id

_log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 2.0
REQUEST_TIMEOUT_S = 5.0  # from a request's first byte to its last
IDLE_TIMEOUT_S = 60.0
MAX_AGE_S = 300.0  # then the client opens a new session, and is authenticated again
_FRAME_BYTES = 1 << 20  # about


class BulkService:
    """What all connections of a node serve from."""

    def __init__(
        self,
        sessions: BulkSessions,
        records: RecordSource,
        sink: RecordSink,
        counters: NodeCounters,
        config: NodeConfig,
    ) -> None:
        self.sessions = sessions
        self.records = records
        self.sink = sink
        self.config = config
        self._counters = counters
        self._counting = threading.Lock()

    def count(self, *, gets: int = 0, puts: int = 0) -> None:
        """Those that have begun; from any thread."""
        with self._counting:
            self._counters.bulk_gets += gets
            self._counters.bulk_puts += puts


class Request(NamedTuple):
    """What gets and puts begin with."""

    keys: list[bytes]
    lease_id: int
    timeout_s: float


class Connection(threading.Thread):
    """One client. Ends by itself when the client is gone, idle or stalled; `hang_up` ends it from outside."""

    def __init__(
        self,
        connection: socket.socket,
        service: BulkService,
        loop: asyncio.AbstractEventLoop,
        ended: Callable[[Connection], None],
    ) -> None:
        """`ended` is called on the loop."""
        super().__init__(name="kvstore-bulk", daemon=True)
        self.is_busy = False
        self._socket = connection
        self._service = service
        self._loop = loop
        self._ended = ended
        self._ends_at = time.monotonic() + MAX_AGE_S

    def hang_up(self) -> None:
        """Wakes the thread from whatever it waits for on the socket."""
        with contextlib.suppress(OSError):  # it has ended just now
            self._socket.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        try:
            self._socket.setblocking(True)
            send_at_once(self._socket)
            bound_writes(self._socket, self._service.config.stalled_reader_s)
            purpose = self._greet()
            if purpose is not None:
                serve = self._get if purpose is Purpose.GETS else self._put
                while time.monotonic() < self._ends_at and self._serve_one(serve):
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
                self._loop.call_soon_threadsafe(self._ended, self)

    def _greet(self) -> Purpose | None:
        """What the connection is for; None: it is not welcome."""
        hello = receive_exactly(self._socket, HELLO_BYTES, time.monotonic() + HELLO_TIMEOUT_S)
        purpose = self._service.sessions.redeem(hello[len(MAGIC) :]) if hello.startswith(MAGIC) else None
        if purpose is None:
            _log.warning("a bulk connection was refused: its session is unknown, used or over")
            return None
        self._socket.sendall(READY)
        return purpose

    def _serve_one(self, serve: Callable[[Request], bool]) -> bool:
        """One request; False when the connection must end."""
        bound_reads(self._socket, IDLE_TIMEOUT_S)
        try:
            first = self._socket.recv(1)
        except BlockingIOError:
            return False  # idle
        if not first:
            return False
        self.is_busy = True
        try:
            deadline = time.monotonic() + REQUEST_TIMEOUT_S
            num_keys, timeout_ms, lease_id, num_id_bytes = REQUEST.unpack(
                first + receive_exactly(self._socket, REQUEST.size - 1, deadline)
            )
            limit = self._service.config.max_keys_per_request
            if not 1 <= num_keys <= limit or num_id_bytes > MAX_REQUEST_ID_BYTES:
                error = InvalidRequest(
                    f"a request must name 1 to {limit} keys, not {num_keys}, with an id of {MAX_REQUEST_ID_BYTES} "
                    f"bytes at most, not {num_id_bytes}"
                )
                self._socket.sendall(encode_failure(0, error))
                return False
            bind_request_id(receive_exactly(self._socket, num_id_bytes, deadline).decode("ascii", errors="replace"))
            joined = receive_exactly(self._socket, num_keys * KEY_BYTES, deadline)
            keys = [joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES)]
            return serve(Request(keys, lease_id, timeout_ms / 1000))
        finally:
            self.is_busy = False

    def _put(self, request: Request) -> bool:
        _log.debug("bulk put")
        self._service.count(puts=1)
        try:
            take_records(self._socket, self._service.sink, request.keys, self._loop, self._service.config)
        except KVStoreError as error:
            self._socket.sendall(encode_failure(0, error))
            return False
        return True

    def _get(self, request: Request) -> bool:
        _log.debug("bulk get")
        self._service.count(gets=1)
        keys, deadline = request.keys, time.monotonic() + request.timeout_s
        batches = Batches(self._service.records.read(keys, request.lease_id), self._loop, deadline)
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
