"""The directory from the outside: `Registration` announces this process, `DirectoryMembership` watches the others.

Both outlive the directory: they go on with what they know and try again, with growing pauses, until it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import AsyncIterator, Callable, Sequence

import grpc

from kvferry.deploy.config import check_address
from kvferry.deploy.members import Member, Members
from kvferry.proto import directory_pb2, directory_pb2_grpc
from kvferry.proto.grpc_options import channel_options
from kvferry.proto.peer_security import PeerSecurity

_logger = logging.getLogger(__name__)

_CALL_S = 1.0
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 1.5  # well within the time that a new directory gives its members to come back
_ANNOUNCES_PER_LEASE = 5
_LONGEST_INTERVAL_S = 1.0
_SILENCE_S = 3.0  # the directory says something every second


class Pauses:
    """Pauses between tries: each twice the one before, up to a bound, and not in step with those of others."""

    def __init__(self) -> None:
        self._next_s = _FIRST_PAUSE_S

    def reset(self) -> None:
        self._next_s = _FIRST_PAUSE_S

    def next(self) -> float:
        pause = self._next_s * random.uniform(0.7, 1.0)
        self._next_s = min(2 * self._next_s, _LONGEST_PAUSE_S)
        return pause


class Registration:
    """Keeps this process in the directory from `start` until `leave`. Lives on one event loop."""

    def __init__(
        self,
        directory: str,
        *,
        address: str,
        roles: Sequence[str],
        on_lease_lost: Callable[[], None] = lambda: None,
        security: PeerSecurity | None = None,
    ) -> None:
        """`address`: host:port where the others reach this process. `on_lease_lost` runs when a lease ended behind this
        process's back, because it was stopped or cut off: what it ran is running elsewhere. Raises ValueError."""
        check_address(directory)
        self._member = Member(address, tuple(roles), secrets.token_hex(16))
        self._directory = directory
        self._on_lease_lost = on_lease_lost
        self._security = security or PeerSecurity()
        self._task: asyncio.Task[None] | None = None
        self.epoch = 0
        """See `Lease`."""
        self.num_leases_lost = 0
        """See `Lease`."""
        self.registered = asyncio.Event()
        """Set while the last announcement was answered."""

    def start(self) -> None:
        """Begins to announce; does not wait for the directory."""
        self._channel = self._security.channel(self._directory, channel_options())
        self._stub = directory_pb2_grpc.DirectoryStub(self._channel)
        self._task = asyncio.create_task(self._announce_forever())

    async def leave(self) -> None:
        """Off the list, if the directory answers within a second. Safe to call twice, and before `start`."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        try:
            await self._stub.Leave(directory_pb2.LeaveRequest(instance_id=self._member.instance_id), timeout=_CALL_S)
        except grpc.aio.AioRpcError as error:
            _logger.info("the directory was not told of leaving (%s); the lease ends by itself", error.code().name)
        await self._channel.close()

    async def _announce_forever(self) -> None:
        pauses = Pauses()
        while True:
            try:
                pause = await self._announce()
                pauses.reset()
                self.registered.set()
            except grpc.aio.AioRpcError as error:
                if self.registered.is_set() or self.epoch == 0:
                    level = logging.WARNING if self.registered.is_set() else logging.DEBUG
                    _logger.log(level, "the directory does not take announcements: %s", _reason(error))
                self.registered.clear()
                pause = pauses.next()
            await asyncio.sleep(pause)

    async def _announce(self) -> float:
        """Seconds until the next one is due."""
        member = self._member
        reply = await self._stub.Announce(
            directory_pb2.AnnounceRequest(
                member=directory_pb2.Member(
                    address=member.address, roles=member.roles, instance_id=member.instance_id, epoch=self.epoch
                )
            ),
            timeout=_CALL_S,
        )
        if reply.epoch != self.epoch:
            _logger.info("registered with epoch %d", reply.epoch)
            self.epoch = reply.epoch
        if reply.lease_lost:
            self.num_leases_lost += 1
            _logger.warning("the lease was lost; what was running is ended, it runs elsewhere")
            self._on_lease_lost()
        return min(max(reply.lease_seconds / _ANNOUNCES_PER_LEASE, _FIRST_PAUSE_S), _LONGEST_INTERVAL_S)


class DirectoryMembership:
    """`Membership` of those whom a directory knows."""

    def __init__(
        self,
        directory: str,
        *,
        roles: Sequence[str] = (),
        security: PeerSecurity | None = None,
    ) -> None:
        """`roles`: only members with one of these; none: all. Raises ValueError."""
        check_address(directory)
        self._directory = directory
        self._roles = tuple(roles)
        self._security = security or PeerSecurity()
        self._channel: grpc.aio.Channel | None = None
        self.members = Members()
        """Those known last."""

    async def watch(self) -> AsyncIterator[Members]:
        """See `Membership`."""
        self._channel = self._security.channel(self._directory, channel_options())
        stub = directory_pb2_grpc.DirectoryStub(self._channel)
        pauses = Pauses()
        told = None
        while True:
            call = stub.Watch(directory_pb2.WatchRequest(roles=self._roles))
            try:
                while (reply := await _next_reply(call)) is not None:
                    pauses.reset()
                    if reply.has_members and (members := self._take(reply)) != told:
                        told = self.members = members
                        yield members
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                _logger.debug("the directory is away, the known members stay: %s", _reason(error))
            finally:
                call.cancel()
            await asyncio.sleep(pauses.next())

    async def close(self) -> None:
        """See `Membership`."""
        if self._channel is not None:
            await self._channel.close()

    def _take(self, reply: directory_pb2.WatchReply) -> Members:
        """A directory that has just started does not know all: nobody is taken off then."""
        members: list[Member] = []
        for told in reply.members:
            with contextlib.suppress(ValueError):  # a role that this version does not know
                members.append(Member(told.address, tuple(told.roles), told.instance_id, told.epoch))
        return Members(tuple(members)) if reply.settled else self.members.updated(members)


async def list_members(directory: str, *, security: PeerSecurity | None = None, timeout_s: float = 5.0) -> Members:
    """Who is in the directory now. Raises OSError when it does not answer, ValueError for what is no host:port."""
    check_address(directory)
    async with (security or PeerSecurity()).channel(directory, channel_options()) as channel:
        call = directory_pb2_grpc.DirectoryStub(channel).Watch(directory_pb2.WatchRequest(), timeout=timeout_s)
        try:
            reply = await _next_reply(call)
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            raise OSError(f"no directory answers at {directory}: {_reason(error)}") from None
        finally:
            call.cancel()
    return Members(
        tuple(Member(m.address, tuple(m.roles), m.instance_id, m.epoch) for m in (reply.members if reply else ()))
    )


async def _next_reply(
    call: grpc.aio.UnaryStreamCall[directory_pb2.WatchRequest, directory_pb2.WatchReply],
) -> directory_pb2.WatchReply | None:
    """None when the directory has ended the stream. Raises TimeoutError when it is silent."""
    async with asyncio.timeout(_SILENCE_S):
        reply: object = await call.read()
    return reply if isinstance(reply, directory_pb2.WatchReply) else None


def _reason(error: Exception) -> str:
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else "it is silent"
