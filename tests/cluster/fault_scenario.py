"""Kills, stops, a rolling restart and the loss of a machine while clients ask a cluster: no token changes, none fails.

The injections are those of tests/faults/test_cluster_faults.py, with a tiny model as there: the machines share this
one's cores, and most of the time would go into computing. Here the processes are Ray's actors on several machines, Ray
starts them again, and the clients are on a machine of their own.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time

from hosts import HostDeployment, HostProc
from lab import Host
from scenario import UP_TIMEOUT_S, Scenario, StepFailed, check
from support.cluster_load import Load
from support.deployment import WORKERS
from support.faults import assert_nothing_is_left, inject, report, shuffled_plan
from tiny_settings import PROMPTS

NUM_ROUNDS = 9
"""Of five kinds: 45 injections."""
MIN_REQUESTS = 100
ROLLING_REQUESTS = 200
ROLLING_TIMEOUT_S = 1500.0
CONTROLLER_STOPPED_S = 10.0
MOVE_TIMEOUT_S = 240.0


class FaultScenario(Scenario):
    def run(self) -> None:
        """From `kvferry up` to `kvferry down`. Call it in the client's network."""
        lab = self.lab
        with self.step("kvferry up: two prefill and two decode workers, two gateways, three store nodes; a tiny model"):
            self.kvferry("up cluster.yaml --config kvferry.yaml", timeout_s=UP_TIMEOUT_S)
        deployment = HostDeployment(lab, self.status())
        load = Load(deployment.gateways, PROMPTS, access=deployment.access)
        with self.step("what the answers are without faults"):
            asyncio.run(load.learn())

        def fresh() -> Load:
            return Load(deployment.gateways, PROMPTS, oracle=load.oracle, access=deployment.access)

        asyncio.run(self._injections(deployment, fresh()))
        asyncio.run(self._controller(deployment, fresh()))
        asyncio.run(self._rolling_restart(deployment, fresh()))
        asyncio.run(self._machine_lost(deployment, fresh()))
        with self.step("kvferry down, one machine unreachable"):
            self.kvferry("down cluster.yaml", timeout_s=240, may_fail=True)
        self.check_nothing_is_left()

    async def _injections(self, deployment: HostDeployment, load: Load) -> None:
        injections = []
        chosen = random.Random(1)
        with self.step("processes of every kind, killed and stopped one after the other"):
            async with load:
                for kind, number in shuffled_plan(NUM_ROUNDS):
                    injections.append(await inject(deployment, chosen.choice(deployment.of_kind(kind)), number, load))
                    load_average = os.getloadavg()[0]
                    print(
                        f"    {injections[-1]}; {load.num_done} requests, load average {load_average:.0f}", flush=True
                    )
                await load.until_done(max(MIN_REQUESTS, load.num_done))
        report(injections, load)
        check(not load.problems, f"requests failed: {load.problems}")
        for kind in ("decode", "gateway"):
            moved = any(i.failovers for i in injections if i.kind == kind)
            check(moved, f"no request had to leave a {kind}: the injections hit nothing")
        await assert_nothing_is_left(deployment)

    async def _controller(self, deployment: HostDeployment, load: Load) -> None:
        pids = {name: proc.pid for name, proc in deployment.procs.items()}
        with self.step("the controller killed, and its successor stopped for a while"):
            async with load:
                began = time.monotonic()
                self.kill_controller()
                await asyncio.to_thread(self.until, "the controller is back", self.is_well, MOVE_TIMEOUT_S)
                print(f"    back after {time.monotonic() - began:.1f} s")
                [(_, pid)] = self.controllers()
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(CONTROLLER_STOPPED_S)
                os.kill(pid, signal.SIGCONT)
                await asyncio.to_thread(self.until, "the controller answers again", self.is_well, MOVE_TIMEOUT_S)
                await load.until_done(load.num_done + load.num_clients)
        check(not load.problems, f"requests failed: {load.problems}")
        found = {name: proc.host.listener(proc.port) for name, proc in deployment.procs.items()}
        check(found == pids, f"processes were started anew: {pids} -> {found}")
        print(f"    {load.num_done} requests, {len(load.problems)} failed, no other process was started anew")

    async def _rolling_restart(self, deployment: HostDeployment, load: Load) -> None:
        pids = {name: proc.pid for name, proc in deployment.procs.items()}
        with self.step("kvferry restart: every process, one after the other"):
            async with load:
                done = await asyncio.to_thread(self.kvferry, "restart cluster.yaml", timeout_s=ROLLING_TIMEOUT_S)
                num_meanwhile = load.num_done
                await load.until_done(max(ROLLING_REQUESTS, load.num_done + load.num_clients))
        print("".join(f"    {line}\n" for line in done.output.splitlines()), end="")
        print(f"    {load.num_done} requests ({num_meanwhile} meanwhile), {len(load.problems)} failed")
        check(not load.problems, f"requests failed: {load.problems}")
        kept = [name for name, proc in deployment.procs.items() if not deployment.find_anew(proc)]
        check(not kept, f"not restarted: {kept} of {pids}")
        await assert_nothing_is_left(deployment)

    async def _machine_lost(self, deployment: HostDeployment, load: Load) -> None:
        """The last step: nothing switches the machine on again."""
        lost, gone = self._machine_to_lose(deployment)
        moving = [proc for proc in gone if proc.kind in WORKERS]
        with self.step(f"{lost.name} is switched off, with {', '.join(proc.name for proc in gone)}"):
            async with load:
                await load.until_done(load.num_clients)
                self.lab.switch_off(lost)
                deployment.leave_out(lost)
                began = time.monotonic()
                await load.until_done(load.num_done + 2 * load.num_clients)
                pause = load.longest_gap_after(began)
                for proc in gone:
                    if proc not in moving:
                        del deployment.procs[proc.name]
                for proc in moving:
                    await deployment.bring_back(proc)
                await deployment.until_joined(*moving)
                print(f"    longest pause {pause:.1f} s; workers elsewhere after {time.monotonic() - began:.1f} s")
                await load.until_done(load.num_done + load.num_clients)
        print(f"    {load.num_done} requests, {len(load.problems)} failed")
        check(not load.problems, f"requests failed: {load.problems}")

    @staticmethod
    def _machine_to_lose(deployment: HostDeployment) -> tuple[Host, list[HostProc]]:
        """Not the head; one with a worker, and what runs there. The other gateway must stay."""
        head = deployment.directory.host
        hosts = {proc.host.name: proc.host for proc in deployment.of_kind(*WORKERS) if proc.host is not head}
        if not hosts:
            raise StepFailed("all workers are on the head")
        host = hosts[sorted(hosts)[0]]
        return host, [proc for proc in deployment.procs.values() if proc.host is host]
