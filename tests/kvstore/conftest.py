"""Nodes in this process and small records for the store's tests."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from support.processes import Process

from kvferry.kvstore import KVStoreServer, MemoryBackend, Namespace, NodeConfig, StoreClient
from kvferry.kvstore.codec import encode_record
from kvferry.kvstore.config import ClientConfig
from kvferry.kvstore.redis_backend import RedisBackend


@pytest.fixture
def namespace() -> Namespace:
    def digest(name: str) -> bytes:
        return hashlib.sha256(name.encode()).digest()

    return Namespace(
        tenant="tenant",
        weights_digest=digest("weights"),
        tokenizer_digest=digest("tokenizer"),
        spec_digest=digest("spec"),
        layout_version=1,
        numerics_class=digest("numerics"),
        block_size=32,
    )


@pytest.fixture
def make_record(namespace: Namespace) -> Callable[..., bytes]:
    """Encodes a record for a key; its payload is different for every key."""

    def make(key: bytes, *, num_bytes: int = 1000, block_index: int = 0) -> bytes:
        payload = hashlib.shake_128(key).digest(num_bytes)
        return encode_record(
            key=key,
            namespace=namespace.digest(),
            block_index=block_index,
            num_tokens=32,
            payload=[payload],
        )

    return make


@pytest.fixture
def start_writer(tmp_path: Path) -> Iterator[Callable[[Path, int], Process]]:
    """Starts a process that puts records into a disk backend until it is killed."""
    started: list[Process] = []

    def start(folder: Path, first: int) -> Process:
        command = [sys.executable, "-m", "support.store_processes", str(folder), str(first)]
        started.append(Process(command, tmp_path / f"writer-{len(started)}.log"))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture(params=["memory", "redis"])
def make_server(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[NodeConfig | None], KVStoreServer]:
    """Makes an in-process server, once for each backend."""

    def make(config: NodeConfig | None = None) -> KVStoreServer:
        if request.param == "memory":
            return KVStoreServer(MemoryBackend(capacity_bytes=256 << 20), config)
        url = request.getfixturevalue("shared_redis").url
        prefix = str(tmp_path).encode() + b":"
        return KVStoreServer(RedisBackend(url, key_prefix=prefix, op_timeout_s=5.0), config)

    if request.param == "redis":
        request.getfixturevalue("shared_redis")
    return make


@pytest.fixture
async def server(
    make_server: Callable[[NodeConfig | None], KVStoreServer],
) -> AsyncIterator[KVStoreServer]:
    server = make_server(None)
    await server.start()
    yield server
    await server.stop(0)


@pytest.fixture
async def client(server: KVStoreServer) -> AsyncIterator[StoreClient]:
    # Two shared cores: generous here, the bounds themselves are tested in test_faults.py.
    async with StoreClient(ClientConfig(address=server.address, lookup_timeout_s=5.0)) as client:
        yield client
