"""A server of any kind with its place in the directory, from start over drain to end."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Sequence
from typing import Protocol

from kvferry.deploy.directory_client import Registration
from kvferry.proto.peer_security import PeerSecurity

_logger = logging.getLogger(__name__)

LEFT_S = 0.3
"""Between leaving the directory and refusing requests: those who watch it hear of it, and send nothing more."""

STOP_GRACE_S = 0.5
"""For calls that are no work: somebody who watches health, a question that is just being answered."""


class Drainable(Protocol):
    """What a member serves with."""

    async def start(self) -> str:
        """host:port"""
        ...

    async def begin_drain(self) -> None:
        """Health goes NOT_SERVING; requests that come nevertheless are still taken."""
        ...

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new work and waits until the running work has ended; False when `timeout_s` was not enough."""
        ...

    async def stop(self, grace_s: float, /) -> None: ...


class ClusterMember:
    """Lives on one event loop. Without `directory` it is found by its address alone."""

    def __init__(
        self,
        server: Drainable,
        *,
        directory: str | None,
        roles: Sequence[str],
        advertise_host: str | None = None,
        on_joining: Callable[[Registration], None] = lambda registration: None,
        on_lease_lost: Callable[[], None] = lambda: None,
        security: PeerSecurity | None = None,
    ) -> None:
        """`advertise_host`: where the others reach this machine, if not at the address that is bound. `on_joining` gets
        the registration; for `on_lease_lost` see there. `security`: what the directory asks for."""
        self._server = server
        self._directory = directory
        self._roles = roles
        self._advertise_host = advertise_host
        self._on_joining = on_joining
        self._on_lease_lost = on_lease_lost
        self._security = security
        self._registration: Registration | None = None

    async def start(self) -> str:
        """Serves, joins, and returns host:port as the others see it. Raises what the server raises."""
        address = await self._server.start()
        if self._advertise_host:
            address = f"{self._advertise_host}:{address.rpartition(':')[2]}"
        if self._directory is not None:
            self._registration = Registration(
                self._directory,
                address=address,
                roles=self._roles,
                on_lease_lost=self._on_lease_lost,
                security=self._security,
            )
            self._on_joining(self._registration)
            self._registration.start()
        return address

    async def stop(self, drain_timeout_s: float) -> bool:
        """Health first; then leaves, drains and ends. False when running work had to be ended."""
        await self._server.begin_drain()
        if self._registration is not None:
            await self._registration.leave()
            await asyncio.sleep(LEFT_S)
        drained = await self._server.drain(drain_timeout_s)
        await self._server.stop(STOP_GRACE_S)
        return drained


async def run_until_signal(member: ClusterMember, what: str, *, drain_timeout_s: float) -> None:
    """Starts, says where on standard output, and ends in order on SIGTERM or SIGINT. Raises what the start raises."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    address = await member.start()
    print(f"kvferry {what} serves on {address}", flush=True)
    await stopping.wait()
    _logger.info("draining for at most %g s", drain_timeout_s)
    if await member.stop(drain_timeout_s):
        _logger.info("drained")
    else:
        _logger.warning("some requests did not end in time, and were ended")
