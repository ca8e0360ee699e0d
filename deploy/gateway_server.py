"""Runs a gateway in this event loop: in a process of its own, in a test, or in a Ray actor."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client.core import Metric

from kvferry.deploy.client_tokens import ClientTokens
from kvferry.deploy.config import GatewayConfig, ModelLimits
from kvferry.deploy.edge_security import EdgeGuard
from kvferry.deploy.gateway import SERVICE, Gateway
from kvferry.deploy.gateway_metrics import GatewayMetrics, gateway_families
from kvferry.deploy.interceptor import EdgeInterceptor
from kvferry.deploy.membership import Lease, Membership, StaticMembership
from kvferry.deploy.observed_gateway import ObservedGateway
from kvferry.deploy.prompt import Tokenizer
from kvferry.deploy.routing.policies import make_router
from kvferry.deploy.routing.router import Router
from kvferry.deploy.worker_pool import WorkerPool
from kvferry.kvstore.metrics_endpoint import MetricsEndpoint
from kvferry.proto import gateway_pb2, gateway_pb2_grpc, inference_pb2_grpc
from kvferry.proto.grpc_options import server_options

# A prompt just over its limit still gets our sentence; a message beyond this is refused by gRPC, unread.
_MESSAGE_OVERHEAD_BYTES = 2**20


class _Stats(gateway_pb2_grpc.GatewayServicer):
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def Stats(self, request: gateway_pb2.StatsRequest, context: Any) -> gateway_pb2.GatewayStats:
        return self._gateway.stats()


class GatewayServer:
    """`start` once, `stop` once. Health is SERVING only while a request could be served.

    All sockets and tasks belong to the event loop that `start` runs in.
    """

    def __init__(
        self,
        config: GatewayConfig,
        *,
        tokenizer: Tokenizer,
        model: ModelLimits,
        router: Router | None = None,
        membership: Membership | None = None,
    ) -> None:
        """`membership`: where the workers come from, in place of the config's addresses. Closed with the server."""
        self._config = config
        self._membership = membership or StaticMembership.of(
            decode=config.decode_workers, prefill=config.prefill_workers
        )
        self._following: list[asyncio.Task[None]] = []
        self._tokens: ClientTokens | None = None
        self._guard: EdgeGuard | None = None
        self._health = health.aio.HealthServicer()
        self._pool = WorkerPool(
            model_name=config.model_name,
            tokenizer_digest=config.tokenizer_digest,
            poll_interval_s=config.poll_interval_s,
            poll_timeout_s=config.poll_timeout_s,
            on_change=self._update_health,
            security=config.security,
        )
        self._gateway = Gateway(
            config,
            tokenizer=tokenizer,
            model=model,
            pool=self._pool,
            router=router or make_router(config.router, index_bytes=config.router_memory),
        )
        self.metrics = GatewayMetrics(config.model_name)
        self._endpoint: MetricsEndpoint | None = None
        self.metrics_port = 0
        """Where Prometheus asks, once started; 0: nowhere."""
        self._changed = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Listens, begins to look for workers, and returns the port. Raises OSError when the port is taken or the file
        of tokens cannot be read, ValueError when it is none, OpenPortRefused when the port may not be open."""
        config, limits = self._config, self._config.limits
        tokens = None
        if config.edge.tokens_file is not None:
            tokens = await asyncio.to_thread(ClientTokens, config.edge.tokens_file)
        self._tokens = tokens
        self._guard = EdgeGuard(tokens, config.security, default_tenant=config.tenant)
        server = grpc.aio.server(
            interceptors=[
                self._guard,
                EdgeInterceptor(
                    SERVICE,
                    default_timeout_s=limits.default_timeout_s,
                    write_timeout_s=limits.write_timeout_s,
                ),
            ],
            options=server_options(max_receive_bytes=limits.max_prompt_bytes + _MESSAGE_OVERHEAD_BYTES),
        )
        observed = ObservedGateway(self._gateway, self.metrics, default_timeout_s=limits.default_timeout_s)
        inference_pb2_grpc.add_InferenceServicer_to_server(observed, server)
        gateway_pb2_grpc.add_GatewayServicer_to_server(_Stats(self._gateway), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        await self._update_health()
        port = config.edge.add_port(server, f"{config.host}:{config.port}")
        self._following.append(asyncio.create_task(self._follow_members()))
        if tokens is not None:
            self._following.append(asyncio.create_task(tokens.follow()))
        if config.metrics is not None:
            self._endpoint = MetricsEndpoint(config.metrics, self._families, also=[self.metrics.registry])
            self.metrics_port = await self._endpoint.start()
        await server.start()
        self._server = server
        return port

    def use_lease(self, lease: Lease) -> None:
        """Whose epoch `stats` tells."""
        self._gateway.use_lease(lease)

    async def begin_drain(self) -> None:
        """Health goes NOT_SERVING; requests are still taken."""
        await self._health.enter_graceful_shutdown()

    async def drain(self, timeout_s: float) -> bool:
        """Says NOT_SERVING, refuses new requests, waits for the running ones; see `Gateway.drain`."""
        await self.begin_drain()
        return await self._gateway.drain(timeout_s)

    async def stop(self, grace: float | None = None) -> None:
        """Says NOT_SERVING, takes no new requests, gives running ones `grace` seconds, then ends them."""
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(grace)
        for task in self._following:
            task.cancel()
        await asyncio.gather(*self._following, return_exceptions=True)
        await self._membership.close()
        await self._pool.close()
        if self._endpoint is not None:
            await self._endpoint.stop()
        self._gateway.close()

    async def wait_for_termination(self) -> None:
        if self._server is not None:
            await self._server.wait_for_termination()

    @property
    def problem(self) -> str:
        """Why requests cannot be served now; empty when they can."""
        return self._pool.why_not_serving()

    async def wait_until_serving(self, timeout: float) -> None:
        """Raises TimeoutError, with the reason, when workers are not ready in time."""
        try:
            async with asyncio.timeout(timeout):
                while self.problem:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise TimeoutError(f"not serving after {timeout:g} s: {self.problem}") from None

    def set_workers(self, *, decode: Iterable[str], prefill: Iterable[str] = ()) -> None:
        """Replaces the worker addresses, for workers that moved, came or left."""
        self._pool.set_addresses(decode=decode, prefill=prefill)

    async def _follow_members(self) -> None:
        async for members in self._membership.watch():
            self.set_workers(decode=members.addresses("decode"), prefill=members.addresses("prefill"))

    async def _families(self) -> list[Metric]:
        told = gateway_families(
            model_name=self._config.model_name,
            num_running=self._gateway.num_running,
            num_queued=self._gateway.num_queued,
            num_pairs=len(self._pool.pairs()),
            serving=not self.problem,
            num_refused={} if self._guard is None else self._guard.num_refused,
            token_reloads={
                "taken": 0 if self._tokens is None else self._tokens.num_reloads,
                "failed": 0 if self._tokens is None else self._tokens.num_failed_reloads,
            },
        )
        return list(told)

    async def _update_health(self) -> None:
        status = health_pb2.HealthCheckResponse
        now = status.NOT_SERVING if self.problem else status.SERVING
        for service in (health.OVERALL_HEALTH, SERVICE):
            await self._health.set(service, now)
        self._changed.set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()
