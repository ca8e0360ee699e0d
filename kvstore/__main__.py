"""Runs one KV store node: `python -m kvferry.kvstore --port 7700 --memory 1GiB`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from kvferry.kvstore.config import NodeConfig
from kvferry.kvstore.malloc import tune_malloc
from kvferry.kvstore.metrics_endpoint import MetricsPlace
from kvferry.kvstore.process_logs import LogConfig, LogFormat, LogLevel, configure_logs
from kvferry.kvstore.redis_place import RedisPlace, RedisTls
from kvferry.kvstore.server import KVStoreServer
from kvferry.kvstore.size import parse_size
from kvferry.kvstore.store_config import DiskConfig, StoreConfig, make_backend
from kvferry.proto.peer_security import PeerSecurity
from kvferry.proto.tls_files import read_identity
from kvferry.proto.token_file import read_tokens

_log = logging.getLogger("kvferry.kvstore")

METRICS_PORT_OFFSET = 1000
OFF = "off"


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:  # argparse shows the message of this one only
        raise argparse.ArgumentTypeError(str(error)) from error


def _port_or_off(text: str) -> int | str:
    if text == OFF:
        return OFF
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a port nor {OFF}") from None


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kvferry.kvstore", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7700, help="0 lets the system pick one (default: %(default)s)")
    bulk = "get records in bulk beside gRPC: a port, 0 for any, or off (default: %(default)s)"
    parser.add_argument("--bulk-port", type=_port_or_off, default=0, help=bulk)
    parser.add_argument("--bulk-address", metavar="HOST:PORT", help="what clients connect to, where it is another one")
    parser.add_argument("--memory", type=_size, help="memory tier (default: 1GiB, with --redis alone none)")
    parser.add_argument("--disk", type=Path, metavar="FOLDER", help="disk tier: keep records under this folder")
    parser.add_argument("--disk-bytes", type=_size, help="capacity of the disk tier, e.g. 20GiB")
    parser.add_argument("--write", choices=("through", "back"), default="through", help="when lower tiers are written")
    parser.add_argument("--redis", metavar="URL", help="Redis tier: one server, redis://, rediss:// or unix://")
    parser.add_argument("--redis-cluster", metavar="HOST:PORT,...", help="Redis tier: some nodes of a cluster")
    parser.add_argument("--redis-sentinel", metavar="HOST:PORT,...", help="Redis tier: Sentinels")
    parser.add_argument("--redis-service", metavar="NAME", help="the master that the Sentinels watch")
    parser.add_argument("--redis-user", metavar="NAME", help="ACL user")
    parser.add_argument("--redis-password-file", type=Path, metavar="FILE", help="file of the ACL user's password")
    parser.add_argument("--redis-ca", metavar="FILE", help="PEM of the authority of Redis's certificate; turns TLS on")
    parser.add_argument("--redis-cert", metavar="FILE", help="PEM of the client certificate")
    parser.add_argument("--redis-key", metavar="FILE", help="PEM of the client certificate's key")
    parser.add_argument("--cluster-token-file", type=Path, metavar="FILE", help="what clients must send")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="PEM of the node's certificate; turns TLS on")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM of its key")
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="PEM of the authority of clients' certificates")
    parser.add_argument("--insecure", action="store_true", help="bind any address and serve everybody who reaches it")
    parser.add_argument("--max-record", type=_size, default=64 << 20, help="largest record (default: 64MiB)")
    parser.add_argument("--grace", type=float, default=5.0, help="seconds for running calls after SIGTERM")
    parser.add_argument("--metrics-host", default="127.0.0.1", help="address of the metrics (default: %(default)s)")
    parser.add_argument(
        "--metrics-port",
        type=_port_or_off,
        metavar="PORT",
        help="of /metrics; 0: any free port; off: none (default: the port + 1000, any where that is any)",
    )
    parser.add_argument("--log-format", choices=get_args(LogFormat), default="text")
    parser.add_argument("--log-level", choices=get_args(LogLevel), default="info")
    return parser.parse_args(argv)


def _store_config(arguments: argparse.Namespace) -> StoreConfig:
    """Raises ValueError for what does not go together, OSError for a password file that cannot be read."""
    if (arguments.disk is None) != (arguments.disk_bytes is None):
        raise ValueError("--disk and --disk-bytes go together")
    redis = None
    if arguments.redis or arguments.redis_cluster or arguments.redis_sentinel:
        tls = None
        if arguments.redis_ca or arguments.redis_cert or arguments.redis_key:
            tls = RedisTls(ca=arguments.redis_ca, cert=arguments.redis_cert, key=arguments.redis_key)
        redis = RedisPlace(
            url=arguments.redis,
            cluster=_addresses(arguments.redis_cluster),
            sentinels=_addresses(arguments.redis_sentinel),
            service=arguments.redis_service,
            user=arguments.redis_user,
            password=arguments.redis_password_file and arguments.redis_password_file.read_text().strip(),
            tls=tls,
        )
    memory = arguments.memory
    if memory is None and (redis is None or arguments.disk is not None):
        memory = StoreConfig.memory_bytes
    return StoreConfig(
        memory_bytes=memory,
        disk=arguments.disk and DiskConfig(folder=arguments.disk, capacity_bytes=arguments.disk_bytes),
        redis=redis,
        write=arguments.write,
        max_record_bytes=arguments.max_record,
    )


def _security(arguments: argparse.Namespace) -> PeerSecurity:
    """Raises ValueError for what does not go together or a file does not hold, OSError for one that cannot be read."""
    tls = (arguments.tls_cert, arguments.tls_key, arguments.tls_ca)
    if any(tls) and not all(tls):
        raise ValueError("--tls-cert, --tls-key and --tls-ca go together")
    token_file = arguments.cluster_token_file
    return PeerSecurity(
        tokens=() if token_file is None else read_tokens(token_file),
        tls=read_identity(cert=tls[0], key=tls[1], ca=tls[2]) if all(tls) else None,
        insecure=arguments.insecure,
    )


def _addresses(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",")) if text else ()


def _metrics_place(arguments: argparse.Namespace) -> MetricsPlace | None:
    port = arguments.metrics_port
    if port == OFF:
        return None
    if port is None:
        port = arguments.port and arguments.port + METRICS_PORT_OFFSET
    return MetricsPlace(host=arguments.metrics_host, port=port)


def _capacity(store: StoreConfig) -> str:
    if store.memory_bytes is None:
        return "set by Redis"
    return f"{store.memory_bytes + (store.disk.capacity_bytes if store.disk else 0)} bytes"


async def _serve(arguments: argparse.Namespace) -> None:
    config = NodeConfig(
        host=arguments.host,
        port=arguments.port,
        bulk_port=None if arguments.bulk_port == OFF else arguments.bulk_port,
        bulk_address=arguments.bulk_address,
        max_record_bytes=arguments.max_record,
        max_staged_bytes=max(NodeConfig.max_staged_bytes, arguments.max_record),
        metrics=_metrics_place(arguments),
    )
    store = _store_config(arguments)
    security = _security(arguments)
    backend = make_backend(store)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = KVStoreServer(backend, config, security=security)
    await server.start()
    bulk = "off" if server.bulk is None else server.bulk.port
    where = (server.address, store.tier_names, _capacity(store), bulk)
    _log.info("serving on %s, backend %s, capacity %s, bulk port %s", *where)
    await stopping.wait()
    _log.info("draining for at most %s s", arguments.grace)
    await server.stop(arguments.grace)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT. Returns 0 after a drain, 2 when it cannot start."""
    arguments = _parse_arguments(argv)
    configure_logs(LogConfig(format=arguments.log_format, level=arguments.log_level), process="store")
    tune_malloc()
    try:
        asyncio.run(_serve(arguments))
    except (OSError, ValueError) as error:
        print(f"kvferry.kvstore: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
