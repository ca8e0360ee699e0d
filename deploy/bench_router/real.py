"""The policies on real workers: one process each, the same prompts for every policy, in interleaved rounds.

Each policy has a gateway and a tenant of its own, so nothing that one policy left behind helps another. The workers are
the same. Prompts are new in every round: the first request of each document finds nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

from kvferry.deploy.assembly import make_gateway
from kvferry.deploy.bench_router.results import PolicyRound, TokenSources
from kvferry.deploy.bench_serve.arrivals import arrival_times
from kvferry.deploy.bench_serve.run import run
from kvferry.deploy.bench_serve.workload import PlannedRequest, TokenSource, shared_prefixes, unique_prompts
from kvferry.deploy.bench_transfer_lab import Process
from kvferry.deploy.routing.candidates import Candidates
from kvferry.deploy.routing.policies import Policy, make_router
from kvferry.deploy.routing.router import Route, RoutedRequest, Router
from kvferry.deploy.routing.worker_state import WorkerState
from kvferry.deploy.settings import GatewaySettings, Settings
from kvferry.proto import inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from kvferry.proto.grpc_options import channel_options

W = TypeVar("W", bound=WorkerState)

IDLE_TIMEOUT_S = 120.0
START_TIMEOUT_S = 300.0
STATS_TIMEOUT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class RouterPlan:
    """What the options of `kvferry bench router` say."""

    policies: Sequence[Policy]
    model: str = "demo"
    preset: str = "kv2"
    block_size: int | None = None
    num_prefill: int = 3
    num_decode: int = 2
    num_documents: int = 5
    num_requests: int = 30
    document_tokens: int = 1024
    question_tokens: int = 24
    output_tokens: int = 4
    request_rate: float = 1.5
    rounds: int = 3
    seed: int = 0
    store: bool = True
    bits_per_s: float | None = None
    """Of the link to the store; None: loopback."""
    cache_bytes: int | None = None
    """What each worker keeps of the store's records; None: nothing."""
    timeout_s: float = 300.0


class CountingRouter:
    """A router, and how often it chose which worker."""

    def __init__(self, inner: Router) -> None:
        self._inner = inner
        self.chosen: Counter[str] = Counter()

    def pick(self, candidates: Candidates[W], request: RoutedRequest) -> Route[W]:
        """See `Router`."""
        route = self._inner.pick(candidates, request)
        self.chosen.update(worker.address for worker in (route.prefill, route.decode) if worker is not None)
        return route


async def bench_real(plan: RouterPlan, *, progress: Callable[[str], None]) -> list[PolicyRound]:
    """All rounds. Raises RuntimeError when a process does not start or a request fails."""
    async with AsyncExitStack() as stack:
        progress(f"starting {plan.num_prefill} prefill and {plan.num_decode} decode workers")
        prefills, decodes = await _start_workers(plan, stack)
        stubs = [
            worker_pb2_grpc.WorkerStub(
                await stack.enter_async_context(grpc.aio.insecure_channel(address, options=channel_options()))
            )
            for address in prefills
        ]
        gateways = {policy: await _gateway(plan, policy, prefills, decodes, stack) for policy in plan.policies}
        await _warm_up(plan, gateways)
        rounds = []
        for number in range(plan.rounds):
            turn = number % len(plan.policies)
            for policy in (*plan.policies[turn:], *plan.policies[:turn]):
                router, stub = gateways[policy]
                measured = await _round(plan, number, policy, router, stub, stubs, prefills, decodes)
                rounds.append(measured)
                progress(f"round {number + 1} of {plan.rounds}, {policy}: median TTFT {measured.median_ttft_s:.2f} s")
        return rounds


async def _round(
    plan: RouterPlan,
    number: int,
    policy: Policy,
    router: CountingRouter,
    stub: inference_pb2_grpc.InferenceAsyncStub,
    stubs: Sequence[worker_pb2_grpc.WorkerAsyncStub],
    prefills: Sequence[str],
    decodes: Sequence[str],
) -> PolicyRound:
    requests = _requests(plan, number)
    due_s = arrival_times(len(requests), rate=plan.request_rate, seed=plan.seed + number)
    before = await _idle(stubs)
    router.chosen.clear()
    done = await run(stub, requests, due_s, timeout_s=plan.timeout_s)
    after = await _idle(stubs)
    for request in done.requests:
        if not request.completed:
            raise RuntimeError(f"a request ended with {request.status.name}: {request.error}")
    return PolicyRound(
        policy=policy,
        number=number,
        ttfts_s=tuple(request.ttft_s for request in done.requests),
        prefill_work_s=tuple(b.compute_seconds - a.compute_seconds for a, b in zip(before, after, strict=True)),
        prefill_requests=tuple(router.chosen[address] for address in prefills),
        decode_requests=tuple(router.chosen[address] for address in decodes),
        tokens=_token_sources(before, after, num_prompt_tokens=sum(len(r.token_ids) for r in requests)),
        load_average=os.getloadavg()[0],
    )


