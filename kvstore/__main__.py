"""Runs one KV store node: `python -m kvferry.kvstore --port 7700 --memory 1GiB`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence

from kvferry.kvstore.backend import Backend
from kvferry.kvstore.config import NodeConfig
from kvferry.kvstore.malloc import tune_malloc
from kvferry.kvstore.memory_backend import MemoryBackend
from kvferry.kvstore.server import KVStoreServer
from kvferry.kvstore.size import parse_size

_log = logging.getLogger("kvferry.kvstore")


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:  # argparse shows the message of this one only
        raise argparse.ArgumentTypeError(str(error)) from error


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kvferry.kvstore", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7700, help="0 lets the system pick one (default: %(default)s)")
    backend = parser.add_mutually_exclusive_group()
    backend.add_argument("--memory", type=_size, default=1 << 30, help="capacity in memory (default: 1GiB)")
    backend.add_argument("--redis", metavar="URL", help="keep the records in this Redis instead")
    parser.add_argument("--max-record", type=_size, default=64 << 20, help="largest record (default: 64MiB)")
    parser.add_argument("--grace", type=float, default=5.0, help="seconds for running calls after SIGTERM")
    return parser.parse_args(argv)


def _make_backend(arguments: argparse.Namespace) -> tuple[Backend, str]:
    """The backend and its capacity in words. Raises ValueError for a bad Redis URL."""
    if arguments.redis is None:
        return MemoryBackend(capacity_bytes=arguments.memory), f"{arguments.memory} bytes"
    # Imported here so that a node without Redis does not pay for it.
    from kvferry.kvstore.redis_backend import RedisBackend

    backend = RedisBackend(arguments.redis, max_record_bytes=arguments.max_record)
    return backend, "set by Redis"


async def _serve(arguments: argparse.Namespace) -> None:
    config = NodeConfig(
        host=arguments.host,
        port=arguments.port,
        max_record_bytes=arguments.max_record,
        max_staged_bytes=max(NodeConfig.max_staged_bytes, arguments.max_record),
    )
    backend, capacity = _make_backend(arguments)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = KVStoreServer(backend, config)
    await server.start()
    name = "memory" if arguments.redis is None else "redis"
    _log.info("serving on %s, backend %s, capacity %s", server.address, name, capacity)
    await stopping.wait()
    _log.info("draining for at most %s s", arguments.grace)
    await server.stop(arguments.grace)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT. Returns 0 after a drain, 2 when it cannot start."""
    arguments = _parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    tune_malloc()
    try:
        asyncio.run(_serve(arguments))
    except (OSError, ValueError) as error:
        print(f"kvferry.kvstore: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
