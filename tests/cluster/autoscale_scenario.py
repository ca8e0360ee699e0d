"""Scaling by load on a cluster: clients that ask more than a decode worker takes bring another, which leaves again."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from hosts import HostDeployment
from scenario import RECOVER_TIMEOUT_S, UP_TIMEOUT_S, Scenario, check
from support.cluster_load import Load
from support.faults import assert_nothing_is_left, busy
from tiny_settings import PROMPTS

MANY, FEW = 8, 1
"""Clients that ask at the same time: more than `max_num_seqs` of one worker, and so few that one is enough."""
SECTIONS: dict[str, dict[str, Any]] = {
    "decode": {"count": 1, "max_num_seqs": 2},
    "prefill": {"count": 1},
    "gateway": {"count": 1},
    "cluster": {"autoscale": {"decode": {"min": 1, "max": 2, "up_after_s": 2, "down_after_s": 10}}},
}


class AutoscaleScenario(Scenario):
    def run(self) -> None:
        """From `kvferry up` to `kvferry down`. Call it in the client's network."""
        with self.step("kvferry up: one prefill and one decode worker; decode is scaled by load, 1 to 2"):
            self.kvferry("up cluster.yaml --config kvferry.yaml", timeout_s=UP_TIMEOUT_S)
        deployment = HostDeployment(self.lab, self.status())
        learnt = Load(deployment.gateways, PROMPTS, access=deployment.access)
        with self.step("what the answers are"):
            asyncio.run(learnt.learn())

        def load(num_clients: int) -> Load:
            return Load(
                deployment.gateways, PROMPTS, num_clients=num_clients, oracle=learnt.oracle, access=deployment.access
            )

        with self.step(f"{MANY} clients: a second decode worker comes and takes requests"):
            asyncio.run(self._up(load(MANY)))
        with self.step(f"{FEW} client: it leaves"):
            asyncio.run(self._down(deployment, load(FEW)))
        with self.step("kvferry down"):
            self.kvferry("down cluster.yaml", timeout_s=240)
        self.check_nothing_is_left()

    async def _up(self, load: Load) -> None:
        began = time.monotonic()
        async with load:
            await self._until_running(2)
            deployment = HostDeployment(self.lab, await asyncio.to_thread(self.status))
            added = deployment.procs["decode-1"]
            await deployment.until(lambda: busy(deployment, added), "decode-1 gets no request")
            print(f"    decode-1 has requests {time.monotonic() - began:.1f} s after the load began")
            await load.until_done(load.num_done + load.num_clients)
        self._check(load)

    async def _down(self, deployment: HostDeployment, load: Load) -> None:
        async with load:
            await self._until_running(1)
            await load.until_done(load.num_done + 2 * load.num_clients)
        self._check(load)
        names = {told["name"] for told in (await asyncio.to_thread(self.status))["processes"]}
        check(names == set(deployment.procs), f"not the processes of the start: {names}")
        await assert_nothing_is_left(deployment)

    async def _until_running(self, count: int) -> None:
        def is_so() -> bool:
            [decode] = [role for role in self.status()["scaling"] if role["role"] == "decode"]
            return bool(decode["running"] == decode["wanted"] == count)

        await asyncio.to_thread(self.until, f"{count} decode workers run", is_so, RECOVER_TIMEOUT_S)
        [decode] = [role for role in (await asyncio.to_thread(self.status))["scaling"] if role["role"] == "decode"]
        print(f"    {decode['decision']}, {decode['decided_s_ago']:.0f} s ago")

    @staticmethod
    def _check(load: Load) -> None:
        print(f"    {load.num_done} requests, {len(load.problems)} failed")
        check(not load.problems, f"requests failed: {load.problems}")
