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
from pathlib import Path

import pytest
from support.cluster import Cluster, start_two_of_each
from support.cluster_load import Load
from support.faults import KILL, LIMIT_S, STOP, Injection, assert_nothing_is_left, busy, inject, report, shuffled_plan

DEEP = bool(os.environ.get("KVFERRY_DEEP"))
NUM_PROMPTS = 10
PROMPT_TOKENS = 700
ORDINARY = [("decode", STOP), ("prefill", KILL), ("gateway", STOP), ("store", KILL), ("directory", KILL)]
NUM_RESTART_REQUESTS = 200
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


def plan() -> list[tuple[str, signal.Signals]]:
    if not DEEP:
        return list(ORDINARY)
    return shuffled_plan(DEEP_ROUNDS)


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


@pytest.mark.deep
@pytest.mark.timeout(1800)
async def test_rolling_restart(cluster: Cluster, load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    """Every process in turn gets SIGTERM, drains, ends with 0 and is started again: no request fails."""
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
            if load.num_done >= NUM_RESTART_REQUESTS:
                break
    assert not load.problems, load.problems
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
