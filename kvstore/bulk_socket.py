"""Blocking sockets whose waits end: the kernel bounds them, so that a read or write is one system call.

With `socket.settimeout` Python would poll before each call and return whatever has come. Here `recv` with MSG_WAITALL
takes a whole record in one call, into fresh bytes that nobody filled with zeros before.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence

_TIMEVAL = struct.Struct("@ll")
Bytes = bytes | memoryview
_SEND_BYTES = 256 << 10
"""What one call sends, a record more or less."""
_UNIX_BUFFER_BYTES = 1 << 20


def listen_locally(name: str) -> socket.socket:
    """On the Unix socket `name` in the abstract namespace, which Linux alone has."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(local_address(name))
    listening.listen(128)
    return listening


def local_address(name: str) -> str:
    """What to bind or connect to for a name in the abstract namespace. It is gone with its last socket."""
    return f"\0{name}"


def send_at_once(connection: socket.socket) -> None:
    """Not held back until earlier bytes were acknowledged, as TCP would; and with room for what is on its way."""
    if connection.family == socket.AF_UNIX:
        # Does not grow by itself, as TCP's does. The kernel grants what wmem_max allows, twice the default: 3 % faster.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER_BYTES)
    else:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def bound_reads(connection: socket.socket, seconds: float) -> None:
    """A read that gets no byte for so long raises BlockingIOError."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timestruct(seconds))


def bound_writes(connection: socket.socket, seconds: float) -> None:
    """A write that cannot send a byte for so long raises BlockingIOError."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timestruct(seconds))


def receive_exactly(connection: socket.socket, num_bytes: int, deadline: float) -> bytes:
    """Raises EOFError when the other side ends before, BlockingIOError when not all has come at the deadline (by
    `time.monotonic`)."""
    parts: list[bytes] = []
    while num_bytes:
        bound_reads(connection, deadline - time.monotonic())
        part = connection.recv(num_bytes, socket.MSG_WAITALL)
        if not part:
            raise EOFError("the other side closed the connection")
        parts.append(part)
        num_bytes -= len(part)
        if num_bytes and time.monotonic() >= deadline:
            raise BlockingIOError
    return parts[0] if len(parts) == 1 else b"".join(parts)


def send_all(connection: socket.socket, parts: Sequence[Bytes]) -> None:
    """Sends the parts, without joining them. Raises BlockingIOError when the other side takes nothing."""
    start, num_bytes = 0, 0
    for end, part in enumerate(parts, 1):
        num_bytes += len(part)
        if num_bytes >= _SEND_BYTES or end == len(parts):
            sent = connection.sendmsg(parts[start:end])
            if sent < num_bytes:
                _send_rest(connection, parts[start:end], sent)
            start, num_bytes = end, 0


def _send_rest(connection: socket.socket, parts: Sequence[Bytes], sent: int) -> None:
    """The parts but for their first `sent` bytes."""
    for part in parts:
        if sent < len(part):
            connection.sendall(memoryview(part)[sent:])
        sent = max(0, sent - len(part))


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
