"""Which process goes to which machine."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.deploy.cluster.plan import Machine, Member, choose_machine, wanted_members


def machine(name: str, **resources: float) -> Machine:
    return Machine(id=name, address=name, resources={"CPU": 2.0, **resources})


def place(members: list[Member], machines: list[Machine]) -> dict[str, str | None]:
    """Machine by member, placed one after the other."""
    placed: dict[str, list[Member]] = {}
    chosen: dict[str, str | None] = {}
    for member in members:
        found = choose_machine(member, machines, placed)
        chosen[member.name] = None if found is None else found.id
        if found is not None:
            placed.setdefault(found.id, []).append(member)
    return chosen


def members(**counts: Any) -> list[Member]:
    defaults: dict[str, Any] = {
        "directory": 0,
        "store": 0,
        "prefill": 0,
        "decode": 0,
        "gateway": 0,
        "prefill_gpus": 0,
        "decode_gpus": 0,
    }
    return wanted_members(**(defaults | counts))


def test_each_machine_has_one_store_node_and_one_gateway() -> None:
    chosen = place(members(store=4, gateway=2), [machine("a"), machine("b"), machine("c")])
    assert {chosen[f"store-{i}"] for i in range(3)} == {"a", "b", "c"}
    assert chosen["store-3"] is None
    assert chosen["gateway-0"] != chosen["gateway-1"]


def test_workers_are_spread_by_role_first_and_by_number_then() -> None:
    chosen = place(members(prefill=1, decode=2), [machine("a"), machine("b"), machine("c")])
    assert chosen == {"prefill-0": "a", "decode-0": "b", "decode-1": "c"}
    chosen = place(members(prefill=2, decode=2), [machine("a"), machine("b")])
    assert {chosen["prefill-0"], chosen["prefill-1"]} == {"a", "b"} == {chosen["decode-0"], chosen["decode-1"]}


def test_a_machine_takes_as_many_workers_as_it_has_cores() -> None:
    chosen = place(members(decode=5), [machine("a"), machine("b")])
    assert [chosen[f"decode-{i}"] for i in range(5)].count(None) == 1


@pytest.mark.parametrize("gpus, room", [(1.0, 4), (2.0, 2), (0.5, 8)])
def test_all_gpus_of_a_worker_are_on_one_machine(gpus: float, room: int) -> None:
    machines = [machine("cpu", CPU=64), machine("a", CPU=64, GPU=2), machine("b", CPU=64, GPU=2)]
    chosen = place(members(decode=room + 1, decode_gpus=gpus), machines)
    assert list(chosen.values()).count(None) == 1
    assert "cpu" not in chosen.values()
    # Three GPUs are nowhere on one machine, though there are four.
    assert place(members(decode=1, decode_gpus=3.0), machines) == {"decode-0": None}


def test_the_ranks_of_a_worker_are_on_one_machine() -> None:
    machines = [machine("a"), machine("b", CPU=4)]
    chosen = place(members(prefill=1, decode=2, prefill_ranks=4, decode_ranks=2), machines)
    assert chosen == {"prefill-0": "b", "decode-0": "a", "decode-1": None}


def test_a_role_may_be_kept_to_machines_with_a_resource() -> None:
    machines = [machine("a"), machine("b", **{"accelerator_type:H100": 1.0})]
    chosen = place(members(prefill=1, decode=1, prefill_resource="accelerator_type:H100"), machines)
    assert chosen == {"prefill-0": "b", "decode-0": "a"}
