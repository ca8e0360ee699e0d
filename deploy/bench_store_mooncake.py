"""A peer for `kvferry bench store`: Mooncake's Transfer Engine over TCP, moving as many bytes as the store does.

Run by an interpreter that has the package `mooncake-transfer-engine-non-cuda` (or the CUDA one); kvferry need not be
installed there. "serve" holds the bytes in registered memory; "read" reads them into registered memory of its own,
`count` records of `size` bytes for each line of its standard input, and prints the seconds. Nothing checks the bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import subprocess
import sys
import time
from typing import Any

HOST = "127.0.0.1"
START_TIMEOUT_S = 60.0


def serve(num_bytes: int) -> None:
    """Prints the port and the address of the memory, then waits for the end of its input."""
    engine = _engine()
    memory = bytearray(b"k" * num_bytes)
    address = _register(engine, memory)
    print("ready", engine.get_rpc_port(), address, flush=True)
    sys.stdin.read()


def read(size: int, count: int, batch: int) -> None:
    """Prints "ready", then for each line the seconds that `count` records took, `batch` a call."""
    engine = _engine()
    command = [sys.executable, __file__, "serve", str(size * count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            port, theirs = _ready(server.stdout)
            memory = bytearray(size * count)
            mine = _register(engine, memory)
            print("ready", flush=True)
            for _ in sys.stdin:
                started = time.perf_counter()
                for first in range(0, count, batch):
                    offsets = [number * size for number in range(first, min(first + batch, count))]
                    failed = engine.batch_transfer_sync_read(
                        f"{HOST}:{port}",
                        [mine + offset for offset in offsets],
                        [theirs + offset for offset in offsets],
                        [size] * len(offsets),
                    )
                    if failed:
                        raise RuntimeError(f"Mooncake's read failed with {failed}")
                seconds = time.perf_counter() - started
                if memory.count(b"k", 0, size) != size:
                    raise RuntimeError("Mooncake's read brought other bytes")
                print("took", seconds, flush=True)
        finally:
            server.kill()


def _ready(lines: Any) -> tuple[int, int]:
    """The engine logs to the same stream, so its lines are passed over."""
    for line in lines:
        if line.startswith("ready "):
            port, address = line.split()[1:]
            return int(port), int(address)
    raise RuntimeError("the peer's server did not start")


def _engine() -> Any:
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    with contextlib.closing(socket.create_server((HOST, 0))) as probe:
        port = probe.getsockname()[1]
    if engine.initialize(f"{HOST}:{port}", "P2PHANDSHAKE", "tcp", ""):
        raise RuntimeError("Mooncake's transfer engine did not start")
    return engine


def _register(engine: Any, memory: bytearray) -> int:
    address = ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))
    if engine.register_memory(address, len(memory)):
        raise RuntimeError("Mooncake did not register the memory")
    return address


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        read(*(int(argument) for argument in sys.argv[2:5]))
