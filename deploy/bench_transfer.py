"""`kvferry bench transfer`: packed and unquantized blocks over a shaped link between two network namespaces.

Machine A has a prefill worker, a store node and a Redis; machine B has a decode worker, workers with both roles, and
the client. Packed and unquantized (kv16) blocks take turns, round by round, on the same prompts. Real processes, real
sockets, a real model; only the wire is emulated.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from kvferry.deploy.bench_store import find_redis_server
from kvferry.deploy.bench_transfer_lab import ADDRESSES, Lab, Process, check_rights, parse_link

PACKED, BF16 = "packed", "bf16"
BF16_PRESET = "kv16"
PATHS = ("node", "redis")
STORE_MEMORY = "3GiB"
REDIS_PORT = 6379
WARM_UP_TOKENS = 300
FIRST_TOKEN_ID = 10


@dataclass(frozen=True, kw_only=True)
class TransferPlan:
    """What to measure. `links` are names that `parse_link` knows."""

    links: Sequence[str]
    prompt_tokens: Sequence[int]
    paths: Sequence[str] = PATHS
    model: str = "demo"
    preset: str = "kv2"
    block_size: int | None = None
    output_tokens: int = 16
    rounds: int = 1
    request_timeout_s: float = 1200.0
    compare_store: bool = False
    """Also hand over through the store, which costs another prefill a round."""


@dataclass(frozen=True, kw_only=True)
class TransferCase:
    """Medians over the rounds of one link, path and length. None: not measured; `notes` say why.

    The hand-over (`exposed_s` and what follows) does not take the path; it is the same on both.
    """

    link: str
    path: str
    prompt_tokens: int
    ttft_packed_s: float | None
    ttft_bf16_s: float | None
    ttft_recompute_s: float
    fetch_packed_s: float | None
    """Of a hit: from the look-up until all of its blocks are there and checked."""
    fetch_bf16_s: float | None
    wire_bytes_packed: float | None
    """That crossed the link for a hit, both directions, all headers included."""
    wire_bytes_bf16: float | None
    exposed_s: float
    """Streamed hand-over: decode's wait after the handoff message, `DecodeUsage.transfer_seconds`."""
    unstreamed_s: float
    """The same when no block was sent before prefill had handed over."""
    exposed_bf16_s: float
    exposed_store_s: float | None
    """The same when blocks go through the store, each as it is finished."""
    after_prefill_s: float
    """Streamed: from the request's start until decode has everything, less prefill's own account of its time. Counts
    what `exposed_s` cannot see: a handoff message that came late itself."""
    after_prefill_unstreamed_s: float
    jct_packed_s: float
    jct_bf16_s: float
    wire_bytes_handover_packed: float
    wire_bytes_handover_bf16: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TransferResults:
    """All cases, and under what load they were measured."""

    cases: list[TransferCase]
    plan: TransferPlan
    cores: int
    load_before: float
    load_after: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def bench_transfer(plan: TransferPlan, *, progress: Callable[[str], None] = lambda line: None) -> TransferResults:
    """Makes the namespaces, starts the processes, measures, and takes everything away again, also after an error,
    Ctrl-C or SIGTERM.

    Raises PermissionError without root, ValueError for a plan that cannot be carried out, RuntimeError when a process
    fails.
    """
    check_rights()
    for link in plan.links:
        parse_link(link)
    redis = find_redis_server()
    if "redis" in plan.paths and redis is None:
        raise ValueError("the path redis needs redis-server or valkey-server: install one, or give --path node")
    load = os.getloadavg()[0]
    cases = asyncio.run(_until_terminated(_measure_all(plan, redis, progress)))
    return TransferResults(
        cases=cases, plan=plan, cores=os.cpu_count() or 1, load_before=load, load_after=os.getloadavg()[0]
    )


async def _until_terminated(work: Any) -> list[TransferCase]:
    """SIGTERM ends the benchmark as Ctrl-C does, so that nothing of it is left."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    cases: list[TransferCase] = await task
    return cases


class _Answer(NamedTuple):
    """One request's figures, see `Peer.generate`, and what crossed the link meanwhile."""

    said: dict[str, Any]
    wire_bytes: int


@dataclass
class _Rounds:
    """One length over one link: the figures of every round, by name."""

    values: dict[str, list[float]] = field(default_factory=dict)
    notes: set[str] = field(default_factory=set)

    def add(self, name: str, value: float | None) -> None:
        if value is not None:
            self.values.setdefault(name, []).append(value)

    def median(self, name: str) -> float | None:
        values = self.values.get(name)
        return statistics.median(values) if values else None

    def known(self, name: str) -> float:
        return statistics.median(self.values[name])


