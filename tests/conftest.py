"""Fixtures that need the real product: tiny random-weight models, and a store, workers and gateway on real sockets."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from support.certificates import Certificates
from support.processes import NodeProcess, RedisProcess
from support.tiny_models import random_prompt, write_tiny_model

from kvferry.decode.config import DecodeConfig
from kvferry.deploy.worker_server import ModelConfig, ModelRuntime, WorkerServer
from kvferry.kernels.spec import KVQuantSpec
from kvferry.kvstore.config import NodeConfig
from kvferry.kvstore.memory_backend import MemoryBackend
from kvferry.kvstore.ring_config import RingConfig
from kvferry.kvstore.server import KVStoreServer
from kvferry.prefill.config import PrefillConfig
from kvferry.proto import worker_pb2, worker_pb2_grpc

BLOCK_SIZE = 32
PATIENT = PrefillConfig(fetch="always", lookup_timeout_s=5.0)
"""So that what is in the store is found on a busy machine, too."""

# The oracle runs in fp32 with a fixed number of threads, so that it does not depend on the machine's cores.
torch.set_num_threads(2)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what only the deep lane runs."""
    if "KVFERRY_DEEP" in os.environ:
        return
    deep = [item for item in items if item.get_closest_marker("deep")]
    config.hook.pytest_deselected(items=deep)
    items[:] = [item for item in items if item not in set(deep)]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model of a family, with random weights (fixed seed) and the demo model's tokenizer."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(f"tiny-{family}")
            write_tiny_model(family, made[family])
        return made[family]

    return make


@pytest.fixture(scope="session")
def load_runtime(tiny_model: Callable[[str], Path]) -> Callable[..., ModelRuntime]:
    """A freshly loaded runtime of a tiny model: what another worker process would have."""

    def load(family: str = "llama", *, block_size: int = BLOCK_SIZE, **options: Any) -> ModelRuntime:
        options.setdefault("dtype", "float32")
        options.setdefault("spec", KVQuantSpec(block_size=block_size))
        on_ranks_lost = options.pop("on_ranks_lost", pytest.fail)
        config = ModelConfig(model=str(tiny_model(family)), **options)
        return ModelRuntime(config, on_ranks_lost=on_ranks_lost)

    return load


@pytest.fixture(scope="session")
def runtime(load_runtime: Callable[..., ModelRuntime]) -> Callable[[str], ModelRuntime]:
    """A runtime of a tiny model, shared by the tests of a session."""
    loaded: dict[str, ModelRuntime] = {}

    def get(family: str = "llama") -> ModelRuntime:
        if family not in loaded:
            loaded[family] = load_runtime(family)
        return loaded[family]

    return get


@dataclass
class Answer:
    """What a decode worker streamed for one request."""

    tokens: list[int] = field(default_factory=list)
    chunks: list[worker_pb2.TokenChunk] = field(default_factory=list)

    @property
    def usage(self) -> worker_pb2.DecodeUsage:
        return self.chunks[-1].usage

    @property
    def num_cached_tokens(self) -> int:
        return self.usage.prefill.num_cached_tokens


@dataclass
class Workers:
    """A prefill and a decode worker on loopback sockets."""

    prefill_address: str
    decode_address: str
    channel: grpc.aio.Channel
    decode_server: WorkerServer
    prefill_server: WorkerServer

    async def generate(
        self,
        token_ids: list[int],
        *,
        max_tokens: int = 8,
        tenant: str = "default",
        timeout: float = 60.0,
        priority: int = 0,
        **sampling: Any,
    ) -> Answer:
        answer = Answer()
        async for chunk in self.stream(
            token_ids, max_tokens=max_tokens, tenant=tenant, timeout=timeout, priority=priority, **sampling
        ):
            assert chunk.index == len(answer.tokens)
            answer.tokens.append(chunk.token_id)
            answer.chunks.append(chunk)
        return answer

    def stream(
        self,
        token_ids: list[int],
        *,
        tenant: str = "default",
        timeout: float = 60.0,
        priority: int = 0,
        **sampling: Any,
    ) -> Any:
        request = worker_pb2.DecodeRequest(
            request_id="test",
            tenant=tenant,
            token_ids=token_ids,
            prefill_address=self.prefill_address,
            prefill_identity=self.prefill_server._runtime.identity,
            priority=priority,
            sampling=worker_pb2.SamplingParams(**sampling),
        )
        return worker_pb2_grpc.DecodeStub(self.channel).Generate(request, timeout=timeout)


@asynccontextmanager
async def _serve_workers(
    runtime: ModelRuntime,
    store_address: str | RingConfig | None,
    decode_config: DecodeConfig | None = None,
    store_cache_bytes: int | None = None,
    decode_runtime: ModelRuntime | None = None,
    prefill_config: PrefillConfig | None = None,
) -> AsyncIterator[Workers]:
    prefill = WorkerServer(
        runtime,
        config=prefill_config or PATIENT,
        store_address=store_address,
        store_cache_bytes=store_cache_bytes,
    )
    decode = WorkerServer(
        decode_runtime or runtime,
        config=decode_config or DecodeConfig(kv_memory=32 * 2**20),
        store_address=store_address,
    )
    prefill_address, decode_address = await prefill.start(), await decode.start()
    async with grpc.aio.insecure_channel(decode_address) as channel:
        try:
            yield Workers(prefill_address, decode_address, channel, decode, prefill)
        finally:
            await decode.stop(0.2)
            await prefill.stop(0.2)


@pytest.fixture
async def serve_workers() -> AsyncIterator[Callable[..., Any]]:
    """Starts a prefill and a decode worker for a runtime: `await serve_workers(runtime, store_address)`."""
    async with AsyncExitStack() as stack:

        async def start(
            runtime: ModelRuntime,
            store_address: str | RingConfig | None = None,
            decode_config: DecodeConfig | None = None,
            store_cache_bytes: int | None = None,
            decode_runtime: ModelRuntime | None = None,
            prefill_config: PrefillConfig | None = None,
        ) -> Workers:
            return await stack.enter_async_context(
                _serve_workers(runtime, store_address, decode_config, store_cache_bytes, decode_runtime, prefill_config)
            )

        yield start


@dataclass
class Store:
    """A KV store node in this process."""

    address: str
    backend: MemoryBackend

    async def records(self, keys: list[bytes]) -> list[bytes | None]:
        return await self.backend.get(keys)


@pytest.fixture
async def make_store() -> AsyncIterator[Callable[..., Any]]:
    """Starts a KV store node on a loopback socket: `await make_store(capacity_bytes=...)`."""
    servers: list[KVStoreServer] = []

    async def start(capacity_bytes: int = 2**28, bulk_port: int | None = 0) -> Store:
        backend = MemoryBackend(capacity_bytes=capacity_bytes)
        server = KVStoreServer(backend, NodeConfig(bulk_port=bulk_port))
        await server.start()
        servers.append(server)
        return Store(server.address, backend)

    yield start
    for server in servers:
        await server.stop(0.2)


@pytest.fixture(scope="session")
def make_prompt() -> Callable[..., list[int]]:
    return random_prompt


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


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority of this session's own."""
    return Certificates(tmp_path_factory.mktemp("certificates"))
