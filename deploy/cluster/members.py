"""The processes of a cluster deployment, as Ray actors. Ray starts them, and starts them again when they die.

A fresh process does nothing until `ensure` is called, which the controller does every second: it starts what is not
started, applies what changed, and says where the process listens.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from kvferry.deploy.role_configs import decode_config, nth_port, own_prefill_config, prefill_config
from kvferry.deploy.settings import Settings

if TYPE_CHECKING:
    from kvferry.deploy.gateway_server import GatewayServer
    from kvferry.deploy.worker_server import WorkerServer
    from kvferry.kvstore.server import KVStoreServer

STOP_GRACE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Started:
    """What a process says of itself."""

    address: str
    """host:port that it listens on."""
    pid: int
    machine: str
    """Ray's id of its node."""
    version: str


@dataclass(frozen=True, kw_only=True)
class Peers:
    """Addresses that a process needs."""

    store: tuple[str, ...] = ()
    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()


class StoreMember:
    """A KV store node."""

    def __init__(self, settings: Settings, index: int) -> None:
        _log_to_stderr()
        self._settings = settings
        self._index = index
        self._lock = asyncio.Lock()
        self._server: KVStoreServer | None = None

    async def ensure(self, peers: Peers) -> Started:
        from kvferry.kvstore.config import NodeConfig
        from kvferry.kvstore.malloc import tune_malloc
        from kvferry.kvstore.server import KVStoreServer
        from kvferry.kvstore.store_config import make_backend

        async with self._lock:
            if self._server is None:
                tune_malloc()
                store = self._settings.store
                backend = await asyncio.to_thread(make_backend, store.store_config(self._index))
                server = KVStoreServer(backend, NodeConfig(host=_bind_host(self._settings), port=store.port))
                await server.start()
                self._server = server
            return _started(self._server.address)

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop()


class WorkerMember:
    """A prefill or decode worker."""

    def __init__(self, settings: Settings, role: str, index: int) -> None:
        _log_to_stderr()
        self._settings = settings
        self._role = role
        self._index = index
        self._lock = asyncio.Lock()
        self._server: WorkerServer | None = None
        self._address = ""
        self._nodes: tuple[str, ...] = ()

    async def ensure(self, peers: Peers) -> Started:
        """Loads the model the first time: minutes. Raises what that raises."""
        async with self._lock:
            if self._server is None:
                self._server, self._address = await self._serve(peers)
            elif peers.store and peers.store != self._nodes:
                self._server.set_store_nodes(peers.store)
            self._nodes = peers.store or self._nodes
            return _started(self._address)

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)

    async def _serve(self, peers: Peers) -> tuple[WorkerServer, str]:
        import torch

        from kvferry.deploy.app import model_config
        from kvferry.deploy.worker_server import ModelRuntime, WorkerServer
        from kvferry.kvstore.malloc import tune_malloc

        settings, host = self._settings, _bind_host(self._settings)
        tune_malloc()
        torch.set_num_threads(settings.threads or os.cpu_count() or 1)
        runtime = await asyncio.to_thread(ModelRuntime, model_config(settings))
        is_prefill = self._role == "prefill"
        server = WorkerServer(
            runtime,
            config=prefill_config(settings, host=host, port=nth_port(settings.prefill.port, self._index))
            if is_prefill
            else decode_config(settings, host=host, port=nth_port(settings.decode.port, self._index)),
            store_address=settings.store.ring_config(peers.store),
            own_prefill=None if is_prefill else own_prefill_config(settings),
            store_cache_bytes=settings.store.worker_cache,
        )
        return server, await server.start()


class GatewayMember:
    """A gateway. It listens at once, and serves when there are workers."""

    def __init__(self, settings: Settings) -> None:
        _log_to_stderr()
        self._settings = settings
        self._lock = asyncio.Lock()
        self._server: GatewayServer | None = None
        self._address = ""
        self._peers = Peers()

    async def ensure(self, peers: Peers) -> Started:
        async with self._lock:
            if self._server is None:
                from kvferry.deploy.app import make_gateway

                host = _bind_host(self._settings)
                gateway = self._settings.gateway.model_copy(update={"host": host})
                settings = self._settings.model_copy(update={"gateway": gateway})
                server = await make_gateway(settings, prefill=list(peers.prefill), decode=list(peers.decode))
                self._address = f"{host}:{await server.start()}"
                self._server = server
            elif peers != self._peers:
                self._server.set_workers(prefill=peers.prefill, decode=peers.decode)
            self._peers = peers
            return _started(self._address)

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)


def _bind_host(settings: Settings) -> str:
    """127.0.0.1, unless the cluster section asks for the machine's own address."""
    return "127.0.0.1" if settings.cluster.bind == "loopback" else str(ray.util.get_node_ip_address())


def _started(address: str) -> Started:
    return Started(
        address=address,
        pid=os.getpid(),
        machine=ray.get_runtime_context().get_node_id(),
        version=importlib.metadata.version("kvferry"),
    )


def _log_to_stderr() -> None:
    """Ray keeps a process's stderr in a file of its own: `kvferry logs`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
