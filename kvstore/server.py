"""A KV store node on a port, usable inside any asyncio process."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client.core import Metric

from kvferry.kvstore.backend import Backend
from kvferry.kvstore.bulk_server import BulkServer
from kvferry.kvstore.config import MAX_MESSAGE_BYTES, NodeConfig
from kvferry.kvstore.guard_metrics import guard_family
from kvferry.kvstore.interceptor import SERVICE_NAME, ErrorInterceptor
from kvferry.kvstore.metrics_endpoint import MetricsEndpoint
from kvferry.kvstore.node import KVStoreNode
from kvferry.kvstore.node_counters import NodeCounters
from kvferry.kvstore.node_metrics import node_families
from kvferry.proto import kvstore_pb2_grpc
from kvferry.proto.grpc_options import Options, server_options
from kvferry.proto.peer_security import PeerSecurity

_HEALTH_NAMES = (health.OVERALL_HEALTH, SERVICE_NAME)


class KVStoreServer:
    """Serves `backend` until `stop`, which also closes it. Start it once, on one event loop.

    Without `security` it takes calls from everybody who reaches it, and binds loopback only. With TLS no bulk port is
    offered: it would be plain text still.
    """

    def __init__(
        self,
        backend: Backend,
        config: NodeConfig | None = None,
        *,
        security: PeerSecurity | None = None,
    ) -> None:
        self._backend = backend
        self._config = config if config is not None else NodeConfig()
        self._security = security or PeerSecurity()
        self._guards = self._security.guards()
        self._node = KVStoreNode(backend, self._config)
        has_bulk = self._config.bulk_port is not None and self._security.tls is None
        self._bulk = (
            BulkServer(self._node.records, self._node.sink, self._node.counters, self._config) if has_bulk else None
        )
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._port = 0
        self._metrics: MetricsEndpoint | None = None
        self.metrics_port = 0
        """Where Prometheus asks, once started; 0: nowhere."""

    @property
    def address(self) -> str:
        """host:port that clients use, once started."""
        return _join_address(self._config.host, self._port)

    @property
    def bulk(self) -> BulkServer | None:
        """The bulk port; None where none is offered."""
        return self._bulk

    @property
    def counters(self) -> NodeCounters:
        """The node's own counters; live, do not change them."""
        return self._node.counters

    @property
    def staged_bytes(self) -> int:
        """Bytes reserved by puts in progress."""
        return self._node.staged_bytes

    async def start(self) -> int:
        """Binds, serves and returns the port. Raises OSError when it cannot bind, OpenPortRefused when it may not."""
        server = grpc.aio.server(
            interceptors=(
                *self._guards,
                ErrorInterceptor(stalled_reader_s=self._config.stalled_reader_s),
            ),
            options=_server_options(),
            maximum_concurrent_rpcs=self._config.max_concurrent_calls,
        )
        kvstore_pb2_grpc.add_KVStoreServicer_to_server(self._node, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        address = _join_address(self._config.host, self._config.port)
        self._port = self._security.add_port(server, address)
        if self._config.metrics is not None:
            self._metrics = MetricsEndpoint(self._config.metrics, self._families)
            self.metrics_port = await self._metrics.start()
        if self._bulk is not None:
            try:
                await self._bulk.start()
            except OSError:
                await server.stop(0)
                raise
            self._node.offer_bulk(self._bulk)
        await server.start()
        self._server = server
        for name in _HEALTH_NAMES:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return self._port

    async def _families(self) -> list[Metric]:
        told = await node_families(self.counters, self.staged_bytes, self._backend)
        return [*told, guard_family(self._guards, {})]

    async def begin_drain(self) -> None:
        """Health goes NOT_SERVING; calls are still served."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float = 5.0) -> None:
        """Health goes NOT_SERVING, running calls get `grace_s`, then all is closed."""
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            bulk = [] if self._bulk is None else [self._bulk.stop(grace_s)]
            await asyncio.gather(self._server.stop(grace_s), *bulk)
            self._server = None
        if self._metrics is not None:
            await self._metrics.stop()
        self._node.close()
        await self._backend.close()

    async def wait(self) -> None:
        """Returns when the server has stopped."""
        if self._server is not None:
            await self._server.wait_for_termination()


def _join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _server_options() -> Options:
    return [
        *server_options(max_receive_bytes=MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_metadata_size", 16 << 10),
    ]
