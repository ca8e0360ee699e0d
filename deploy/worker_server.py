"""A prefill or decode worker as a process: model, kernels, engine, store client and gRPC server put together."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from collections.abc import Callable, Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client.core import Metric

from kvferry.decode.config import DecodeConfig
from kvferry.decode.engine import DecodeEngine
from kvferry.decode.prefill_stream import RemotePrefillStream
from kvferry.decode.server import DecodeServicer
from kvferry.decode.worker import DecodeWorker
from kvferry.deploy.executors import make_executors
from kvferry.deploy.kv_memory import plan_kv_memory
from kvferry.deploy.local_prefill import LocalPrefillStream
from kvferry.deploy.membership import Lease, Membership
from kvferry.deploy.model_config import ModelConfig
from kvferry.deploy.models import LoadedModel, load_tokenizer, tokenizer_digest
from kvferry.deploy.numerics import numerics_class
from kvferry.deploy.worker_metrics import worker_families
from kvferry.kernels.dispatch import Selection
from kvferry.kernels.forward import CausalModel
from kvferry.kernels.layout import LAYOUT_VERSION
from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.config import DEFAULT_MAX_RECORD_BYTES
from kvferry.kvstore.connect import connect
from kvferry.kvstore.guard_metrics import guard_family
from kvferry.kvstore.metrics_endpoint import Collects, MetricsEndpoint
from kvferry.kvstore.read_cache import ReadCache
from kvferry.kvstore.ring import StoreRing
from kvferry.kvstore.ring_config import RingConfig
from kvferry.kvstore.store import Store
from kvferry.prefill.config import PrefillConfig
from kvferry.prefill.engine import PrefillEngine
from kvferry.prefill.server import PrefillServicer
from kvferry.proto import worker_pb2, worker_pb2_grpc
from kvferry.proto.attempts import Attempts
from kvferry.proto.grpc_options import server_options
from kvferry.proto.peer_security import PeerSecurity

__all__ = ["ModelConfig", "ModelRuntime", "WorkerServer"]

logger = logging.getLogger(__name__)

RECORD_OVERHEAD_BYTES = 256
_PUBLISHING_POLL_S = 0.05
RANKS_LOST = 4
"""Exit status of a worker whose group lost a rank."""
REPORTED_CONTEXT = 4096
"""Tokens around which effective bits are stated."""


def _end_process(reason: str) -> None:
    """A group of ranks that lost one computes nothing any more: the worker ends, and the gateway goes elsewhere."""
    logger.critical("this worker ends: %s", reason)
    logging.shutdown()
    os._exit(RANKS_LOST)


class ModelRuntime:
    """A loaded model with its kernels, layout, probe and identity."""

    def __init__(self, config: ModelConfig, *, on_ranks_lost: Callable[[str], None] = _end_process) -> None:
        """`on_ranks_lost(reason)` is called, on any thread, when a rank of this worker's group ends or hangs."""
        self.executors = make_executors(config, on_lost=on_ranks_lost)
        self.rank = rank = self.executors.rank
        self._served_name = config.served_name or rank.loaded.source.name
        self.loaded: LoadedModel = rank.loaded
        self.layout = rank.layout
        """Of whole blocks."""
        self.model: CausalModel = rank.model
        self.selection: Selection = rank.selection
        self.max_model_len = rank.max_model_len
        self.windows = rank.windows
        self.rows_invariant = rank.rows_invariant
        logger.info("prefill passes cover up to %d blocks", rank.pass_blocks)
        self.engine = PrefillEngine(self.executors.prefill(), max_pass_blocks=rank.pass_blocks)
        self.identity = self._identity()

    def close(self) -> None:
        """Ends the prefill engine's thread, and the other ranks where there are any."""
        self.engine.close()
        self.executors.close()

    def _identity(self) -> worker_pb2.ModelIdentity:
        return worker_pb2.ModelIdentity(
            weights_digest=self.loaded.weights_digest,
            tokenizer_digest=tokenizer_digest(load_tokenizer(self.loaded.source)),
            spec_digest=self.layout.spec.digest(),
            layout_version=LAYOUT_VERSION,
            numerics_class=numerics_class(
                self.loaded,
                self.engine,
                kernels_name=self.selection.kernels.name,
                rows_invariant=self.rows_invariant,
                num_ranks=self.rank.team.size,
            ),
        )

    def info(self, *, roles: list[str], pool_blocks: int = 0) -> worker_pb2.WorkerInfo:
        return worker_pb2.WorkerInfo(
            model_name=self._served_name,
            model_path=self.loaded.source.path,
            roles=roles,
            identity=self.identity,
            block_size=self.layout.block_size,
            block_bytes=self.layout.block_bytes,
            max_model_len=self.max_model_len,
            kv_bytes_per_token_bf16=self.layout.bytes_per_token_bf16,
            pool_blocks=pool_blocks,
            device=str(self.loaded.device),
            kernels=self.selection.kernels.name,
            effective_bits=self.layout.mean_effective_bits(REPORTED_CONTEXT),
        )


