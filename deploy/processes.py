"""What each kind of process serves: `Drainable`s made from settings, which find each other through a directory."""

from __future__ import annotations

import asyncio
import os
from typing import Literal

import torch

from kvferry.decode.config import DecodeConfig
from kvferry.deploy.assembly import decode_config, make_gateway, model_config, prefill_config
from kvferry.deploy.cluster_member import ClusterMember
from kvferry.deploy.directory_client import DirectoryMembership
from kvferry.deploy.gateway_server import GatewayServer
from kvferry.deploy.membership import Lease
from kvferry.deploy.rank_counts import threads_of_rank, with_ranks
from kvferry.deploy.security import peer_security
from kvferry.deploy.settings import Settings
from kvferry.deploy.worker_server import ModelRuntime, WorkerServer
from kvferry.kvstore.malloc import tune_malloc
from kvferry.kvstore.ring_config import RingConfig
from kvferry.prefill.config import PrefillConfig

Role = Literal["prefill", "decode", "both"]


class WorkerProcess:
    """A prefill worker, a decode worker, or one with both roles."""

    def __init__(self, settings: Settings, role: Role, *, directory: str, host: str, port: int) -> None:
        self._settings = settings
        self.security = peer_security(settings.security)
        self._role = role
        self._directory = directory
        self._host, self._port = host, port
        self._runtime: ModelRuntime | None = None
        self._server: WorkerServer | None = None
        self._lease: Lease | None = None

    async def start(self) -> str:
        """See `Drainable`. Loads the model."""
        settings = self._settings
        self.security.require_asking(f"{self._host}:{self._port}")  # before that
        tune_malloc()
        ranks = settings.prefill if self._role == "prefill" else settings.decode
        torch.set_num_threads(threads_of_rank(settings, ranks.num_ranks, num_cores=os.cpu_count() or 1))
        model = with_ranks(model_config(settings), ranks)
        self._runtime = await asyncio.to_thread(ModelRuntime, model)
        config: PrefillConfig | DecodeConfig
        if self._role == "prefill":
            config = prefill_config(settings, host=self._host, port=self._port)
        else:
            config = decode_config(settings, host=self._host, port=self._port)
        self._server = WorkerServer(
            self._runtime,
            config=config,
            store_address=self._ring(),
            own_prefill=prefill_config(settings) if self._role == "both" else None,
            store_cache_bytes=settings.store.worker_cache,
            membership=None
            if settings.store.nodes
            else DirectoryMembership(self._directory, roles=["store"], security=self.security),
            security=self.security,
        )
        if self._lease is not None:
            self._server.use_lease(self._lease)
        return await self._server.start()

    def _ring(self) -> RingConfig:
        """The settings' own nodes, or those that the directory will name."""
        store = self._settings.store
        if store.nodes:
            return store.ring_config(store.nodes)
        return store.ring_config((), min_nodes=0)

    def use_lease(self, lease: Lease) -> None:
        self._lease = lease
        if self._server is not None:
            self._server.use_lease(lease)

    def lease_lost(self) -> None:
        """Ends what runs: it runs elsewhere."""
        if self._server is not None:
            self._server.end_running("this worker was away for longer than its lease")

    async def begin_drain(self) -> None:
        """See `Drainable`."""
        if self._server is not None:
            await self._server.begin_drain()

    async def drain(self, timeout_s: float) -> bool:
        """See `Drainable`."""
        return self._server is None or await self._server.drain(timeout_s)

    async def stop(self, grace_s: float) -> None:
        """See `Drainable`."""
        if self._server is not None:
            await self._server.stop(grace_s)
        if self._runtime is not None:
            await asyncio.to_thread(self._runtime.close)


class GatewayProcess:
    """A gateway for the directory's workers."""

    def __init__(self, settings: Settings, *, directory: str) -> None:
        self._settings = settings
        self.security = peer_security(settings.security)
        self._directory = directory
        self._server: GatewayServer | None = None
        self._lease: Lease | None = None

    async def start(self) -> str:
        """See `Drainable`. Does not wait for workers."""
        self._server = await make_gateway(
            self._settings,
            membership=DirectoryMembership(self._directory, roles=["prefill", "decode"], security=self.security),
        )
        if self._lease is not None:
            self._server.use_lease(self._lease)
        return f"{self._settings.gateway.host}:{await self._server.start()}"

    def use_lease(self, lease: Lease) -> None:
        self._lease = lease
        if self._server is not None:
            self._server.use_lease(lease)

    async def begin_drain(self) -> None:
        """See `Drainable`."""
        if self._server is not None:
            await self._server.begin_drain()

    async def drain(self, timeout_s: float) -> bool:
        """See `Drainable`."""
        return self._server is None or await self._server.drain(timeout_s)

    async def stop(self, grace_s: float) -> None:
        """See `Drainable`."""
        if self._server is not None:
            await self._server.stop(grace_s)


def worker_member(
    settings: Settings, role: Role, *, directory: str, host: str, port: int, advertise_host: str | None = None
) -> ClusterMember:
    process = WorkerProcess(settings, role, directory=directory, host=host, port=port)
    return ClusterMember(
        process,
        directory=directory,
        roles=["prefill", "decode"] if role == "both" else [role],
        advertise_host=advertise_host,
        on_joining=process.use_lease,
        on_lease_lost=process.lease_lost,
        security=process.security,
    )


def gateway_member(settings: Settings, *, directory: str, advertise_host: str | None = None) -> ClusterMember:
    process = GatewayProcess(settings, directory=directory)
    return ClusterMember(
        process,
        directory=directory,
        roles=["gateway"],
        advertise_host=advertise_host,
        on_joining=process.use_lease,
        security=process.security,
    )
