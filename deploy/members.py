"""Who takes part in a deployment: the members, as every part of it knows them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from kvferry.deploy.config import check_address

ROLES = ("prefill", "decode", "store", "gateway")


@dataclass(frozen=True, slots=True)
class Member:
    address: str
    """host:port, as the others can reach it."""
    roles: tuple[str, ...]
    instance_id: str = ""
    """Of this life of the process; empty where nobody registers."""
    epoch: int = 0
    """Of its lease: greater than that of every lease before it; 0: none."""

    def __post_init__(self) -> None:
        check_address(self.address)
        if not self.roles or any(role not in ROLES for role in self.roles):
            raise ValueError(f"a member has one or more of the roles {', '.join(ROLES)}, not {self.roles!r}")


@dataclass(frozen=True, slots=True)
class Members:
    """All members at one moment. The order is that in which they joined, so that it does not change by itself."""

    members: tuple[Member, ...] = ()

    def addresses(self, role: str) -> tuple[str, ...]:
        """host:port of every member with `role`."""
        return tuple(dict.fromkeys(m.address for m in self.members if role in m.roles))

    def with_roles(self, roles: Collection[str]) -> Members:
        """Those with one of `roles`; all when there are none."""
        return Members(tuple(m for m in self.members if not roles or not set(roles).isdisjoint(m.roles)))

    def updated(self, newer: Iterable[Member]) -> Members:
        """These and `newer`; a newer one replaces the one at its address."""
        known = {member.address: member for member in self.members}
        for member in newer:
            known[member.address] = member
        return Members(tuple(known.values()))