class _Worker(worker_pb2_grpc.WorkerServicer):
    def __init__(self, info: worker_pb2.WorkerInfo, stats: Callable[[], worker_pb2.WorkerStats]) -> None:
        self._info = info
        self._stats = stats

    async def Stats(
        self, request: worker_pb2.StatsRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> worker_pb2.WorkerStats:
        return self._stats()

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> worker_pb2.WorkerInfo:
        return self._info


class WorkerServer:
    """Serves one role, or both, until `stop`. Built off the event loop (loading takes seconds), started on it."""

    def __init__(
        self,
        runtime: ModelRuntime,
        *,
        config: PrefillConfig | DecodeConfig,
        store_address: str | RingConfig | None,
        own_prefill: PrefillConfig | None = None,
        store_cache_bytes: int | None = None,
        remote_prefill: type[RemotePrefillStream] = RemotePrefillStream,
        membership: Membership | None = None,
        security: PeerSecurity | None = None,
    ) -> None:
        """`store_address`: host:port of the one store node, or several nodes. `own_prefill`: a decode worker has the
        role prefill, too, and hands over in memory. `store_cache_bytes`: keep so much of what the store gave.
        `remote_prefill`: how it reaches other prefill workers. `membership`: where the store's nodes come from, with a
        ring as `store_address`; closed with the server. `security`: who may call it, and how it calls others; without,
        everybody who reaches it, on loopback only."""
        self._security = security or PeerSecurity()
        self._guards = self._security.guards()
        self._membership = membership
        self._following: asyncio.Task[None] | None = None
        self._remote_prefill = remote_prefill
        self._runtime = runtime
        self._config = config
        self._own_prefill = own_prefill
        self._store_address = store_address
        self._store_cache_bytes = store_cache_bytes
        self._nodes: StoreClient | StoreRing | None = None
        self._store: Store | None = None
        """The nodes, or a cache before them."""
        self._server: grpc.aio.Server | None = None
        self._metrics: MetricsEndpoint | None = None
        self.metrics_port = 0
        """Where Prometheus asks, once started; 0: nowhere."""
        self._health = health.aio.HealthServicer()
        self._info = worker_pb2.WorkerInfo()
        self._lease: Lease | None = None
        self._decode: tuple[DecodeEngine, DecodeServicer] | None = None
        self.prefill_servicer: PrefillServicer | None = None
        """The Prefill service, when this is its role and it has started."""
        self.decode_worker: DecodeWorker | None = None
        """The worker behind the Decode service, when this is its role and it has started."""

    async def start(self) -> str:
        """Binds, serves and returns host:port. Raises OSError when it cannot bind, OpenPortRefused when it may not."""
        largest = self._runtime.layout.payload_bytes(0) + RECORD_OVERHEAD_BYTES
        if largest > DEFAULT_MAX_RECORD_BYTES:
            raise ValueError(
                f"a block of this model makes a record of {largest} bytes, over {DEFAULT_MAX_RECORD_BYTES}: "
                "choose a smaller block_size"
            )
        if self._store_address:
            self._store = self._nodes = connect(self._store_address, self._security)
            if self._store_cache_bytes is not None:
                self._store = ReadCache(self._nodes, self._store_cache_bytes)
        server = grpc.aio.server(interceptors=self._guards, options=server_options())
        if isinstance(self._config, PrefillConfig):
            info = self._runtime.info(roles=["prefill"])
            self._add_prefill(server, self._config, info)
        else:
            info = self._add_decode(server, self._config)
        self._info = info
        worker_pb2_grpc.add_WorkerServicer_to_server(_Worker(info, self.stats), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        port = self._security.add_port(server, f"{self._config.host}:{self._config.port}")
        await self._serve_metrics(info)
        await server.start()
        self._server = server
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        if self._membership is not None:
            self._following = asyncio.create_task(self._follow_members(self._membership))
        return f"{self._config.host}:{port}"

    def set_store_nodes(self, nodes: Sequence[str]) -> None:
        """Changes the nodes of the store's ring while requests run; see `StoreRing.set_nodes`. Raises ValueError."""
        if not isinstance(self._nodes, StoreRing):
            raise ValueError("this worker was started with the address of one store node: give it a ring to change it")
        self._nodes.set_nodes(nodes)

    @property
    def roles(self) -> tuple[str, ...]:
        """Once started."""
        return tuple(self._info.roles)

    def use_lease(self, lease: Lease) -> None:
        """Whose epoch `stats` tells."""
        self._lease = lease

    def end_running(self, reason: str) -> None:
        """Ends every running request with UNAVAILABLE: this worker was away, and they run elsewhere."""
        for attempts in self._attempts():
            attempts.end_all(reason)

    async def begin_drain(self) -> None:
        """Health goes NOT_SERVING, and gateways hear that they should send nothing more; what they send is taken."""
        self._info.draining = True
        await self._health.enter_graceful_shutdown()

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new requests and says so; waits until the running ones, and publishing, have ended. False when
        `timeout_s` was not enough: what still runs then is ended with UNAVAILABLE."""
        await self.begin_drain()
        for attempts in self._attempts():
            attempts.draining = True
        end = time.monotonic() + timeout_s
        idle = [await attempts.until_idle(end - time.monotonic()) for attempts in self._attempts()]
        prefill = self.prefill_servicer
        while prefill is not None and prefill.num_requests and time.monotonic() < end:
            await asyncio.sleep(_PUBLISHING_POLL_S)
        self.end_running("the worker's time to drain is over")
        return all(idle)

    def _attempts(self) -> list[Attempts]:
        prefill = [] if self.prefill_servicer is None else [self.prefill_servicer.attempts]
        return prefill if self._decode is None else [self._decode[1].attempts, *prefill]

    async def stop(self, grace_s: float = 5.0) -> None:
        """Health goes NOT_SERVING, running requests get `grace_s`, then everything is closed."""
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(grace_s)
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        if self._membership is not None:
            await self._membership.close()
        if self._decode is not None:
            engine, servicer = self._decode
            await servicer.close()
            await asyncio.to_thread(engine.close)
        if self._metrics is not None:
            await self._metrics.stop()
        if self._store is not None:
            await self._store.close()

    async def _follow_members(self, membership: Membership) -> None:
        async for members in membership.watch():
            try:
                self.set_store_nodes(members.addresses("store"))
            except ValueError as error:
                logger.warning("the store's nodes stay as they are: %s", error)

    def stats(self) -> worker_pb2.WorkerStats:
        """What the roles of this worker are doing now."""
        stats = worker_pb2.WorkerStats(calls=self._call_stats())
        if self.prefill_servicer is not None:
            stats.prefill.CopyFrom(self.prefill_servicer.stats())
        if self._decode is not None and self.decode_worker is not None:
            engine, servicer = self._decode
            admission = self.decode_worker.admission
            pool = admission.pool
            stats.decode.CopyFrom(
                worker_pb2.DecodeStats(
                    pool_blocks=pool.num_blocks,
                    pool_blocks_used=pool.num_used,
                    pool_blocks_cached=pool.num_cached,
                    num_running=engine.num_running,
                    num_requests=admission.num_requests,
                    num_waiting=admission.num_waiting,
                    num_swaps=admission.num_swaps,
                    num_answers_published=servicer.warmer.num_warmed,
                    num_answers_not_published=servicer.warmer.num_left_out,
                    step_seconds=engine.step_seconds,
                )
            )
        return stats

    async def _serve_metrics(self, info: worker_pb2.WorkerInfo) -> None:
        if self._config.metrics is None:
            return

        async def families() -> list[Metric]:
            told = worker_families(
                info,
                self.stats(),
                prefill=self.prefill_servicer,
                nodes=self._nodes,
                store=self._store,
                follower_pids=self._runtime.executors.follower_pids,
            )
            return [*told, guard_family(self._guards, {"model_name": info.model_name})]

        of_requests: list[Collects] = []
        if self.prefill_servicer is not None:
            of_requests.append(self.prefill_servicer.metrics.registry)
        if self._decode is not None:
            of_requests.append(self._decode[1].metrics.registry)
        self._metrics = MetricsEndpoint(self._config.metrics, families, also=of_requests)
        self.metrics_port = await self._metrics.start()

    def _call_stats(self) -> worker_pb2.CallStats:
        attempts = self._attempts()
        counters = [item.counters for item in attempts]
        return worker_pb2.CallStats(
            num_running=sum(item.num_running for item in attempts),
            num_superseded=sum(item.num_superseded for item in counters),
            num_stale=sum(item.num_stale for item in counters),
            num_fenced=sum(item.num_fenced for item in counters),
            num_refused=sum(item.num_refused for item in counters),
            num_prefill_lost=0 if self._decode is None else self._decode[1].num_prefill_lost,
            epoch=0 if self._lease is None else self._lease.epoch,
            num_leases_lost=0 if self._lease is None else self._lease.num_leases_lost,
        )

    def _add_prefill(self, server: grpc.aio.Server, config: PrefillConfig, info: worker_pb2.WorkerInfo) -> None:
        self.prefill_servicer = servicer = PrefillServicer(
            engine=self._runtime.engine,
            store=self._store,
            info=info,
            config=config,
            cache_blocks=(self._store_cache_bytes or 0) // info.block_bytes,
        )
        worker_pb2_grpc.add_PrefillServicer_to_server(servicer, server)

    def _add_decode(self, server: grpc.aio.Server, config: DecodeConfig) -> worker_pb2.WorkerInfo:
        runtime = self._runtime
        plan = plan_kv_memory(
            runtime.executors.share_of(config.kv_memory),
            runtime.rank.shard_layout,
            runtime.loaded.device,
            windows=runtime.windows,
            num_slots=config.max_num_seqs,
            max_model_len=runtime.max_model_len,
        )
        executor = runtime.executors.decode(num_blocks=plan.num_blocks, num_slots=config.max_num_seqs)
        engine = DecodeEngine(executor)
        self.decode_worker = worker = DecodeWorker(
            engine=engine, cache=executor.memory, store=self._store, config=config
        )
        roles = ["decode"] if self._own_prefill is None else ["prefill", "decode"]
        info = runtime.info(roles=roles, pool_blocks=executor.memory.num_blocks)
        local_prefill = None
        if self._own_prefill is not None:
            self._add_prefill(server, self._own_prefill, info)
            assert self.prefill_servicer is not None
            local_prefill = functools.partial(LocalPrefillStream, self.prefill_servicer)
        servicer = DecodeServicer(
            worker=worker,
            info=info,
            vocab_size=runtime.model.vocab_size,
            config=config,
            local_prefill=local_prefill,
            remote_prefill=self._remote_prefill,
            security=self._security,
        )
        worker_pb2_grpc.add_DecodeServicer_to_server(servicer, server)
        self._decode = (engine, servicer)
        logger.info("%s", plan)
        return info
