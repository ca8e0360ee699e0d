"""A rolling restart: one process after the other drains, ends and starts anew, the next only when it is used again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import grpc

from kvferry.deploy.cluster.controller import MemberState
from kvferry.deploy.cluster.status import gather
from kvferry.deploy.directory_client import list_members
from kvferry.deploy.members import Members
from kvferry.deploy.security import Credentials
from kvferry.proto import gateway_pb2, gateway_pb2_grpc
from kvferry.proto.grpc_options import channel_options
from kvferry.proto.peer_security import PeerSecurity

ORDER = ("directory", "store", "prefill", "decode", "gateway")
NEEDED = ("prefill", "decode", "gateway")
"""A request needs one of each."""
POLL_S = 0.5
OPEN = Credentials()
ASK_TIMEOUT_S = 3.0


def choose(states: Sequence[MemberState], only: Sequence[str]) -> list[MemberState]:
    """The processes that `only` names by role or name, all when it names none, in the order in which they restart.

    Raises ValueError for what is neither.
    """
    known = {state.role for state in states} | {state.name for state in states}
    if unknown := [name for name in only if name not in known]:
        raise ValueError(f"there is no process and no role {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    chosen = [state for state in states if not only or state.name in only or state.role in only]
    return sorted(chosen, key=lambda state: ORDER.index(state.role))


def without_stand_in(states: Sequence[MemberState], chosen: Sequence[MemberState]) -> list[str]:
    """Roles that requests need and that have one process only, among those of `chosen`."""
    return [
        role
        for role in NEEDED
        if any(state.role == role for state in chosen) and sum(state.role == role for state in states) == 1
    ]


def rolling_restart(
    members: Callable[[], list[MemberState]],
    restart: Callable[[str], None],
    *,
    only: Sequence[str] = (),
    directory: str | None = None,
    credentials: Credentials = OPEN,
    wait_s: float,
    may_interrupt: bool = False,
    progress: Callable[[str], None],
) -> int:
    """Restarts the processes that `only` names, or all; returns how many.

    `members` and `restart`: the controller's. `directory`: host:port of one elsewhere. `credentials`: what the
    processes ask for. A process that is not back `wait_s` seconds after it was told to restart ends it all, with
    TimeoutError. Raises ValueError when something is not well at the start, or, without `may_interrupt`, when a role
    that requests need has one process only.
    """
    states = members()
    chosen = choose(states, only)
    unwell = [p.name for p in asyncio.run(gather(states, credentials)) if not p.is_well]
    if unwell:
        raise ValueError(f"not well: {', '.join(unwell)}; a rolling restart needs the others (see kvferry status)")
    alone = without_stand_in(states, chosen)
    if alone and not may_interrupt:
        raise ValueError(
            f"there is one {' and one '.join(alone)} only, and requests would fail while it restarts: add one first "
            "(kvferry scale; gateway.count), or say --interrupt"
        )
    for state in chosen:
        began = time.monotonic()
        restart(state.name)
        told = ""
        while told := _missing(members(), state, directory, credentials):
            if time.monotonic() - began > wait_s:
                raise TimeoutError(f"{state.name} is not back after {wait_s:g} s: {told}")
            time.sleep(POLL_S)
        progress(f"{state.name}: back after {time.monotonic() - began:.1f} s")
    return len(chosen)


def _missing(
    states: Sequence[MemberState], before: MemberState, directory: str | None, credentials: Credentials
) -> str:
    """What the process that was `before` lacks until it can do without the next one; empty: nothing."""
    now = next((state for state in states if state.name == before.name), None)
    if now is None or now.started is None:
        return "it is not wanted any more" if now is None else now.problem or now.state
    if now.state != "up" or (before.started is not None and now.started.pid == before.started.pid):
        return now.problem or "it still runs what it had"
    if directory is None:
        directory = next((s.started.address for s in states if s.role == "directory" and s.started is not None), "")
    return asyncio.run(_unused(states, now, directory, credentials))


async def _unused(states: Sequence[MemberState], state: MemberState, directory: str, credentials: Credentials) -> str:
    """Who does not know a process that is up; empty: everybody does."""
    [status] = await gather([state], credentials)
    if not status.is_well:
        return f"its health is {status.health}"
    try:
        members = await list_members(directory, security=credentials.peers, timeout_s=ASK_TIMEOUT_S)
    except (OSError, ValueError) as error:
        return str(error)
    listed = {member.address for member in members.members}
    # A directory that starts again knows nobody at first.
    expected = [s for s in states if s.state == "up" and s.started is not None and s.role != "directory"]
    if absent := [s.name for s in expected if s.started is not None and s.started.address not in listed]:
        return f"the directory does not list {', '.join(absent)}"
    return (
        await _not_used_by(members, status.address, credentials.gateways) if state.role in ("prefill", "decode") else ""
    )


async def _not_used_by(members: Members, worker: str, security: PeerSecurity) -> str:
    """The gateways that do not use a worker; empty: all do."""
    for address in members.addresses("gateway"):
        async with security.channel(address, channel_options()) as channel:
            try:
                stats = await gateway_pb2_grpc.GatewayStub(channel).Stats(
                    gateway_pb2.StatsRequest(), timeout=ASK_TIMEOUT_S
                )
            except grpc.aio.AioRpcError as error:
                return f"gateway {address} does not answer ({error.code().name})"
        if worker not in stats.workers:
            return f"gateway {address} does not use it yet"
    return ""
