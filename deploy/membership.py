"""The seam between those who need members and where these come from: a fixed list, or a directory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Protocol

from kvferry.deploy.members import Member, Members


class Membership(Protocol):
    """Tells who takes part. Use it on one event loop; it belongs to whom it is given, who closes it."""

    def watch(self) -> AsyncIterator[Members]:
        """The members as soon as they are known, and again whenever they have changed. Ends when they cannot change any
        more. What goes wrong on the way is no error here: the members known last stay."""
        ...

    async def close(self) -> None:
        """Safe to call twice."""
        ...


class Lease(Protocol):
    """This process's own place among the members."""

    @property
    def epoch(self) -> int:
        """0: none yet."""
        ...

    @property
    def num_leases_lost(self) -> int:
        """Times that it ended behind the process's back."""
        ...


class StaticMembership:
    """Members from the configuration."""

    def __init__(self, members: Iterable[Member]) -> None:
        self._members = Members(tuple(members))

    @classmethod
    def of(
        cls, *, decode: Iterable[str] = (), prefill: Iterable[str] = (), store: Iterable[str] = ()
    ) -> StaticMembership:
        """From host:port of each. Raises ValueError."""
        by_role = {"decode": decode, "prefill": prefill, "store": store}
        return cls(Member(address, (role,)) for role, addresses in by_role.items() for address in addresses)

    async def watch(self) -> AsyncIterator[Members]:
        yield self._members

    async def close(self) -> None:
        """There is nothing to close."""
