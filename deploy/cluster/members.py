"""The processes of a cluster deployment, as Ray actors. Ray starts them, and starts them again when they die.

A fresh process does nothing until `ensure` is called, which the controller does every second: it starts what is not
started, and says where the process listens. Who else there is, a process learns from the directory.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import ray

from kvferry.deploy.cluster_member import ClusterMember
from kvferry.deploy.directory_server import DirectoryConfig, DirectoryServer
from kvferry.deploy.security import peer_security
from kvferry.deploy.settings import Settings
from kvferry.kvstore.process_logs import configure_logs


@dataclass(frozen=True, kw_only=True)
class Started:
    """What a process says of itself."""

    address: str
    """host:port that it listens on."""
    pid: int
    machine: str
    """Ray's id of its node."""
    version: str


class MemberActor(ABC):
    """A process: a server, and its place in the directory."""

    def __init__(self, settings: Settings, name: str) -> None:
        configure_logs(settings.log.config(), process=name)
        self._settings = localized(settings)
        self._lock = asyncio.Lock()
        self._member: ClusterMember | None = None
        self._address = ""

    async def ensure(self, directory: str | None) -> Started | None:
        """Starts what is not started: of a worker, the model's load takes minutes. Raises what a start raises.

        `directory`: host:port of it; None: only look, and say None when there is nothing yet.
        """
        async with self._lock:
            if not self._address:
                if directory is None:
                    return None
                member = await asyncio.to_thread(self._make, directory)
                try:
                    self._address = await member.start()
                except BaseException:
                    await member.stop(0)  # what had started: it will be tried anew
                    raise
                self._member = member
        return Started(
            address=self._address,
            pid=os.getpid(),
            machine=ray.get_runtime_context().get_node_id(),
            version=importlib.metadata.version("kvferry"),
        )

    async def stop(self, drain_s: float) -> None:
        """Leaves the directory, gives what runs `drain_s` seconds, and closes. The next `ensure` starts it anew."""
        if self._member is None:
            return  # nothing has started, and a start that runs may take minutes
        async with self._lock:
            member, self._member, self._address = self._member, None, ""
            if member is not None:
                await member.stop(drain_s)

    @abstractmethod
    def _make(self, directory: str) -> ClusterMember:
        """The parts, not started."""


class DirectoryActor(MemberActor):
    """The list of who takes part."""

    def _make(self, directory: str) -> ClusterMember:
        port = self._settings.cluster.directory_port
        config = DirectoryConfig(host=bind_host(self._settings), port=port, metrics=self._settings.metrics.place(port))
        security = peer_security(self._settings.security)
        return ClusterMember(DirectoryServer(config, security=security), directory=None, roles=())


class StoreActor(MemberActor):
    """A KV store node."""

    def _make(self, directory: str) -> ClusterMember:
        from kvferry.deploy.store_process import store_member

        store = self._settings.store
        return store_member(self._settings, directory=directory, host=store.host, port=store.port)


class WorkerActor(MemberActor):
    """A prefill or decode worker."""

    def __init__(self, settings: Settings, name: str, role: Literal["prefill", "decode"], index: int) -> None:
        super().__init__(settings, name)
        self._role = role
        self._index = index

    def _make(self, directory: str) -> ClusterMember:
        from kvferry.deploy.processes import worker_member

        settings = self._settings
        section = settings.prefill if self._role == "prefill" else settings.decode
        return worker_member(
            settings,
            self._role if settings.prefill.count else "both",
            directory=directory,
            host=section.host,
            port=section.port and section.port + self._index,
        )


class GatewayActor(MemberActor):
    """A gateway. It listens at once, and serves when there are workers."""

    def _make(self, directory: str) -> ClusterMember:
        from kvferry.deploy.processes import gateway_member

        return gateway_member(self._settings, directory=directory)


def bind_host(settings: Settings) -> str:
    """127.0.0.1, unless the cluster section asks for the machine's own address."""
    return "127.0.0.1" if settings.cluster.bind == "loopback" else str(ray.util.get_node_ip_address())


def localized(settings: Settings) -> Settings:
    """The settings as they are on this machine: every `host` is what `cluster.bind` asks for."""
    host = {"host": bind_host(settings)}
    sections = ("gateway", "store", "prefill", "decode", "metrics")
    return settings.model_copy(update={name: getattr(settings, name).model_copy(update=host) for name in sections})
