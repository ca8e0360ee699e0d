"""Processes of a whole deployment that are killed, stopped and restarted while it serves: no token changes, none is
missing or comes twice. Real processes, which find each other through a directory.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.cluster import Cluster, Proc, start_two_of_each
from support.cluster_load import Load

DEEP = bool(os.environ.get("KVFERRY_DEEP"))
LIMIT_S = 60.0
LEASE_S = 4.0
NUM_PROMPTS = 10
PROMPT_TOKENS = 700
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
ORDINARY = [("decode", STOP), ("prefill", KILL), ("gateway", STOP), ("store", KILL), ("directory", KILL)]
DEEP_ROUNDS = 9
"""Of five kinds: 45 injections."""


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path], make_prompt: Callable[..., list[int]]
) -> Iterator[tuple[Cluster, Load]]:
    """A deployment, and what its answers are without faults."""
    prompts = [make_prompt(PROMPT_TOKENS + 37 * i, seed=i) for i in range(NUM_PROMPTS)]
    with Cluster(tmp_path_factory.mktemp("cluster"), tiny_model("llama")) as cluster:
        asyncio.run(start_two_of_each(cluster))
        load = Load(cluster.gateways, prompts)
        asyncio.run(load.learn())
        yield cluster, load


@pytest.fixture
def cluster(shared: tuple[Cluster, Load]) -> Cluster:
    return shared[0]


@pytest.fixture
def load(shared: tuple[Cluster, Load]) -> Load:
    learnt = shared[1]
    return Load(learnt.gateways, learnt.prompts, oracle=learnt.oracle)


@dataclass
class Injection:
    """What a fault did. Seconds: `noticed`, from the signal until it showed in a counter or in the list of members;
    `pause`, the longest wait of a client for its next token since then."""

    kind: str
    number: int
    noticed: float = 0.0
    pause: float = 0.0
    failovers: int = 0

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return (
            f"{self.kind:<10}{name:<9} noticed after {self.noticed:4.1f} s, {self.failovers} requests went elsewhere, "
            f"longest pause {self.pause:4.1f} s"
        )


async def moved(cluster: Cluster, without: Proc) -> dict[str, int]:
    """By gateway that answers: requests that went on elsewhere, with other workers or from another gateway. `without`
    is not asked: it may be stopped, and would only cost time."""
    gateways = [proc for proc in cluster.of_kind("gateway") if proc is not without]
    told = {proc.name: await cluster.gateway_stats(proc) for proc in gateways}
    return {name: stats.num_failovers + stats.num_resumed for name, stats in told.items() if stats is not None}


def more(now: dict[str, int], before: dict[str, int]) -> int:
    return sum(max(count - before.get(name, 0), 0) for name, count in now.items())


async def busy(cluster: Cluster, proc: Proc) -> bool:
    """It has a request now. Directory and store nodes always count as busy."""
    if proc.kind in ("prefill", "decode"):
        calls = await cluster.calls(proc)
        return calls is not None and calls.num_running > 0
    if proc.kind == "gateway":
        stats = await cluster.gateway_stats(proc)
        return stats is not None and stats.num_running > 0
    return True


async def noticed(cluster: Cluster, proc: Proc, before: dict[str, int]) -> bool:
    """The control: the fault shows in a counter, or in the directory's list."""
    if proc.kind == "directory":
        try:
            await cluster.members()
        except OSError:
            return True
        return False
    if more(await moved(cluster, proc), before):
        return True
    return proc.address not in await cluster.members()


async def inject(cluster: Cluster, proc: Proc, number: int, load: Load) -> Injection:
    """Kills or stops `proc` while it is busy, sees that the rest goes on, and brings it back."""
    injection = Injection(proc.kind, number)
    await cluster.until(lambda: busy(cluster, proc), f"{proc.name} gets no request")
    before, lost_before = await moved(cluster, proc), await leases_lost(cluster, proc)
    proc.signal(number)
    began = time.monotonic()
    await cluster.until(lambda: noticed(cluster, proc, before), f"nobody noticed that {proc.name} is gone")
    injection.noticed = time.monotonic() - began
    done = load.num_done
    async with asyncio.timeout(LIMIT_S):
        await load.until_done(done + load.num_clients)  # the others go on without it
    injection.pause = load.longest_gap_after(began)
    injection.failovers = more(await moved(cluster, proc), before)
    if number == KILL:
        assert await cluster.ended(proc) == -KILL
        cluster.start(proc)
    else:
        if proc.kind != "directory":
            await cluster.until_left(proc)
        proc.signal(signal.SIGCONT)
    # A new directory judges a lease only once its holder has told it of it: so everybody has to be back.
    await cluster.until_joined(*(cluster.procs.values() if proc.kind == "directory" else [proc]))
    if number == STOP and proc.kind in ("prefill", "decode", "gateway"):
        assert await leases_lost(cluster, proc) == lost_before + 1  # it knows that it was away
    if number == STOP and proc.kind in ("prefill", "decode"):
        calls = await cluster.calls(proc)
        assert calls is not None
        assert calls.epoch > 0
    return injection