class _Machines:
    """The running processes of both machines, by format of the blocks."""

    def __init__(self, lab: Lab, plan: TransferPlan) -> None:
        self._lab = lab
        self._plan = plan
        self._peers: dict[tuple[str, str], Process] = {}
        self._addresses: dict[tuple[str, str], dict[str, str]] = {}
        self._number = 0
        self.block_size: dict[str, int] = {}
        self.vocab_size = 0

    async def start(self, stack: AsyncExitStack, folder: Path, redis: str | None) -> None:
        a, b = ADDRESSES["a"], ADDRESSES["b"]
        stores = {"a": await self._start_stores(stack, folder, redis)}
        stores["b"] = stores["a"]
        for kind, preset in ((PACKED, self._plan.preset), (BF16, BF16_PRESET)):
            servers = {
                "a": [{"name": "prefill", "role": "prefill", "host": a, "store": stores["a"]["node"]}],
                "b": [
                    {"name": "decode", "role": "decode", "host": b, "store": stores["b"]["node"]},
                    {"name": "alone", "role": "both", "host": b, "store": None},
                    *({"name": p, "role": "both", "host": b, "store": stores["b"][p]} for p in self._plan.paths),
                ],
            }
            for end, served in servers.items():
                config = {
                    "model": self._plan.model,
                    "preset": preset,
                    "block_size": self._plan.block_size,
                    "servers": served,
                }
                command = [sys.executable, "-m", "kvferry.deploy.bench_transfer_peer", json.dumps(config)]
                log = folder / f"{kind}-{end}.log"
                peer = await stack.enter_async_context(Process([*self._lab.inside(end), *command], log))
                ready = await peer.ask(None, timeout_s=300.0)
                self._peers[kind, end] = peer
                self._addresses[kind, end] = ready["addresses"]
                self.block_size[kind] = ready["block_size"]
                self.vocab_size = ready["vocab_size"]
                too_long = [
                    n for n in self._plan.prompt_tokens if n + self._plan.output_tokens > ready["max_model_len"]
                ]
                if too_long:
                    raise ValueError(
                        f"{too_long} tokens and the answer do not fit the model's {ready['max_model_len']}"
                    )

    async def _start_stores(self, stack: AsyncExitStack, folder: Path, redis: str | None) -> dict[str, str]:
        """A's node writes to its memory and to A's Redis; B reads from A's node, or through a node of its own that has
        nothing but A's Redis."""
        a, b = ADDRESSES["a"], ADDRESSES["b"]
        url = f"redis://{a}:{REDIS_PORT}/0"
        with_redis = "redis" in self._plan.paths and redis is not None
        if with_redis:
            options = ["--port", str(REDIS_PORT), "--bind", a, "--protected-mode", "no", "--save", ""]
            command = [str(redis), *options, "--appendonly", "no", "--dir", str(folder)]
            log = folder / "redis.log"
            server = Process([*self._lab.inside("a"), *command, "--logfile", str(log)], folder / "redis-errors.log")
            await stack.enter_async_context(server)
            await _until_ready(log)
        tiers = ["--memory", STORE_MEMORY, *(["--redis", url] if with_redis else [])]
        stores = {"node": await self._start_node(stack, folder / "node-a.log", "a", a, tiers)}
        if with_redis:
            stores["redis"] = await self._start_node(stack, folder / "node-b.log", "b", b, ["--redis", url])
        return stores

    async def _start_node(self, stack: AsyncExitStack, log: Path, end: str, host: str, tiers: list[str]) -> str:
        command = [sys.executable, "-m", "kvferry.kvstore", "--host", host, "--port", "0", "--insecure", *tiers]
        node = await stack.enter_async_context(Process([*self._lab.inside(end), *command], log))
        line = await node.line_with("serving on ")
        return line.split("serving on ")[1].split(",")[0]

    async def ask(self, kind: str, server: str, how: str, token_ids: list[int], max_tokens: int) -> _Answer:
        """A request to a worker of B; a decode worker's prefill is on A. Nothing else crosses the link meanwhile."""
        self._number += 1
        command = {
            "do": "generate",
            "server": server,
            "prefill": self._addresses[kind, "a"]["prefill"] if server == "decode" else "",
            "request_id": f"{how}:{self._number}",
            "token_ids": token_ids,
            "max_tokens": max_tokens,
            "timeout_s": self._plan.request_timeout_s,
        }
        before = await self._lab.wire_bytes()
        said = await self._peers[kind, "b"].ask(command, timeout_s=self._plan.request_timeout_s + 10.0)
        crossed = await self._lab.wire_bytes() - before
        for end in ADDRESSES:
            await self._peers[kind, end].ask({"do": "idle"}, timeout_s=150.0)
        return _Answer(said, crossed)


