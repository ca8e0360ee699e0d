"""How full the decode workers' block pools are during a run: asked of the workers themselves, once a second."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import grpc

from kvferry.proto import worker_pb2, worker_pb2_grpc
from kvferry.proto.grpc_options import channel_options
from kvferry.proto.peer_security import PeerSecurity

INTERVAL_S = 1.0
TIMEOUT_S = 2.0


@dataclass
class PoolUsage:
    """Shares of the blocks of one worker's pool that running requests hold, one a poll; and its swaps in the run."""

    worker: str
    shares: list[float] = field(default_factory=list)
    num_swaps: int = 0
    num_unanswered: int = 0
    """Polls that the worker did not answer in time."""

    @property
    def summary(self) -> dict[str, str | float | int | None]:
        """As in the JSON file; the shares are None when no poll was answered."""
        shares = self.shares
        return {
            "worker": self.worker,
            "mean_pool_usage": sum(shares) / len(shares) if shares else None,
            "max_pool_usage": max(shares) if shares else None,
            "num_swaps": self.num_swaps,
            "num_unanswered_polls": self.num_unanswered,
        }


@asynccontextmanager
async def watch_pools(addresses: Sequence[str], security: PeerSecurity) -> AsyncIterator[list[PoolUsage]]:
    """Polls until the context ends. Raises ValueError for an address where no decode worker answers."""
    usages = [PoolUsage(address) for address in addresses]
    async with AsyncExitStack() as stack:
        tasks = []
        for usage in usages:
            channel = await stack.enter_async_context(security.channel(usage.worker, channel_options()))
            stub = worker_pb2_grpc.WorkerStub(channel)
            first = await _first_stats(stub, usage.worker)
            tasks.append(asyncio.create_task(_poll(stub, usage, first.num_swaps)))
        try:
            yield usages
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _first_stats(stub: worker_pb2_grpc.WorkerAsyncStub, address: str) -> worker_pb2.DecodeStats:
    try:
        stats = await stub.Stats(worker_pb2.StatsRequest(), timeout=TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        raise ValueError(f"--worker {address} does not answer ({error.code().name})") from error
    if not stats.HasField("decode"):
        raise ValueError(f"--worker {address} has no block pool: name decode workers")
    return stats.decode


async def _poll(stub: worker_pb2_grpc.WorkerAsyncStub, usage: PoolUsage, swaps_before: int) -> None:
    while True:
        try:
            stats = (await stub.Stats(worker_pb2.StatsRequest(), timeout=TIMEOUT_S)).decode
        except grpc.aio.AioRpcError:
            usage.num_unanswered += 1
        else:
            usage.shares.append(stats.pool_blocks_used / stats.pool_blocks)
            usage.num_swaps = stats.num_swaps - swaps_before
        await asyncio.sleep(INTERVAL_S)
