"""The baseline of `kvferry bench store`: a plain TCP socket that moves messages of given sizes.

Run as a process it serves one connection after the other. A request is (kind, count, size): "g" answers with
`count` messages of `size` bytes, "p" takes as many and answers with one byte. "g" sends the same message again and
again, out of the processor's caches; "d" sends as many different ones, as a store has to.
"""

from __future__ import annotations

import socket
import struct
import time

from kvferry.kvstore.malloc import tune_malloc

_REQUEST = struct.Struct("<cQQ")


def serve() -> None:
    """Prints its port, then serves until it is ended."""
    tune_malloc()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        while True:
            connection, _ = listening.accept()
            with connection:
                _serve_one(connection)


def tcp_seconds(connection: socket.socket, *, put: bool, count: int, size: int, distinct: bool = False) -> float:
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
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
    serve()
