"""The Ray application: KV store nodes, prefill workers, decode workers and gateway, each an actor in its own process.

    client ──▶ gateway ──▶ decode workers ──▶ prefill workers
                                  └──▶ store nodes ◀──┘

Ray places and ends the processes. The data plane is gRPC: no prompt, token or KV byte passes through Ray.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

# Ray reads these when it is imported. The first keeps its own ports on loopback for a deployment on one machine.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # else a line of one worker hides a similar one of another

import ray
import torch

from kvferry.decode.config import DecodeConfig
from kvferry.deploy.assembly import decode_config, make_gateway, model_config, prefill_config
from kvferry.deploy.models import find_model
from kvferry.deploy.rank_counts import RankCounts, threads_of_rank, with_ranks
from kvferry.deploy.security import peer_security, require_asking
from kvferry.deploy.security_settings import SecuritySettings
from kvferry.deploy.settings import DecodeSettings, PrefillSettings, Settings
from kvferry.deploy.worker_server import ModelConfig, ModelRuntime, WorkerServer
from kvferry.kvstore.malloc import tune_malloc
from kvferry.kvstore.process_logs import LogConfig, configure_logs
from kvferry.kvstore.ring_config import RingConfig
from kvferry.kvstore.server import KVStoreServer
from kvferry.kvstore.store_config import make_backend
from kvferry.prefill.config import PrefillConfig

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 15.0
RAY_OBJECT_STORE_BYTES = 80_000_000
"""Ray's smallest object store: nothing of ours goes through it."""


class LoggingActor:
    """Logs as the deployment's settings say."""

    async def log_as(self, config: LogConfig, name: str) -> None:
        configure_logs(config, process=name)


class StoreActor(LoggingActor):
    """A KV store node."""

    async def start(self, settings: Settings, index: int) -> str:
        tune_malloc()
        store = settings.store
        backend = await asyncio.to_thread(make_backend, store.store_config(index))
        config = dataclasses.replace(
            store.node_config(index), metrics=settings.metrics.place(store.port and store.port + index)
        )
        security = await asyncio.to_thread(peer_security, settings.security)
        self._server = KVStoreServer(backend, config, security=security)
        await self._server.start()
        return self._server.address

    async def stop(self) -> None:
        await self._server.stop()

    async def pid(self) -> int:
        return os.getpid()


class WorkerActor(LoggingActor):
    """A prefill or decode worker: `config` decides which. With `own_prefill`, a decode worker with both roles."""

    async def start(
        self,
        model: ModelConfig,
        config: PrefillConfig | DecodeConfig,
        store: RingConfig,
        threads: int,
        own_prefill: PrefillConfig | None,
        store_cache_bytes: int | None,
        security: SecuritySettings,
    ) -> str:
        tune_malloc()
        torch.set_num_threads(threads)
        self._runtime = await asyncio.to_thread(ModelRuntime, model)
        self._server = WorkerServer(
            self._runtime,
            config=config,
            store_address=store,
            own_prefill=own_prefill,
            store_cache_bytes=store_cache_bytes,
            security=await asyncio.to_thread(peer_security, security),
        )
        return await self._server.start()

    async def set_store_nodes(self, nodes: tuple[str, ...]) -> None:
        self._server.set_store_nodes(nodes)

    async def stop(self) -> None:
        await self._server.stop()
        await asyncio.to_thread(self._runtime.close)

    async def pid(self) -> int:
        return os.getpid()


class GatewayActor(LoggingActor):
    """The gateway; ready when it could serve a request."""

    async def start(self, settings: Settings, prefill: list[str], decode: list[str]) -> str:
        self._server = await make_gateway(settings, prefill=prefill, decode=decode)
        port = await self._server.start()
        await self._server.wait_until_serving(60)
        return f"{settings.gateway.host}:{port}"

    async def stop(self) -> None:
        await self._server.stop(5)

    async def pid(self) -> int:
        return os.getpid()


