"""Messages between leader and follower over a Unix socket: msgpack, with a length before it, and file descriptors."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import msgpack  # type: ignore[import-untyped]

_LENGTH_BYTES = 8
_CHUNK_BYTES = 1 << 20
_FDS = "fds"


def pack(message: dict[str, Any], *, num_fds: int = 0) -> bytes:
    """A message as bytes. Values are what msgpack knows; `bytes` stay bytes."""
    body: bytes = msgpack.packb(message | {_FDS: num_fds} if num_fds else message)
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


class Channel:
    """One end. One thread sends, one receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def send(self, packed: bytes, fds: Sequence[int] = ()) -> None:
        """`packed`: from `pack`, with the number of `fds`. Raises OSError when the other end is gone."""
        self._socket.sendall(packed)
        if fds:
            socket.send_fds(self._socket, [b"\0"], list(fds))

    def receive(self) -> dict[str, Any] | None:
        """Waits for the next message; None when the other end is gone. `fds` of it are open files of this process."""
        head = self._read(_LENGTH_BYTES)
        body = head and self._read(int.from_bytes(head, "little"))
        if not body:
            return None
        message: dict[str, Any] = msgpack.unpackb(body)
        if count := message.get(_FDS, 0):
            _, fds, _, _ = socket.recv_fds(self._socket, 1, count)
            if len(fds) != count:
                return None
            message[_FDS] = fds
        return message

    def close(self) -> None:
        self._socket.close()

    def _read(self, count: int) -> bytearray | None:
        buffer = bytearray(count)
        view = memoryview(buffer)
        while view:
            try:
                got = self._socket.recv_into(view[:_CHUNK_BYTES])
            except ConnectionError:
                return None
            if not got:
                return None
            view = view[got:]
        return buffer
