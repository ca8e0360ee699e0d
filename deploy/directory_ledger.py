"""What the directory knows: members, leases and epochs. No sockets, no clock of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Protocol

from kvferry.deploy.members import Member, Members

MAX_MEMBERS = 4096
_MAX_LEFT = 1024


class Refused(Exception):
    """This member cannot join; `str()` says why."""


class Grant(NamedTuple):
    epoch: int
    lease_lost: bool
    """The lease that the member named is over, and others may have its work."""


class Epochs(Protocol):
    def next(self) -> int:
        """A number greater than every one before, whatever happened in between."""
        ...

    def raise_to(self, epoch: int) -> None:
        """Numbers to come are greater than `epoch`."""
        ...


class Ledger:
    """Members with leases. `clock` is monotonic, in seconds; `tick` lets time pass, nothing else does.

    For `settle_s` after its start a ledger takes members over with the epoch that they name: they had it from the
    directory's life before this one. Later an unknown epoch means that its lease was lost.
    """

    def __init__(self, epochs: Epochs, *, lease_s: float, settle_s: float, clock: Callable[[], float]) -> None:
        self._epochs = epochs
        self._lease_s = lease_s
        self._clock = clock
        self._members: dict[str, Member] = {}
        self._expires: dict[str, float] = {}
        self._left: OrderedDict[str, None] = OrderedDict()
        self._taken_off: OrderedDict[str, None] = OrderedDict()
        """Instances whose lease this ledger saw end."""
        self._last_tick = clock()
        self._settled_at = self._last_tick + settle_s
        self.version = 0
        """Changes with the members, and with `settled`."""
        self.settled = settle_s <= 0
        self.num_expired = 0
        self.num_leases_lost = 0

    @property
    def members(self) -> Members:
        return Members(tuple(self._members.values()))

    def announce(self, member: Member) -> Grant:
        """Joins or stays. Raises `Refused`."""
        instance = member.instance_id
        if instance in self._left:
            raise Refused("this instance has left; a new process needs a new instance_id")
        known = self._members.get(instance)
        if known is not None:
            lost, member = False, replace(member, epoch=known.epoch)
        elif len(self._members) >= MAX_MEMBERS:
            raise Refused(f"the directory is full: {MAX_MEMBERS} members")
        else:
            lost, member = self._admit(member)
        self._expires[instance] = self._clock() + self._lease_s
        if member != known:
            self._members[instance] = member
            self.version += 1
        return Grant(member.epoch, lost)

    def leave(self, instance_id: str) -> None:
        _remember(self._left, instance_id)
        self._remove(instance_id)

    def tick(self, *, interval_s: float) -> None:
        """Ends leases. Call it every `interval_s`: when it comes much later, this process was stopped, nobody could
        announce anything, and all leases are longer by that time."""
        now = self._clock()
        late = now - self._last_tick - interval_s
        if late > interval_s:
            self._expires = {instance: end + late for instance, end in self._expires.items()}
            self._settled_at += late
        self._last_tick = now
        for instance in [instance for instance, end in self._expires.items() if end < now]:
            self.num_expired += 1
            _remember(self._taken_off, instance)
            self._remove(instance)
        if not self.settled and now >= self._settled_at:
            self.settled = True
            self.version += 1

    def _admit(self, member: Member) -> tuple[bool, Member]:
        """(whether a lease was lost, the member with its epoch). The newer of two at one address stays."""
        other = next((m for m in self._members.values() if m.address == member.address), None)
        if other is not None and 0 < member.epoch < other.epoch:
            raise Refused(f"a newer member has the address {member.address}")
        lost = member.epoch > 0 and (self.settled or member.instance_id in self._taken_off)
        self._taken_off.pop(member.instance_id, None)
        if member.epoch == 0 or lost:
            member = replace(member, epoch=self._epochs.next())
            self.num_leases_lost += lost
        else:
            self._epochs.raise_to(member.epoch)
        if other is not None:
            self._remove(other.instance_id)
        return lost, member

    def _remove(self, instance_id: str) -> None:
        self._expires.pop(instance_id, None)
        if self._members.pop(instance_id, None) is not None:
            self.version += 1


def _remember(instances: OrderedDict[str, None], instance_id: str) -> None:
    instances[instance_id] = None
    if len(instances) > _MAX_LEFT:
        instances.popitem(last=False)
