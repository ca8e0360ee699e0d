"""The processes of a cluster deployment, as Ray actors. Ray starts them, and starts them again when they die.

A fresh process does nothing until `ensure` is called, which the controller does every second: it starts what is not
started, and says where the process listens. Who else there is, a process learns from the directory.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from kvferry.deploy.directory_client import DirectoryMembership, Registration
from kvferry.deploy.directory_server import DirectoryConfig, DirectoryServer
from kvferry.deploy.role_configs import decode_config, nth_port, own_prefill_config, prefill_config
from kvferry.deploy.settings import Settings
from kvferry.kvstore.process_logs import configure_logs

if TYPE_CHECKING:
    from kvferry.deploy.worker_server import WorkerServer

STOP_GRACE_S = 3.0
_POLL_S = 0.2


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
    """What a process must know to start."""

    directory: str = ""
    """host:port"""
    store: tuple[str, ...] = ()
    """The store's nodes now; later ones come from the directory."""


class _Process:
    """What all have in common: a server that is started once, and a place in the directory."""

    def __init__(self, settings: Settings, name: str) -> None:
        configure_logs(settings.log.config(), process=name)
        self._settings = localized(settings)
        self._lock = asyncio.Lock()
        self._address = ""
        self._registration: Registration | None = None

    async def ensure(self, peers: Peers | None) -> Started | None:
        """Starts what is not started. Without `peers` it only looks, and says None when there is nothing yet."""
        async with self._lock:
            if not self._address:
                if peers is None:
                    return None
                self._address = await self._serve(peers)
        return Started(
            address=self._address,
            pid=os.getpid(),
            machine=ray.get_runtime_context().get_node_id(),
            version=importlib.metadata.version("kvferry"),
        )

    async def stop(self, drain_s: float) -> None:
        """Leaves the directory, gives what runs `drain_s` seconds, and closes."""
        if self._registration is not None:
            await self._registration.leave()
        if self._address:
            await self._close(drain_s)

    def _announce(self, peers: Peers, address: str, roles: Sequence[str]) -> str:
        self._registration = Registration(peers.directory, address=address, roles=roles)
        self._registration.start()
        return address

    async def _serve(self, peers: Peers) -> str:
        """Starts the server and returns where it listens."""
        raise NotImplementedError

    async def _close(self, drain_s: float) -> None:
        raise NotImplementedError


class DirectoryProcess(_Process):
    """The list of who takes part."""

    async def _serve(self, peers: Peers) -> str:
        cluster = self._settings.cluster
        host = bind_host(self._settings)
        self._server = DirectoryServer(DirectoryConfig(host=host, port=cluster.directory_port))
        return await self._server.start()

    async def _close(self, drain_s: float) -> None:
        await self._server.stop()


class StoreProcess(_Process):
    """A KV store node."""

    def __init__(self, settings: Settings, name: str, index: int) -> None:
        super().__init__(settings, name)
        self._index = index

    async def _serve(self, peers: Peers) -> str:
        from kvferry.kvstore.config import NodeConfig
        from kvferry.kvstore.malloc import tune_malloc
        from kvferry.kvstore.server import KVStoreServer
        from kvferry.kvstore.store_config import make_backend

        tune_malloc()
        settings = self._settings
        store = settings.store
        backend = await asyncio.to_thread(make_backend, store.store_config(self._index))
        config = NodeConfig(host=store.host, port=store.port, metrics=settings.metrics.place(store.port))
        self._server = KVStoreServer(backend, config)
        await self._server.start()
        return self._announce(peers, self._server.address, ["store"])

    async def _close(self, drain_s: float) -> None:
        await self._server.stop(STOP_GRACE_S)


class WorkerProcess(_Process):
    """A prefill or decode worker. Its start loads the model: minutes."""

    def __init__(self, settings: Settings, name: str, role: str, index: int) -> None:
        super().__init__(settings, name)
        self._role = role
        self._index = index

    async def _serve(self, peers: Peers) -> str:
        import torch

        from kvferry.deploy.app import model_config
        from kvferry.deploy.worker_server import ModelRuntime, WorkerServer
        from kvferry.kvstore.malloc import tune_malloc

        settings = self._settings
        tune_malloc()
        torch.set_num_threads(settings.threads or os.cpu_count() or 1)
        self._runtime = await asyncio.to_thread(ModelRuntime, model_config(settings))
        is_prefill = self._role == "prefill"
        role = settings.prefill if is_prefill else settings.decode
        make_config = prefill_config if is_prefill else decode_config
        server = WorkerServer(
            self._runtime,
            config=make_config(settings, host=role.host, port=nth_port(role.port, self._index)),
            store_address=settings.store.ring_config(peers.store),
            own_prefill=None if is_prefill else own_prefill_config(settings),
            store_cache_bytes=settings.store.worker_cache,
            membership=None if settings.store.nodes else DirectoryMembership(peers.directory, roles=["store"]),
        )
        address = await server.start()
        self._server: WorkerServer = server
        return self._announce(peers, address, [self._role])

    async def _close(self, drain_s: float) -> None:
        await _wait_until(lambda: _is_idle(self._server), drain_s)
        await self._server.stop(STOP_GRACE_S)
        await asyncio.to_thread(self._runtime.close)


class GatewayProcess(_Process):
    """A gateway. It listens at once, and serves when there are workers."""

    async def _serve(self, peers: Peers) -> str:
        from kvferry.deploy.app import make_gateway

        membership = DirectoryMembership(peers.directory, roles=["prefill", "decode"])
        self._server = await make_gateway(self._settings, prefill=[], decode=[], membership=membership)
        port = await self._server.start()
        return self._announce(peers, f"{self._settings.gateway.host}:{port}", ["gateway"])

    async def _close(self, drain_s: float) -> None:
        await self._server.stop(drain_s)


def bind_host(settings: Settings) -> str:
    """127.0.0.1, unless the cluster section asks for the machine's own address."""
    return "127.0.0.1" if settings.cluster.bind == "loopback" else str(ray.util.get_node_ip_address())


def localized(settings: Settings) -> Settings:
    """The settings as they are on this machine: every `host` is what `cluster.bind` asks for."""
    host = {"host": bind_host(settings)}
    sections = ("gateway", "store", "prefill", "decode", "metrics")
    return settings.model_copy(update={name: getattr(settings, name).model_copy(update=host) for name in sections})


def _is_idle(server: WorkerServer) -> bool:
    stats = server.stats()
    return not stats.decode.num_requests and not stats.prefill.num_requests


async def _wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_S)