async def _measure_all(plan: TransferPlan, redis: str | None, progress: Callable[[str], None]) -> list[TransferCase]:
    cases = []
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvferry-bench-")))
        lab = await stack.enter_async_context(Lab())
        machines = _Machines(lab, plan)
        progress("starting the processes")
        await machines.start(stack, folder, redis)
        prompts = random.Random(0)
        await _one_round(machines, plan, _prompt(prompts, machines, WARM_UP_TOKENS), prompts, _Rounds())
        for link in plan.links:
            await lab.shape(parse_link(link))
            for length in plan.prompt_tokens:
                rounds = _Rounds()
                for number in range(plan.rounds):
                    progress(f"{link}, {length} tokens, round {number + 1} of {plan.rounds}")
                    await _one_round(machines, plan, _prompt(prompts, machines, length), prompts, rounds)
                cases += [_case(plan, rounds, link, path, length) for path in plan.paths]
    return cases


async def _one_round(
    machines: _Machines, plan: TransferPlan, prompt: list[int], prompts: random.Random, rounds: _Rounds
) -> None:
    for kind in (PACKED, BF16):
        streamed = await machines.ask(kind, "decode", "streamed", prompt, plan.output_tokens)
        rounds.add(f"jct_{kind}", streamed.said["jct_s"])
        rounds.add(f"exposed_{kind}", streamed.said["transfer_s"])
        rounds.add(f"after_{kind}", streamed.said["after_prefill_s"])
        rounds.add(f"handover_bytes_{kind}", streamed.wire_bytes)
        expected = streamed.said["tokens"]
        for path in plan.paths:
            hit = await machines.ask(kind, path, "hit", prompt, 1)
            _check_answer(hit, expected[:1], f"a hit by {path}")
            wanted = (len(prompt) - 1) // machines.block_size[kind] * machines.block_size[kind]
            if hit.said["cached_tokens"] == wanted:
                rounds.add(f"ttft_{kind}_{path}", hit.said["ttft_s"])
                rounds.add(f"fetch_{kind}_{path}", hit.said["fetch_s"])
                rounds.add(f"bytes_{kind}_{path}", hit.wire_bytes)
            else:
                got = hit.said["cached_tokens"]
                rounds.notes.add(f"{kind} by {path}: {got} of {wanted} tokens came, the rest was computed")
        if kind == PACKED:
            unstreamed = await machines.ask(kind, "decode", "unstreamed", prompt, plan.output_tokens)
            _check_answer(unstreamed, expected, "an unstreamed hand-over")
            rounds.add("unstreamed", unstreamed.said["transfer_s"])
            rounds.add("after_unstreamed", unstreamed.said["after_prefill_s"])
            alone = await machines.ask(kind, "alone", "recompute", prompt, 1)
            _check_answer(alone, expected[:1], "recomputing")
            rounds.add("ttft_recompute", alone.said["ttft_s"])
            if plan.compare_store:
                other = _prompt(prompts, machines, len(prompt))
                stored = await machines.ask(kind, "decode", "store", other, plan.output_tokens)
                rounds.add("exposed_store", stored.said["transfer_s"])


def _check_answer(answer: _Answer, expected: list[int], what: str) -> None:
    if answer.said["tokens"] != expected:
        raise RuntimeError(f"{what} gave another answer than the streamed hand-over: no figure of this run counts")


def _prompt(prompts: random.Random, machines: _Machines, length: int) -> list[int]:
    return [prompts.randrange(FIRST_TOKEN_ID, machines.vocab_size) for _ in range(length)]


def _case(plan: TransferPlan, rounds: _Rounds, link: str, path: str, length: int) -> TransferCase:
    return TransferCase(
        link=link,
        path=path,
        prompt_tokens=length,
        ttft_packed_s=rounds.median(f"ttft_{PACKED}_{path}"),
        ttft_bf16_s=rounds.median(f"ttft_{BF16}_{path}"),
        ttft_recompute_s=rounds.known("ttft_recompute"),
        fetch_packed_s=rounds.median(f"fetch_{PACKED}_{path}"),
        fetch_bf16_s=rounds.median(f"fetch_{BF16}_{path}"),
        wire_bytes_packed=rounds.median(f"bytes_{PACKED}_{path}"),
        wire_bytes_bf16=rounds.median(f"bytes_{BF16}_{path}"),
        exposed_s=rounds.known(f"exposed_{PACKED}"),
        unstreamed_s=rounds.known("unstreamed"),
        exposed_bf16_s=rounds.known(f"exposed_{BF16}"),
        exposed_store_s=rounds.median("exposed_store"),
        after_prefill_s=rounds.known(f"after_{PACKED}"),
        after_prefill_unstreamed_s=rounds.known("after_unstreamed"),
        jct_packed_s=rounds.known(f"jct_{PACKED}"),
        jct_bf16_s=rounds.known(f"jct_{BF16}"),
        wire_bytes_handover_packed=rounds.known(f"handover_bytes_{PACKED}"),
        wire_bytes_handover_bf16=rounds.known(f"handover_bytes_{BF16}"),
        notes=tuple(sorted(rounds.notes)),
    )


async def _until_ready(log: Path) -> None:
    """Redis writes a log of its own."""
    async with asyncio.timeout(60.0):
        while not log.exists() or "Ready to accept connections" not in log.read_text(errors="replace"):
            await asyncio.sleep(0.05)
