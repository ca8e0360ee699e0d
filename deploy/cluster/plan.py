"""Which process goes to which machine. Plain functions of what is wanted and what is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Role = Literal["directory", "store", "prefill", "decode", "gateway"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine of the Ray cluster."""

    id: str
    """Ray's id of the node."""
    address: str
    """Its own address, which the others reach it by."""
    resources: Mapping[str, float]
    """All that it has, used or not: CPU, GPU, and what `ray start --resources` named."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A process that the deployment wants."""

    name: str
    """The Ray actor's name: decode-1."""
    role: Role
    index: int
    cpus: float = 0
    gpus: float = 0
    resource: str | None = None
    """A Ray resource that its machine must have."""

    @property
    def one_per_machine(self) -> bool:
        """All but workers: a machine has one at most, and it does not move by itself."""
        return self.role not in ("prefill", "decode")


def wanted_members(
    *,
    directory: int,
    store: int,
    prefill: int,
    decode: int,
    gateway: int,
    prefill_gpus: float,
    decode_gpus: float,
    prefill_ranks: int = 1,
    decode_ranks: int = 1,
    prefill_resource: str | None = None,
    decode_resource: str | None = None,
) -> list[Member]:
    """In the order in which they are placed. A worker takes a CPU a rank, for placement; its threads are set apart."""
    return [
        *(Member(name="directory", role="directory", index=i) for i in range(directory)),
        *(Member(name=f"store-{i}", role="store", index=i) for i in range(store)),
        *(
            Member(
                name=f"prefill-{i}",
                role="prefill",
                index=i,
                cpus=prefill_ranks,
                gpus=prefill_gpus,
                resource=prefill_resource,
            )
            for i in range(prefill)
        ),
        *(
            Member(
                name=f"decode-{i}",
                role="decode",
                index=i,
                cpus=decode_ranks,
                gpus=decode_gpus,
                resource=decode_resource,
            )
            for i in range(decode)
        ),
        *(Member(name=f"gateway-{i}", role="gateway", index=i) for i in range(gateway)),
    ]


def choose_machine(member: Member, machines: Iterable[Machine], placed: Mapping[str, list[Member]]) -> Machine | None:
    """The machine for one more process, or None where none has room.

    `placed` are the members by machine id. Workers go where the fewest of their role are, then where the fewest
    workers are, then in the machines' order.
    """
    fitting = [machine for machine in machines if _has_room(member, machine, placed.get(machine.id, []))]

    def load(machine: Machine) -> tuple[int, int]:
        there = placed.get(machine.id, [])
        return sum(m.role == member.role for m in there), sum(not m.one_per_machine for m in there)

    return min(fitting, key=load, default=None)


def _has_room(member: Member, machine: Machine, there: list[Member]) -> bool:
    if member.one_per_machine:
        return all(other.role != member.role for other in there)
    if member.resource is not None and not machine.resources.get(member.resource):
        return False
    free_cpus = machine.resources.get("CPU", 0) - sum(other.cpus for other in there)
    free_gpus = machine.resources.get("GPU", 0) - sum(other.gpus for other in there)
    return member.cpus <= free_cpus and member.gpus <= free_gpus
