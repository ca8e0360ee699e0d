"""Blocking sockets whose waits end: the kernel bounds them, so that a read or write is one system call.

With `socket.settimeout` Python would poll before each call and return whatever has come. Here `recv` with MSG_WAITALL
takes a whole record in one call, into fresh bytes that nobody filled with zeros before.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from collections.abc import Sequence

_TIMEVAL = struct.Struct("@ll")
Bytes = bytes | memoryview
_SEND_BYTES = 256 << 10
"""What one call sends, a record more or less."""


def bound_reads(connection: socket.socket, seconds: float) -> None:
    """A read that gets no byte for so long raises BlockingIOError."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timestruct(seconds))


def bound_writes(connection: socket.socket, seconds: float) -> None:
    """A write that cannot send a byte for so long raises BlockingIOError."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timestruct(seconds))


def receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    """Raises EOFError when the other side ends before, BlockingIOError when nothing comes."""
    parts: list[bytes] = []
    while num_bytes:
        part = connection.recv(num_bytes, socket.MSG_WAITALL)
        if not part:
            raise EOFError("the other side closed the connection")
        parts.append(part)
        num_bytes -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def send_all(connection: socket.socket, parts: Sequence[Bytes]) -> None:
    """Sends the parts, without joining them. Raises BlockingIOError when the other side takes nothing."""
    group: list[memoryview] = []
    num_bytes = 0
    for part in parts:
        group.append(memoryview(part))
        num_bytes += len(part)
        if num_bytes >= _SEND_BYTES:
            _send_group(connection, group)
            group, num_bytes = [], 0
    _send_group(connection, group)


def _send_group(connection: socket.socket, left: list[memoryview]) -> None:
    while left:
        sent = connection.sendmsg(left)
        while left and sent >= left[0].nbytes:
            sent -= left.pop(0).nbytes
        if sent:
            left[0] = left[0][sent:]


def num_waiting(connection: socket.socket) -> int:
    """Bytes that have come and were not read."""
    answer = fcntl.ioctl(connection.fileno(), termios.FIONREAD, bytes(4))
    return int.from_bytes(answer, "little")


def is_quiet(connection: socket.socket) -> bool:
    """Whether an idle connection is still open, and nobody sent what was not asked for."""
    try:
        connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _timestruct(seconds: float) -> bytes:
    # 0 would mean to wait for ever.
    microseconds = max(1000, int(seconds * 1e6))
    return _TIMEVAL.pack(microseconds // 1_000_000, microseconds % 1_000_000)
