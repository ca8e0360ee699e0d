"""A deployment of real processes, as tests look at it: who takes part, what each says of itself, and waiting for it.

Where the processes run, and how one is brought back, is the business of subclasses.
"""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import grpc

from kvferry.deploy.directory_client import list_members
from kvferry.proto import gateway_pb2, gateway_pb2_grpc, worker_pb2, worker_pb2_grpc
from kvferry.proto.grpc_options import channel_options
from kvferry.proto.peer_security import PeerSecurity

JOIN_S = 60.0
ASK_S = 1.0
METRICS_OFFSET = 1000
WORKERS = ("prefill", "decode")
_BREAKER = re.compile(r'^kvferry_store_client_breaker_open\{.*node="([^"]+)".*\} 1', re.MULTILINE)


class Proc(Protocol):
    """One process, over its lives."""

    name: str
    kind: str  # directory, store, prefill, decode, gateway

    @property
    def address(self) -> str:
        """host:port of its gRPC."""
        ...

    def signal(self, number: int) -> None: ...


class Deployment(ABC):
    peers = PeerSecurity()
    """What its processes ask each other for, and these tests."""
    join_s = JOIN_S
    """How long a process may take to take part."""

    @property
    @abstractmethod
    def procs(self) -> Mapping[str, Proc]:
        """By name; the directory, too."""

    @abstractmethod
    async def bring_back(self, proc: Proc) -> None:
        """Sees that a process that got SIGKILL has ended, and has it started again."""

    @abstractmethod
    async def check(self, proc: Proc) -> None:
        """Raises AssertionError for a process that has ended by itself."""

    @property
    def directory(self) -> Proc:
        return self.procs["directory"]

    @property
    def gateways(self) -> list[str]:
        return [proc.address for proc in self.of_kind("gateway")]

    def of_kind(self, *kinds: str) -> list[Proc]:
        return [proc for proc in self.procs.values() if proc.kind in kinds]

    async def until_joined(self, *procs: Proc) -> None:
        """Until they are members, and every gateway uses them if they are workers."""
        await self.until(lambda: self._joined(procs), f"{[p.name for p in procs]} did not join")

    async def until_left(self, proc: Proc) -> None:
        async def left() -> bool:
            return not await self.is_member(proc)

        await self.until(left, f"{proc.name} is still a member")

    async def is_member(self, proc: Proc) -> bool:
        """Also when the directory is too slow to say: a busy machine may be."""
        try:
            return proc.address in await self.members()
        except OSError:
            return True

    async def members(self, timeout_s: float = 5.0) -> set[str]:
        """Addresses. Raises OSError when the directory does not answer."""
        known = await list_members(self.directory.address, security=self.peers, timeout_s=timeout_s)
        return {member.address for member in known.members}

    async def _joined(self, procs: tuple[Proc, ...]) -> bool:
        for proc in procs:
            await self.check(proc)
        try:
            members = await self.members()
        except OSError:
            return False
        if any(proc.kind != "directory" and proc.address not in members for proc in procs):
            return False
        for gateway in self.of_kind("gateway"):
            stats = await self.gateway_stats(gateway)
            if stats is None or any(p.kind in WORKERS and p.address not in stats.workers for p in procs):
                return False
        return True

    async def until(self, condition: Callable[[], Awaitable[object]], problem: str, seconds: float = 0.0) -> None:
        """`seconds`: 0: `join_s`."""
        end = time.monotonic() + (seconds or self.join_s)
        while not await condition():
            assert time.monotonic() < end, problem
            await asyncio.sleep(0.05)

    async def gateway_stats(self, proc: Proc) -> gateway_pb2.GatewayStats | None:
        """None when it does not answer."""
        async with self.peers.channel(proc.address, channel_options()) as channel:
            try:
                return await gateway_pb2_grpc.GatewayStub(channel).Stats(gateway_pb2.StatsRequest(), timeout=ASK_S)
            except grpc.aio.AioRpcError:
                return None

    async def calls(self, proc: Proc) -> worker_pb2.CallStats | None:
        """What a worker says of its calls; None when it does not answer."""
        async with self.peers.channel(proc.address, channel_options()) as channel:
            try:
                stats = await worker_pb2_grpc.WorkerStub(channel).Stats(worker_pb2.StatsRequest(), timeout=ASK_S)
            except grpc.aio.AioRpcError:
                return None
        return stats.calls

    async def given_up_stores(self, worker: Proc) -> set[str]:
        """Addresses of the store nodes that a worker does not ask now, by its metrics."""
        host, _, port = worker.address.rpartition(":")
        url = f"http://{host}:{int(port) + METRICS_OFFSET}/metrics"

        def scrape() -> str:
            with urllib.request.urlopen(url, timeout=ASK_S) as reply:
                return str(reply.read(), "utf-8")

        try:
            return set(_BREAKER.findall(await asyncio.to_thread(scrape)))
        except OSError:
            return set()