def _requests(plan: RouterPlan, number: int) -> list[PlannedRequest]:
    return shared_prefixes(
        TokenSource(seed=1000 * plan.seed + number),
        count=plan.num_requests,
        prefix_len=plan.document_tokens,
        num_prefixes=plan.num_documents,
        suffix_len=plan.question_tokens,
        output_len=plan.output_tokens,
    )


def _token_sources(
    before: Sequence[worker_pb2.PrefillStats], after: Sequence[worker_pb2.PrefillStats], *, num_prompt_tokens: int
) -> TokenSources:
    """Of the prompts' tokens. What was computed is measured, so the blocks' size need not be known: what is neither
    computed nor fetched was shared."""
    computed = sum(b.computed_tokens - a.computed_tokens for a, b in zip(before, after, strict=True))
    counts = [
        sum(getattr(b, name) - getattr(a, name) for a, b in zip(before, after, strict=True))
        for name in ("num_blocks_shared", "num_blocks_fetched", "num_blocks_local")
    ]
    shared, fetched, local = counts
    blocks = shared + fetched
    taken = max(num_prompt_tokens - computed, 0)
    return TokenSources(
        total=num_prompt_tokens,
        computed=computed,
        shared=round(taken * shared / blocks) if blocks else 0,
        own_cache=round(taken * local / blocks) if blocks else 0,
        store=round(taken * (fetched - local) / blocks) if blocks else 0,
    )


async def _idle(stubs: Sequence[worker_pb2_grpc.WorkerAsyncStub]) -> list[worker_pb2.PrefillStats]:
    """Waits until no worker computes or publishes. Raises TimeoutError."""
    async with asyncio.timeout(IDLE_TIMEOUT_S):
        while True:
            stats = [(await stub.Stats(worker_pb2.StatsRequest(), timeout=STATS_TIMEOUT_S)).prefill for stub in stubs]
            if not any(one.num_requests for one in stats):
                return stats
            await asyncio.sleep(0.1)


async def _warm_up(
    plan: RouterPlan, gateways: Mapping[Policy, tuple[CountingRouter, inference_pb2_grpc.InferenceAsyncStub]]
) -> None:
    """Each worker computes something before the first round, so that its speed is known."""
    for policy, (_, stub) in gateways.items():
        requests = unique_prompts(
            TokenSource(seed=7 + plan.policies.index(policy)),
            count=plan.num_prefill,
            input_len=plan.document_tokens // 2,
            output_len=plan.output_tokens,
        )
        done = await run(stub, requests, None, timeout_s=plan.timeout_s, max_concurrency=plan.num_prefill)
        for request in done.requests:
            if not request.completed:
                raise RuntimeError(f"a warm-up request ended with {request.status.name}: {request.error}")


async def _gateway(
    plan: RouterPlan, policy: Policy, prefills: Sequence[str], decodes: Sequence[str], stack: AsyncExitStack
) -> tuple[CountingRouter, inference_pb2_grpc.InferenceAsyncStub]:
    settings = Settings.load(
        model=plan.model, gateway=GatewaySettings(port=0, tenant=f"bench-{policy}", max_concurrent=256, router=policy)
    )
    router = CountingRouter(make_router(policy))
    gateway = await make_gateway(settings, prefill=list(prefills), decode=list(decodes), router=router)
    port = await gateway.start()
    stack.push_async_callback(gateway.stop, 0.2)
    await gateway.wait_until_serving(60)
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=channel_options()))
    return router, inference_pb2_grpc.InferenceStub(channel)


async def _start_workers(plan: RouterPlan, stack: AsyncExitStack) -> tuple[list[str], list[str]]:
    """Addresses of the prefill and of the decode workers."""
    logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvferry-bench-router-")))
    store = None
    if plan.store:
        config = {"role": "store", "bits_per_s": plan.bits_per_s}
        store = await stack.enter_async_context(_process(config, logs / "store.log"))
    names = [("prefill", i) for i in range(plan.num_prefill)] + [("decode", i) for i in range(plan.num_decode)]
    common = {
        "model": plan.model,
        "preset": plan.preset,
        "block_size": plan.block_size,
        "store": store,
        "cache_bytes": plan.cache_bytes if store else None,
    }
    addresses: dict[tuple[str, int], str] = {}
    # Two at a time: each tries the kernels when it starts, and finds other things on a machine that is overrun.
    for first in range(0, len(names), 2):
        pair = names[first : first + 2]
        started = await asyncio.gather(
            *(
                stack.enter_async_context(_process({"role": role, **common}, logs / f"{role}-{index}.log"))
                for role, index in pair
            )
        )
        addresses.update(zip(pair, started, strict=True))
    return (
        [address for (role, _), address in addresses.items() if role == "prefill"],
        [address for (role, _), address in addresses.items() if role == "decode"],
    )


@asynccontextmanager
async def _process(config: dict[str, Any], log: Path) -> AsyncIterator[str]:
    command = [sys.executable, "-m", "kvferry.deploy.bench_router.process", json.dumps(config)]
    async with Process(command, log) as process:
        yield (await process.ask(None, timeout_s=START_TIMEOUT_S))["address"]
