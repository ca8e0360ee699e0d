"""The directory on the wire: members announce themselves, others watch.

worker, store node, gateway ──Announce──▶ directory ──Watch──▶ gateways, workers
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client.core import Metric

from kvferry.deploy.directory_epochs import EpochCounter
from kvferry.deploy.directory_ledger import Ledger, Refused
from kvferry.deploy.directory_metrics import directory_families
from kvferry.deploy.members import Member
from kvferry.kvstore.guard_metrics import guard_family
from kvferry.kvstore.metrics_endpoint import MetricsEndpoint, MetricsPlace
from kvferry.proto import directory_pb2, directory_pb2_grpc
from kvferry.proto.grpc_options import server_options
from kvferry.proto.peer_security import PeerSecurity

_logger = logging.getLogger(__name__)

SERVICE = directory_pb2.DESCRIPTOR.services_by_name["Directory"].full_name
WATCH_HEARTBEAT_S = 1.0
_TICK_S = 0.2
_MAX_FIELD = 256
_MAX_REQUEST_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class DirectoryConfig:
    """Raises ValueError on impossible values."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: any free port."""
    lease_s: float = 2.8
    """A member that is silent for longer is taken off: as soon as gateways give up a silent worker."""
    settle_s: float = 5.0
    """So long after a start members may be missing, and keep the epochs that they had."""
    state: Path | None = None
    """File that keeps epochs growing when the wall clock is set back over a restart."""
    max_watchers: int = 4096
    metrics: MetricsPlace | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be 0..65535, not {self.port}")
        if self.lease_s < 1:
            raise ValueError("lease_s must be at least 1")
        if self.settle_s < 0:
            raise ValueError("settle_s must not be negative")
        if self.max_watchers < 1:
            raise ValueError("max_watchers must be positive")


class DirectoryServer:
    """Serves until `stop`. Start it once, on one event loop. Without `security` it takes everybody who reaches it, and
    binds loopback only."""

    def __init__(
        self,
        config: DirectoryConfig,
        *,
        security: PeerSecurity | None = None,
    ) -> None:
        """Raises OSError or ValueError when the state file is none."""
        self._config = config
        self._security = security or PeerSecurity()
        self._guards = self._security.guards()
        self._ledger = Ledger(
            EpochCounter(config.state), lease_s=config.lease_s, settle_s=config.settle_s, clock=time.monotonic
        )
        self._servicer = _Directory(self._ledger, config)
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._ticking: asyncio.Task[None] | None = None
        self._endpoint: MetricsEndpoint | None = None
        self.metrics_port = 0
        """Where Prometheus asks, once started; 0: nowhere."""

    async def start(self) -> str:
        """Binds, serves and returns host:port. Raises OSError when it cannot bind, OpenPortRefused when it may not."""
        server = grpc.aio.server(
            interceptors=self._guards, options=server_options(max_receive_bytes=_MAX_REQUEST_BYTES)
        )
        directory_pb2_grpc.add_DirectoryServicer_to_server(self._servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        port = self._security.add_port(server, f"{self._config.host}:{self._config.port}")
        if self._config.metrics is not None:
            self._endpoint = MetricsEndpoint(self._config.metrics, self._families)
            self.metrics_port = await self._endpoint.start()
        await server.start()
        self._server = server
        self._ticking = asyncio.create_task(self._tick())
        for service in (health.OVERALL_HEALTH, SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return f"{self._config.host}:{port}"

    async def begin_drain(self) -> None:
        """Health goes NOT_SERVING."""
        await self._health.enter_graceful_shutdown()

    async def drain(self, timeout_s: float) -> bool:
        """Members keep what they know: there is nothing to wait for."""
        return True

    async def stop(self, grace_s: float = 0.5) -> None:
        """Members go on without it."""
        await self._health.enter_graceful_shutdown()
        if self._ticking is not None:
            self._ticking.cancel()
        self._servicer.close()
        if self._server is not None:
            await self._server.stop(grace_s)
        if self._endpoint is not None:
            await self._endpoint.stop()

    @property
    def ledger(self) -> Ledger:
        """Live; do not change it."""
        return self._ledger

    async def _families(self) -> list[Metric]:
        told = directory_families(self._ledger, num_watchers=self._servicer.num_watchers)
        return [*told, guard_family(self._guards, {})]

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            before = self._ledger.num_expired
            self._ledger.tick(interval_s=_TICK_S)
            if self._ledger.num_expired > before:
                _logger.warning("%d members were silent and are taken off", self._ledger.num_expired - before)
            self._servicer.notify()


class _Directory(directory_pb2_grpc.DirectoryServicer):
    def __init__(self, ledger: Ledger, config: DirectoryConfig) -> None:
        self._ledger = ledger
        self._config = config
        self._changed = asyncio.Event()
        self._told_version = -1
        self.num_watchers = 0
        self._closing = False

    def notify(self) -> None:
        """Wakes the watchers when something has changed."""
        if self._ledger.version != self._told_version:
            self._told_version = self._ledger.version
            self._changed.set()
            self._changed = asyncio.Event()

    def close(self) -> None:
        self._closing = True
        self._changed.set()

    async def Announce(self, request: directory_pb2.AnnounceRequest, context: Any) -> directory_pb2.AnnounceReply:
        told = request.member
        if not 0 < len(told.instance_id) <= _MAX_FIELD or len(told.address) > _MAX_FIELD:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"instance_id and address have 1 to {_MAX_FIELD} characters"
            )
        try:
            member = Member(told.address, tuple(told.roles), told.instance_id, told.epoch)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        try:
            grant = self._ledger.announce(member)
        except Refused as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        if grant.epoch != told.epoch:
            _logger.info("%s %s joins with epoch %d", "+".join(told.roles), told.address, grant.epoch)
        self.notify()
        return directory_pb2.AnnounceReply(
            epoch=grant.epoch, lease_seconds=self._config.lease_s, lease_lost=grant.lease_lost
        )

    async def Leave(self, request: directory_pb2.LeaveRequest, context: Any) -> directory_pb2.LeaveReply:
        if not 0 < len(request.instance_id) <= _MAX_FIELD:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"instance_id has 1 to {_MAX_FIELD} characters")
        self._ledger.leave(request.instance_id)
        self.notify()
        return directory_pb2.LeaveReply()

    async def Watch(self, request: directory_pb2.WatchRequest, context: Any) -> AsyncIterator[directory_pb2.WatchReply]:
        if self.num_watchers >= self._config.max_watchers:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self.num_watchers} watch already")
        self.num_watchers += 1
        try:
            last: directory_pb2.WatchReply | None = None
            while not self._closing:
                changed = self._changed
                reply = self._members(request.roles)
                if reply == last:
                    yield directory_pb2.WatchReply()
                else:
                    yield reply
                    last = reply
                try:
                    async with asyncio.timeout(WATCH_HEARTBEAT_S):
                        await changed.wait()
                except TimeoutError:
                    pass
        finally:
            self.num_watchers -= 1

    def _members(self, roles: Sequence[str]) -> directory_pb2.WatchReply:
        members = self._ledger.members.with_roles(roles).members
        return directory_pb2.WatchReply(
            has_members=True,
            settled=self._ledger.settled,
            members=[
                directory_pb2.Member(address=m.address, roles=m.roles, instance_id=m.instance_id, epoch=m.epoch)
                for m in members
            ],
        )
