"""The baselines of `kvferry bench store`: plain sockets that move messages of given sizes.

Run as a process it serves one connection after the other, over TCP on loopback, or with "unix" over a Unix socket in
the abstract namespace. A request is (kind, count, size): "g" answers with `count` messages of `size` bytes, "p" takes
as many and answers with one byte. "g" sends the same message again and again, out of the processor's caches; "d" sends
as many different ones, as a store has to.
"""

from __future__ import annotations

import secrets
import socket
import struct
import sys
import time

from kvferry.kvstore.bulk_socket import bound_reads, bound_writes, listen_locally, local_address, send_at_once
from kvferry.kvstore.malloc import tune_malloc

_REQUEST = struct.Struct("<cQQ")


def serve(*, over_unix: bool) -> None:
    """Prints its port or its socket's name, then serves until it is ended."""
    tune_malloc()
    if over_unix:
        place = f"kvferry-bench-{secrets.token_hex(16)}"
        listening = listen_locally(place)
    else:
        listening = socket.create_server(("127.0.0.1", 0))
        place = str(listening.getsockname()[1])
    with listening:
        print(place, flush=True)
        while True:
            connection, _ = listening.accept()
            with connection:
                _serve_one(connection)


def connect(place: str, *, over_unix: bool, timeout_s: float) -> socket.socket:
    """To a server that printed `place`. Raises OSError."""
    if over_unix:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(local_address(place))
    else:
        connection = socket.create_connection(("127.0.0.1", int(place)), timeout_s)
        connection.settimeout(None)
    bound_reads(connection, timeout_s)
    bound_writes(connection, timeout_s)
    send_at_once(connection)
    return connection


def move_seconds(connection: socket.socket, *, put: bool, count: int, size: int, distinct: bool = False) -> float:
    """Moves `count` messages of `size` bytes and returns the seconds. Each arrives in memory of its own.

    `distinct`: a get of different messages. The first one with a count and size makes them, which takes long.
    """
    message = bytes(size)
    start = time.perf_counter()
    connection.sendall(_REQUEST.pack(b"p" if put else b"d" if distinct else b"g", count, size))
    if put:
        for _ in range(count):
            connection.sendall(message)
        _receive(connection, bytearray(1))
    else:
        for _ in range(count):
            _receive(connection, bytearray(size))
    return time.perf_counter() - start


def _serve_one(connection: socket.socket) -> None:
    send_at_once(connection)
    header = bytearray(_REQUEST.size)
    messages: list[bytes] = []
    while _receive(connection, header):
        kind, count, size = _REQUEST.unpack(header)
        if kind == b"g":
            message = bytes(size)
            for _ in range(count):
                connection.sendall(message)
        elif kind == b"d":
            if [len(message) for message in messages] != [size] * count:
                messages = [bytes([number % 255 + 1]) * size for number in range(count)]
            for message in messages:
                connection.sendall(message)
        else:
            for _ in range(count):
                _receive(connection, bytearray(size))
            connection.sendall(b"k")


def _receive(connection: socket.socket, buffer: bytearray) -> bool:
    view = memoryview(buffer)
    while view:
        received = connection.recv_into(view)
        if not received:
            return False
        view = view[received:]
    return True


if __name__ == "__main__":
    serve(over_unix=sys.argv[1:] == ["unix"])