async def leases_lost(cluster: Cluster, proc: Proc) -> int:
    if proc.kind in ("prefill", "decode"):
        calls = await cluster.calls(proc)
        return 0 if calls is None else calls.num_leases_lost
    stats = await cluster.gateway_stats(proc) if proc.kind == "gateway" else None
    return 0 if stats is None else stats.num_leases_lost


async def assert_nothing_is_left(cluster: Cluster) -> None:
    """After the load every worker and gateway is idle."""

    async def idle() -> bool:
        return not any([await busy(cluster, proc) for proc in cluster.of_kind("prefill", "decode", "gateway")])

    await cluster.until(idle, "something still runs")


def plan() -> list[tuple[str, signal.Signals]]:
    if not DEEP:
        return list(ORDINARY)
    kinds = ["decode", "prefill", "gateway", "store", "directory"]
    faults = [(kind, KILL if i % 2 else STOP) for i in range(DEEP_ROUNDS) for kind in kinds]
    random.Random(0).shuffle(faults)
    return faults


@pytest.mark.timeout(3600 if DEEP else 300)
async def test_killed_and_stopped_processes(cluster: Cluster, load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    """One process after the other, of every kind, while requests run."""
    injections: list[Injection] = []
    chosen = random.Random(1)
    async with load:
        for kind, number in plan():
            proc = chosen.choice(cluster.of_kind(kind))
            injections.append(await inject(cluster, proc, number, load))
            if DEEP:
                with capsys.disabled():
                    print(f"\n{injections[-1]}", end="", flush=True)
    assert not load.problems, load.problems
    assert load.num_done >= (100 if DEEP else 5)
    assert any(injection.failovers for injection in injections)
    if DEEP:
        with capsys.disabled():
            report(injections, load)
        for kind in ("decode", "gateway"):
            assert any(i.failovers for i in injections if i.kind == kind), kind
    await assert_nothing_is_left(cluster)


def report(injections: list[Injection], load: Load) -> None:
    print(f"\n{len(injections)} injections, {load.num_done} requests, {len(load.problems)} failed")
    for kind in dict.fromkeys(injection.kind for injection in injections):
        for number in (KILL, STOP):
            some = [i for i in injections if (i.kind, i.number) == (kind, number)]
            if some:
                noticed_s, pause_s = sorted(i.noticed for i in some), sorted(i.pause for i in some)
                print(
                    f"  {len(some)} x {kind:<10}{number.name:<9} noticed after {noticed_s[len(some) // 2]:.1f} s "
                    f"(at most {noticed_s[-1]:.1f}), pause {pause_s[len(some) // 2]:.1f} s (at most {pause_s[-1]:.1f})"
                )
    gaps = sorted(length for _, length in load.gaps)
    if gaps:
        median, longest = gaps[len(gaps) // 2], gaps[-1]
        print(f"  pauses over 0.5 s in answers: {len(gaps)}, median {median:.1f} s, longest {longest:.1f} s")


@pytest.mark.timeout(1800 if DEEP else 300)
async def test_rolling_restart(cluster: Cluster, load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    """Every process in turn gets SIGTERM, drains, ends with 0 and is started again: no request fails."""
    wanted = 200 if DEEP else 20
    async with load:
        while True:
            for proc in list(cluster.procs.values()):
                done = load.num_done
                proc.signal(signal.SIGTERM)
                assert await cluster.ended(proc) == 0, proc.log.read_text()[-2000:]
                cluster.start(proc)
                await cluster.until_joined(proc)
                async with asyncio.timeout(LIMIT_S):
                    await load.until_done(done + 1)
            if load.num_done >= wanted:
                break
    assert not load.problems, load.problems
    if DEEP:
        with capsys.disabled():
            print(f"\nrolling restarts: {load.num_done} requests, {len(load.problems)} failed")
    await assert_nothing_is_left(cluster)


async def test_a_worker_that_is_added_takes_load_and_drains_when_removed(
    cluster: Cluster, load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    async with load:
        began = time.monotonic()
        added = [cluster.add("decode-2", "decode"), cluster.add("prefill-2", "prefill")]
        await cluster.until_joined(*added)
        for proc in added:
            await cluster.until(lambda proc=proc: busy(cluster, proc), f"{proc.name} gets no request")  # type: ignore[misc]
        took = time.monotonic() - began
        for proc in added:
            proc.signal(signal.SIGTERM)
            assert await cluster.ended(proc) == 0
            assert "were ended" not in proc.log.read_text()
            del cluster.procs[proc.name]
        await load.until_done(load.num_done + load.num_clients)
    assert not load.problems, load.problems
    if DEEP:
        with capsys.disabled():
            print(f"\nadded workers had requests {took:.1f} s after their start")
    await assert_nothing_is_left(cluster)
