"""A KV store node that is in the directory. Apart from the other processes: it needs no torch."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from kvferry.deploy.cluster_member import ClusterMember
from kvferry.deploy.security import peer_security
from kvferry.deploy.settings import Settings
from kvferry.kvstore.malloc import tune_malloc
from kvferry.kvstore.server import KVStoreServer
from kvferry.kvstore.store_config import make_backend


class StoreProcess:
    """Serves the tiers of the `store` section."""

    def __init__(self, settings: Settings, *, host: str, port: int) -> None:
        self._settings = settings
        self.security = peer_security(settings.security)
        # The settings' bulk port goes with the settings' port: a node on another port takes any free one.
        own = settings.store.node_config()
        bulk_port = own.bulk_port if own.bulk_port is None or port == own.port else 0
        self._config = replace(own, host=host, port=port, bulk_port=bulk_port, metrics=settings.metrics.place(port))
        self._server: KVStoreServer | None = None

    async def start(self) -> str:
        """See `Drainable`."""
        tune_malloc()
        backend = await asyncio.to_thread(make_backend, self._settings.store.store_config())
        self._server = KVStoreServer(backend, self._config, security=self.security)
        await self._server.start()
        return self._server.address

    async def begin_drain(self) -> None:
        """See `Drainable`."""
        if self._server is not None:
            await self._server.begin_drain()

    async def drain(self, timeout_s: float) -> bool:
        """See `Drainable`. Who watches the directory asks this node no more; calls that run are ended by `stop`, and
        cost nobody more than a miss."""
        return True

    async def stop(self, grace_s: float) -> None:
        """See `Drainable`."""
        if self._server is not None:
            await self._server.stop(grace_s)


def store_member(
    settings: Settings, *, directory: str, host: str, port: int, advertise_host: str | None = None
) -> ClusterMember:
    process = StoreProcess(settings, host=host, port=port)
    return ClusterMember(
        process,
        directory=directory,
        roles=["store"],
        advertise_host=advertise_host,
        security=process.security,
    )