class Deployment:
    """All processes of one machine, as a context manager. Starts a Ray of its own and ends only that."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.address = ""
        """host:port of the gateway, once started."""
        self.store: RingConfig | None = None
        """The store's nodes, once started."""
        self.processes: dict[str, int] = {}
        """Process ids by name: store (several: store-0, …), prefill-0, decode-0, gateway."""
        self._actors: dict[str, Any] = {}
        self._ray_dir = ""

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Drains every actor, then ends this deployment's Ray. Safe to call twice."""
        if not self._ray_dir:
            return
        for name in reversed(self._actors):
            try:
                ray.get(self._actors[name].stop.remote(), timeout=STOP_TIMEOUT_S)
            except ray.exceptions.RayError as error:  # dead already, or it never started
                logger.info("%s did not stop by itself: %s", name, type(error).__name__)
        ray.shutdown()
        shutil.rmtree(self._ray_dir, ignore_errors=True)
        self._actors, self._ray_dir = {}, ""

    def _start(self) -> None:
        settings = self.settings
        started = time.monotonic()
        if settings.gateway.count != 1:
            raise ValueError(
                "gateway.count: one machine has one gateway; other numbers are for a cluster, see kvferry up"
            )
        find_model(settings.model)  # a wrong name should fail before anything starts; converts a GGUF file once
        require_asking(settings)
        ranks = RankCounts.of(settings)
        workers = settings.prefill.count + settings.decode.count
        self._ray_dir = tempfile.mkdtemp(prefix="kvferry-ray-")
        ray.init(
            address="local",
            _temp_dir=self._ray_dir,
            include_dashboard=False,
            num_cpus=max(workers + settings.store.count + 1, os.cpu_count() or 1),
            object_store_memory=RAY_OBJECT_STORE_BYTES,
            log_to_driver=logger.isEnabledFor(logging.INFO),
            logging_level=logging.WARNING,
        )
        present = ray.cluster_resources().get("GPU", 0)

        def gpus(wanted: float | None, size: int) -> float:
            return ranks.gpus(size, available=present) if wanted is None else wanted

        self.store = ring = settings.store.ring_config(settings.store.nodes or self._start_nodes())
        model = model_config(settings)
        cores = os.cpu_count() or 1
        prefill_configs = [
            prefill_config(
                settings, host=settings.prefill.host, port=settings.prefill.port and settings.prefill.port + i
            )
            for i in range(settings.prefill.count)
        ]
        own_prefill = None if prefill_configs else prefill_config(settings)
        decode_configs = [
            decode_config(settings, host=settings.decode.host, port=settings.decode.port and settings.decode.port + i)
            for i in range(settings.decode.count)
        ]
        cache = settings.store.worker_cache
        workers_of: list[tuple[str, PrefillConfig | DecodeConfig, PrefillSettings | DecodeSettings]] = [
            *((f"prefill-{i}", c, settings.prefill) for i, c in enumerate(prefill_configs)),
            *((f"decode-{i}", c, settings.decode) for i, c in enumerate(decode_configs)),
        ]
        pending = {
            name: self._begin(
                name,
                WorkerActor,
                with_ranks(model, section),
                config,
                ring,
                threads_of_rank(settings, section.num_ranks, num_cores=cores),
                own_prefill,
                cache,
                settings.security,
                num_gpus=gpus(section.gpus, section.num_ranks),
            )
            for name, config, section in workers_of
        }
        addresses = {name: self._finish(name, start) for name, start in pending.items()}
        self.address = self._launch(
            "gateway",
            GatewayActor,
            settings,
            [a for name, a in addresses.items() if name.startswith("prefill")],
            [a for name, a in addresses.items() if name.startswith("decode")],
        )
        logger.info("serving on %s after %.1f s", self.address, time.monotonic() - started)

    @property
    def store_address(self) -> str:
        """host:port of the first store node."""
        return "" if self.store is None else self.store.nodes[0]

    def set_store_nodes(self, nodes: Sequence[str]) -> None:
        """Tells every worker that the store has these nodes from now on; see `StoreRing.set_nodes`. Raises ValueError
        for what is no list of nodes, RayError when a worker does not answer."""
        if self.store is None:
            raise ValueError("the deployment is not started")
        ring = dataclasses.replace(self.store, nodes=tuple(nodes))
        workers = [handle for name, handle in self._actors.items() if name.startswith(("prefill-", "decode-"))]
        ray.get([worker.set_store_nodes.remote(ring.nodes) for worker in workers], timeout=STOP_TIMEOUT_S)
        self.store = ring

    def _start_nodes(self) -> list[str]:
        count = self.settings.store.count
        names = ["store"] if count == 1 else [f"store-{i}" for i in range(count)]
        pending = {name: self._begin(name, StoreActor, self.settings, i) for i, name in enumerate(names)}
        return [self._finish(name, start) for name, start in pending.items()]

    def _launch(self, name: str, actor: type, *args: object) -> str:
        return self._finish(name, self._begin(name, actor, *args))

    def _begin(self, name: str, actor: type, *args: object, num_gpus: float = 0) -> Any:
        handle = ray.remote(actor).options(num_cpus=1, num_gpus=num_gpus, max_restarts=0).remote()
        self._actors[name] = handle
        handle.log_as.remote(self.settings.log.config(), name)
        return handle.start.remote(*args)

    def _finish(self, name: str, start: Any) -> str:
        """Waits for an actor's start; its own error is raised as it is."""
        try:
            address: str = ray.get(start, timeout=START_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            raise RuntimeError(f"{name} did not start: {error.cause}") from error
        self.processes[name] = ray.get(self._actors[name].pid.remote(), timeout=STOP_TIMEOUT_S)
        logger.info("%s is up on %s", name, address)
        return address
