"""What workers say of their load, asked again and again on a thread of its own: who reads it never waits."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import grpc

from kvferry.proto import worker_pb2, worker_pb2_grpc
from kvferry.proto.grpc_options import channel_options
from kvferry.proto.peer_security import PeerSecurity

logger = logging.getLogger(__name__)

INTERVAL_S = 1.5
ASK_TIMEOUT_S = 1.5
STALE_S = 6.0
"""An answer older than this says nothing about now."""
JOIN_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class _Answer:
    address: str
    at: float
    stats: worker_pb2.WorkerStats


class WorkerStatsPoller:
    """Asks every worker that `follow` names, all at once, about every second and a half."""

    def __init__(self, security: PeerSecurity | None = None) -> None:
        self._security = security or PeerSecurity()
        self._addresses: Mapping[str, str] = {}
        self._answers: dict[str, _Answer] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker-stats", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(JOIN_TIMEOUT_S)

    def follow(self, addresses: Mapping[str, str]) -> None:
        """From now on these workers: host:port by name."""
        self._addresses = dict(addresses)

    def latest(self) -> dict[str, worker_pb2.WorkerStats]:
        """By name, of the workers that have answered within `STALE_S` at the address where they are now."""
        now, addresses = time.monotonic(), self._addresses
        return {
            name: answer.stats
            for name, answer in self._answers.copy().items()
            if now - answer.at <= STALE_S and addresses.get(name) == answer.address
        }

    def _run(self) -> None:
        asyncio.run(self._poll())

    async def _poll(self) -> None:
        channels: dict[str, grpc.aio.Channel] = {}
        while not self._stopping.is_set():
            addresses = self._addresses
            for address in set(channels) - set(addresses.values()):
                await channels.pop(address).close()
            for address in set(addresses.values()) - set(channels):
                channels[address] = self._security.channel(address, channel_options())
            await asyncio.gather(*(self._ask(name, at, channels[at]) for name, at in addresses.items()))
            self._answers = {name: answer for name, answer in self._answers.items() if name in addresses}
            await asyncio.sleep(INTERVAL_S)
        for channel in channels.values():
            await channel.close()

    async def _ask(self, name: str, address: str, channel: grpc.aio.Channel) -> None:
        stub = worker_pb2_grpc.WorkerStub(channel)
        try:
            stats = await stub.Stats(worker_pb2.StatsRequest(), timeout=ASK_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:  # its last answer grows old, and then it is unknown
            logger.debug("%s does not say what it does: %s", name, error.code().name)
            return
        self._answers[name] = _Answer(address, time.monotonic(), stats)
