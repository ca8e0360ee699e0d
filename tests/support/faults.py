"""Kills and stops of a deployment's processes while requests run: what each did, and how soon it was noticed."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from dataclasses import dataclass

from support.cluster_load import Load
from support.deployment import WORKERS, Deployment, Proc

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
KINDS = ("decode", "prefill", "gateway", "store", "directory")
LIMIT_S = 60.0
"""For the other clients to get an answer each while a process is away."""


@dataclass
class Injection:
    """What a fault did. Seconds: `noticed`, from the signal until it showed somewhere (`by`); `pause`, the longest wait
    of a client for its next token since then; `back`, until it takes part again, after SIGKILL from the signal and
    after SIGSTOP from SIGCONT on."""

    kind: str
    number: int
    noticed: float = 0.0
    by: str = ""
    pause: float = 0.0
    back: float = 0.0
    failovers: int = 0

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return (
            f"{self.kind:<10}{name:<9} noticed after {self.noticed:4.1f} s ({self.by}), {self.failovers} requests went "
            f"elsewhere, longest pause {self.pause:4.1f} s, back after {self.back:.1f} s"
        )


def shuffled_plan(num_rounds: int) -> list[tuple[str, signal.Signals]]:
    """Every kind in every round, killed and stopped in turn, in a random order (the same each time)."""
    faults = [(kind, KILL if i % 2 else STOP) for i in range(num_rounds) for kind in KINDS]
    random.Random(0).shuffle(faults)
    return faults


async def moved(deployment: Deployment, without: Proc) -> dict[str, int]:
    """By gateway that answers: requests that went on elsewhere, with other workers or from another gateway. `without`
    is not asked: it may be stopped, and would only cost time."""
    gateways = [proc for proc in deployment.of_kind("gateway") if proc is not without]
    told = await asyncio.gather(*(deployment.gateway_stats(proc) for proc in gateways))
    return {
        proc.name: stats.num_failovers + stats.num_resumed
        for proc, stats in zip(gateways, told, strict=True)
        if stats is not None
    }


def more(now: dict[str, int], before: dict[str, int]) -> int:
    return sum(max(count - before.get(name, 0), 0) for name, count in now.items())


async def busy(deployment: Deployment, proc: Proc) -> bool:
    """It has a request now. Directory and store nodes always count as busy."""
    if proc.kind in WORKERS:
        calls = await deployment.calls(proc)
        return calls is not None and calls.num_running > 0
    if proc.kind == "gateway":
        stats = await deployment.gateway_stats(proc)
        return stats is not None and stats.num_running > 0
    return True


async def noticed_by(deployment: Deployment, proc: Proc, before: dict[str, int]) -> str:
    """Where the fault shows; empty: nowhere yet."""
    if proc.kind == "directory":
        try:
            await deployment.members(1.0)  # members give an announcement as long
        except OSError:
            return "no answer"
        return ""
    if more(await moved(deployment, proc), before):
        return "requests moved"
    if proc.kind in WORKERS:
        others = await asyncio.gather(*(deployment.gateway_stats(gateway) for gateway in deployment.of_kind("gateway")))
        if any(stats is not None and proc.address not in stats.workers for stats in others):
            return "a gateway"
    if proc.kind == "store":
        given_up = await asyncio.gather(*(deployment.given_up_stores(p) for p in deployment.of_kind(*WORKERS)))
        if proc.address in set().union(*given_up):
            return "a worker"
    return "" if await deployment.is_member(proc) else "the directory"


async def inject(deployment: Deployment, proc: Proc, number: int, load: Load) -> Injection:
    """Kills or stops `proc` while it is busy, sees that the rest goes on, and brings it back."""
    injection = Injection(proc.kind, number)
    await deployment.until(lambda: busy(deployment, proc), f"{proc.name} gets no request")
    before, lost_before = await moved(deployment, proc), await leases_lost(deployment, proc)
    address = proc.address
    proc.signal(number)
    began = time.monotonic()

    async def noticed() -> str:
        injection.by = await noticed_by(deployment, proc, before)
        return injection.by

    await deployment.until(noticed, f"nobody noticed that {proc.name} is gone")
    injection.noticed = time.monotonic() - began
    done = load.num_done
    async with asyncio.timeout(LIMIT_S):
        await load.until_done(done + load.num_clients)  # the others go on without it
    injection.pause = load.longest_gap_after(began)
    injection.failovers = more(await moved(deployment, proc), before)
    if number == KILL:
        await deployment.bring_back(proc)
    else:
        assert proc.address == address
        if proc.kind != "directory":
            await deployment.until_left(proc)
        began = time.monotonic()
        proc.signal(signal.SIGCONT)
    # A new directory judges a lease only once its holder has told it of it: so everybody has to be back.
    await deployment.until_joined(*(deployment.procs.values() if proc.kind == "directory" else [proc]))
    injection.back = time.monotonic() - began
    if number == STOP and proc.kind in (*WORKERS, "gateway"):
        assert await leases_lost(deployment, proc) == lost_before + 1  # it knows that it was away
    if number == STOP and proc.kind in WORKERS:
        calls = await deployment.calls(proc)
        assert calls is not None
        assert calls.epoch > 0
    return injection


async def leases_lost(deployment: Deployment, proc: Proc) -> int:
    if proc.kind in WORKERS:
        calls = await deployment.calls(proc)
        return 0 if calls is None else calls.num_leases_lost
    stats = await deployment.gateway_stats(proc) if proc.kind == "gateway" else None
    return 0 if stats is None else stats.num_leases_lost


async def assert_nothing_is_left(deployment: Deployment) -> None:
    """After the load every worker and gateway is idle."""

    async def idle() -> bool:
        return not any([await busy(deployment, proc) for proc in deployment.of_kind(*WORKERS, "gateway")])

    await deployment.until(idle, "something still runs")


def report(injections: list[Injection], load: Load) -> None:
    print(f"\n{len(injections)} injections, {load.num_done} requests, {len(load.problems)} failed")
    for kind in dict.fromkeys(injection.kind for injection in injections):
        for number in (KILL, STOP):
            some = [i for i in injections if (i.kind, i.number) == (kind, number)]
            if some:
                columns = [
                    f"{what} {middle:.1f} s (at most {most:.1f})"
                    for what, values in (
                        ("noticed after", sorted(i.noticed for i in some)),
                        ("pause", sorted(i.pause for i in some)),
                        ("back after", sorted(i.back for i in some)),
                    )
                    for middle, most in [(values[len(some) // 2], values[-1])]
                ]
                print(f"  {len(some)} x {kind:<10}{number.name:<9}{', '.join(columns)}")
    gaps = sorted(length for _, length in load.gaps)
    if gaps:
        median, longest = gaps[len(gaps) // 2], gaps[-1]
        print(f"  pauses over 0.5 s in answers: {len(gaps)}, median {median:.1f} s, longest {longest:.1f} s")
