"""What every process of a deployment says of itself, asked over gRPC, for people and as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.table import Table

from kvferry.deploy.cluster.autoscaler import RoleScaling
from kvferry.deploy.cluster.controller import MemberState
from kvferry.deploy.security import Credentials
from kvferry.proto import kvstore_pb2, kvstore_pb2_grpc, worker_pb2, worker_pb2_grpc
from kvferry.proto.grpc_options import channel_options
from kvferry.proto.peer_security import PeerSecurity

ASK_TIMEOUT_S = 3.0


@dataclass(frozen=True, kw_only=True)
class ProcessStatus:
    """One process. `numbers` depend on its role; see `_ask_worker` and `_ask_store`."""

    name: str
    role: str
    state: str
    health: str
    """SERVING, NOT_SERVING, or why there was no answer."""
    address: str = ""
    machine: str = ""
    pid: int = 0
    version: str = ""
    num_starts: int = 0
    problem: str = ""
    model: str = ""
    kernels: str = ""
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def is_well(self) -> bool:
        return self.state == "up" and self.health == "SERVING"


async def gather(states: Sequence[MemberState], credentials: Credentials) -> list[ProcessStatus]:
    """Asks all at once; who does not answer within `ASK_TIMEOUT_S` is reported so."""
    peers, gateways = credentials
    asked = (_ask(state, gateways if state.role == "gateway" else peers) for state in states)
    return list(await asyncio.gather(*asked))


def as_json(name: str, processes: Sequence[ProcessStatus], scaling: Sequence[RoleScaling]) -> dict[str, Any]:
    return {
        "name": name,
        "well": all(p.is_well for p in processes),
        "processes": [asdict(p) for p in processes],
        "scaling": [asdict(role) for role in scaling],
    }


def print_table(name: str, processes: Sequence[ProcessStatus], scaling: Sequence[RoleScaling]) -> None:
    table = Table(title=f"deployment {name}", title_justify="left")
    for column in ("process", "machine", "address", "pid", "starts", "health", "what it does", "version"):
        table.add_column(column, overflow="fold")
    for p in processes:
        health = p.health if p.state == "up" else f"{p.state}: {p.problem or p.health}"
        table.add_row(
            p.name, p.machine, p.address, str(p.pid or ""), str(p.num_starts or ""), health, _sentence(p), p.version
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    console.print(table)
    for role in scaling:
        console.print(scaling_line(role), markup=False, highlight=False, soft_wrap=True)


def scaling_line(role: RoleScaling) -> str:
    """How many workers a role has and is to have, and why."""
    line = f"{role.role}: {role.running} of {role.wanted} wanted workers up"
    if not role.is_automatic:
        return f"{line}; the number is fixed"
    line += f"; {role.min} to {role.max} by load. Last: {role.decision}, {role.decided_s_ago:.0f} s ago."
    return f"{line} Now: {role.sees}" if role.sees else line


def _sentence(p: ProcessStatus) -> str:
    n = p.numbers
    match p.role:
        case "decode" if n:
            blocks = (
                f"{n['pool_blocks_used']:.0f} used + {n['pool_blocks_cached']:.0f} cached of {n['pool_blocks']:.0f}"
            )
            return f"{n['running']:.0f} running, {n['waiting']:.0f} waiting; blocks: {blocks}"
        case "prefill" if n:
            return f"{n['requests']:.0f} requests; {n['blocks_fetched']:.0f} blocks fetched"
        case "store" if n:
            size = f"{n['records']:.0f} records, {n['bytes'] / 2**20:.1f} MiB"
            return f"{size}; {n['hits']:.0f} hits, {n['misses']:.0f} misses"
        case _:
            return ""


async def _ask(state: MemberState, security: PeerSecurity) -> ProcessStatus:
    known: dict[str, Any] = {
        "name": state.name,
        "role": state.role,
        "state": state.state,
        "machine": state.machine,
        "num_starts": state.num_starts,
        "problem": state.problem,
    }
    if state.started is None:
        return ProcessStatus(health="not started", **known)
    known |= {"address": state.started.address, "pid": state.started.pid, "version": state.started.version}
    async with security.channel(state.started.address, channel_options()) as channel:
        try:
            reply = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=ASK_TIMEOUT_S
            )
            known["health"] = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
            if state.role in ("prefill", "decode"):
                known |= await _ask_worker(channel)
            elif state.role == "store":
                known |= {"numbers": await _ask_store(channel)}
        except grpc.aio.AioRpcError as error:
            known["health"] = f"no answer ({error.code().name})"
    return ProcessStatus(**known)


async def _ask_worker(channel: grpc.aio.Channel) -> dict[str, Any]:
    stub = worker_pb2_grpc.WorkerStub(channel)
    info = await stub.Describe(worker_pb2.DescribeRequest(), timeout=ASK_TIMEOUT_S)
    stats = await stub.Stats(worker_pb2.StatsRequest(), timeout=ASK_TIMEOUT_S)
    numbers: dict[str, float] = {}
    if stats.HasField("decode"):
        d = stats.decode
        numbers |= {
            "running": d.num_running,
            "waiting": d.num_waiting,
            "pool_blocks": d.pool_blocks,
            "pool_blocks_used": d.pool_blocks_used,
            "pool_blocks_cached": d.pool_blocks_cached,
            "swaps": d.num_swaps,
        }
    if stats.HasField("prefill"):
        p = stats.prefill
        numbers |= {
            "requests": p.num_requests,
            "blocks_fetched": p.num_blocks_fetched,
            "blocks_recomputed": p.num_blocks_recomputed,
            "fetch_bytes_per_second": p.fetch_bytes_per_second,
        }
    return {"model": info.model_name, "kernels": info.kernels, "numbers": numbers}


async def _ask_store(channel: grpc.aio.Channel) -> dict[str, float]:
    stats = await kvstore_pb2_grpc.KVStoreStub(channel).Stats(kvstore_pb2.StatsRequest(), timeout=ASK_TIMEOUT_S)
    return {
        "records": stats.records,
        "bytes": stats.bytes,
        "hits": stats.hits,
        "misses": stats.misses,
    }
