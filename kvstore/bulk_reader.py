"""One get over a bulk connection: a thread receives and checks records, the event loop takes them.

The thread reads ahead until AHEAD_BYTES wait for the caller, who takes all of them at once; then the socket holds the
node back. It hands records over and wakes the loop after a mebibyte, when one was slow to come, and where the next
frame is not there yet: a wake-up a record cost half of the speed at 64 KiB.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from kvferry.kvstore.bulk_frames import (
    HEADER,
    LENGTH_BYTES,
    MAX_FAILURE_BYTES,
    MAX_RECORDS,
    Kind,
    decode_lengths,
    encode_request,
    failure,
    missing,
)
from kvferry.kvstore.bulk_socket import bound_reads
from kvferry.kvstore.codec import Record, decode_moved_record
from kvferry.kvstore.config import MIB
from kvferry.kvstore.errors import BlockCorrupt, InvalidRequest, KVStoreError, StoreUnavailable
from kvferry.kvstore.record_reader import Read
from kvferry.proto.request_id import current_request_id

AHEAD_BYTES = 4 * MIB
"""What waits for one caller, about. With 2 MiB a loop that is a millisecond late holds the thread up: 3 to 10 %."""
_WAKE_BYTES = MIB
_SLOW_S = 0.001


class BulkReader:
    """A running get. Make it on the event loop; `done` is called there with the connection once the thread has left it,
    and whether the reply was read to its end."""

    def __init__(
        self,
        connection: socket.socket,
        executor: Executor,
        keys: Sequence[bytes],
        *,
        namespace: bytes,
        lease_id: int,
        timeout_s: float,
        progress_timeout_s: float,
        max_record_bytes: int,
        done: Callable[[socket.socket, bool], None],
    ) -> None:
        self._connection = connection
        self._keys = keys
        self._namespace = namespace
        self._lease_id = lease_id
        self._request_id = current_request_id()
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._progress_timeout_s = progress_timeout_s
        self._max_record_bytes = max_record_bytes
        self._loop = asyncio.get_running_loop()
        self._changed = threading.Condition()  # guards all below
        self._ahead: list[Read] = []
        self._ahead_bytes = 0
        self._error: Exception | None = None  # what comes after them
        self._waiter: asyncio.Future[None] | None = None
        self._is_closed = False
        self._is_over = False  # the whole reply was read: the connection can serve another get
        self._fresh: list[Read] = []  # the thread's own, as the next
        self._fresh_bytes = 0
        self._thread = self._loop.run_in_executor(executor, self._run)
        self._thread.add_done_callback(lambda _: done(connection, self._is_over))

    async def next(self) -> Sequence[Read]:
        """See `Reader`."""
        while True:
            with self._changed:
                if self._ahead:
                    reads, self._ahead, self._ahead_bytes = self._ahead, [], 0
                    self._changed.notify()
                    return reads
                if self._error is not None:
                    raise self._error
                waiter = self._waiter = self._loop.create_future()
            await waiter

    async def close(self) -> None:
        """See `Reader`. Waits for the thread, which leaves at once."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
            if not self._is_over and not self._thread.done():
                with contextlib.suppress(OSError):  # the other side has gone already
                    self._connection.shutdown(socket.SHUT_RDWR)  # wakes the thread
        await asyncio.wait([self._thread])
        self._ahead.clear()

    def _run(self) -> None:
        try:
            self._receive_all()
        except (BlockingIOError, TimeoutError):
            if time.monotonic() >= self._deadline:
                self._hand_over(StoreUnavailable(f"the get took longer than its {self._timeout_s:.3g} s"))
            else:
                self._hand_over(StoreUnavailable(f"the store sent nothing for {self._progress_timeout_s} s"))
        except (OSError, EOFError) as error:
            self._hand_over(StoreUnavailable(f"the connection to the node ended before the last record: {error}"))
        except KVStoreError as error:
            self._hand_over(error)
        except BaseException as error:  # a defect: the caller must not wait for ever
            self._hand_over(StoreUnavailable(f"the get failed unexpectedly: {error!r}"))
            raise

    def _receive_all(self) -> None:
        self._bound_reads()
        timeout_s = self._deadline - time.monotonic()
        request = encode_request(self._keys, lease_id=self._lease_id, timeout_s=timeout_s, request_id=self._request_id)
        self._connection.sendall(request)
        num_keys, due = len(self._keys), 0
        while due < num_keys:
            index, kind, number = HEADER.unpack(self._receive_header())
            if index != due:
                raise BlockCorrupt("the node sent another block than the one that is due")
            if kind == Kind.MISSING and number == 0:
                self._is_over = True
                raise missing(due, num_keys)
            if kind in (Kind.UNAVAILABLE, Kind.INVALID) and number <= MAX_FAILURE_BYTES:
                message = self._receive(number)
                self._is_over = kind == Kind.UNAVAILABLE
                raise failure(kind, message)
            if kind != Kind.RECORDS or not 1 <= number <= min(MAX_RECORDS, num_keys - due):
                raise BlockCorrupt("the node sent a frame that is none")
            lengths = decode_lengths(self._receive(number * LENGTH_BYTES))
            for num_bytes in lengths:
                started = time.monotonic()
                if not self._receive_record(self._keys[due], num_bytes):
                    return  # the caller stops at the damaged one
                due += 1
                is_due = self._fresh_bytes >= _WAKE_BYTES or time.monotonic() - started > _SLOW_S
                if is_due and due < num_keys:  # the last ones go when the connection is known to be free again
                    self._hand_over()
        self._is_over = True
        self._hand_over()

    def _receive_record(self, key: bytes, num_bytes: int) -> bool:
        """Whether it was intact; if not, it was handed over."""
        if num_bytes == 0:
            raise BlockCorrupt("the node sent a record that is none")
        if num_bytes > self._max_record_bytes:
            raise InvalidRequest(
                f"the stored record has {num_bytes} bytes, over this client's max_record_bytes = "
                f"{self._max_record_bytes}"
            )
        is_late = time.monotonic() + self._progress_timeout_s > self._deadline
        if self._ahead_bytes + self._fresh_bytes >= AHEAD_BYTES or is_late:
            self._wait_for_room()
        outcome = self._check(self._receive(num_bytes), key)
        self._fresh.append(Read(num_bytes, outcome))
        self._fresh_bytes += num_bytes
        if isinstance(outcome, BlockCorrupt):
            self._hand_over()
            return False
        return True

    def _check(self, record: bytes, key: bytes) -> Record | BlockCorrupt:
        try:
            return decode_moved_record(
                record,
                expected_key=key,
                expected_namespace=self._namespace,
                max_record_bytes=self._max_record_bytes,
            )
        except BlockCorrupt as error:
            return error

    def _receive(self, num_bytes: int) -> bytes:
        """All of it. In one call, unless it takes longer than `progress_timeout_s`."""
        part = self._connection.recv(num_bytes, socket.MSG_WAITALL)
        if len(part) == num_bytes:
            return part
        parts: list[bytes] = []
        while True:
            if not part:
                raise EOFError("it was closed")
            parts.append(part)
            num_bytes -= len(part)
            if not num_bytes:
                return b"".join(parts)
            self._bound_reads()
            part = self._connection.recv(num_bytes, socket.MSG_WAITALL)

    def _receive_header(self) -> bytes:
        """Hands over what has come where the next frame is not there yet."""
        try:
            part = self._connection.recv(HEADER.size, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._hand_over()
            return self._receive(HEADER.size)
        if not part:
            raise EOFError("it was closed")
        return part if len(part) == HEADER.size else part + self._receive(HEADER.size - len(part))

    def _bound_reads(self) -> None:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        bound_reads(self._connection, min(self._progress_timeout_s, left_s))

    def _wait_for_room(self) -> None:
        """And bounds the reads by what is left of the time."""
        self._hand_over()
        with self._changed:
            while self._ahead_bytes >= AHEAD_BYTES and not self._is_closed:
                if not self._changed.wait(max(0.0, self._deadline - time.monotonic())):
                    raise TimeoutError
        self._bound_reads()

    def _hand_over(self, error: Exception | None = None) -> None:
        """Gives the caller what has come, and wakes it if it waits."""
        with self._changed:
            self._ahead += self._fresh
            self._ahead_bytes += self._fresh_bytes
            self._error = error
            waiter, self._waiter = self._waiter, None
        self._fresh, self._fresh_bytes = [], 0
        if waiter is not None:
            self._loop.call_soon_threadsafe(_wake, waiter)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
