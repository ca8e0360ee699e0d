"""The prefill workers that a decode worker talks to, and whether they still answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc

from kvferry.proto import worker_pb2, worker_pb2_grpc
from kvferry.proto.grpc_options import channel_options
from kvferry.proto.peer_security import PeerSecurity

logger = logging.getLogger(__name__)

ASK_INTERVAL_S = 0.8
ASK_TIMEOUT_S = 1.0
MAX_SILENT = 2
"""Unanswered questions after which a worker is given up: a long computation does not keep it from answering."""


class PrefillPeer:
    """A prefill worker, and the channel to it. While somebody waits for it, it is asked whether it is there."""

    def __init__(self, address: str, on_lost: Callable[[], None], security: PeerSecurity) -> None:
        self.address = address
        self.channel = security.channel(address, channel_options(ping_while_idle=True))
        self._on_lost = on_lost
        self._waiting: list[Callable[[], None]] = []
        self._asking: asyncio.Task[None] | None = None

    def watch(self, give_up: Callable[[], None]) -> None:
        """Runs `give_up` when the worker falls silent before `unwatch`."""
        self._waiting.append(give_up)
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())

    def unwatch(self, give_up: Callable[[], None]) -> None:
        """Safe to call twice."""
        if give_up in self._waiting:
            self._waiting.remove(give_up)
        if not self._waiting and self._asking is not None:
            self._asking.cancel()
            self._asking = None

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
        await self.channel.close()

    async def _ask(self) -> None:
        describe = worker_pb2_grpc.WorkerStub(self.channel).Describe
        num_silent = 0
        while True:
            await asyncio.sleep(0 if num_silent else ASK_INTERVAL_S)
            try:
                await describe(worker_pb2.DescribeRequest(), timeout=ASK_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    num_silent = 0  # the connection broke, or the worker has another trouble: the call itself says so
                    continue
                num_silent += 1
                if num_silent == MAX_SILENT:
                    self._give_up()
                    num_silent = 0
            else:
                num_silent = 0

    def _give_up(self) -> None:
        logger.warning("prefill worker %s is silent: %d requests give it up", self.address, len(self._waiting))
        self._on_lost()
        for give_up in list(self._waiting):
            give_up()


class PrefillPeers:
    """One for each address, kept."""

    def __init__(self, security: PeerSecurity | None = None) -> None:
        self._security = security or PeerSecurity()
        self._peers: dict[str, PrefillPeer] = {}
        self.num_lost = 0
        """Times that a worker was given up."""

    def get(self, address: str) -> PrefillPeer:
        if address not in self._peers:
            self._peers[address] = PrefillPeer(address, self._count, self._security)
        return self._peers[address]

    async def close(self) -> None:
        for peer in self._peers.values():
            await peer.close()

    def _count(self) -> None:
        self.num_lost += 1
