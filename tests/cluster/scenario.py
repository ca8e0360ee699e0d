"""Steps of a cluster test: commands of an operator on the lab's client, and what must come of them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab import Finished, Lab

UP_TIMEOUT_S = 900.0
RECOVER_TIMEOUT_S = 240.0


class StepFailed(Exception):
    """What the product did is not what it should do."""


class Scenario:
    """What an operator does from the lab's client, step by step, with its times."""

    def __init__(self, lab: Lab, log: Path) -> None:
        self.lab = lab
        self._log = log.open("a")
        self.times: list[tuple[str, float]] = []

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        print(f"... {title}", flush=True)
        started = time.monotonic()
        yield
        self.times.append((title, time.monotonic() - started))
        print(f"    {self.times[-1][1]:6.1f} s", flush=True)

    def kvferry(self, arguments: str, *, timeout_s: float, may_fail: bool = False) -> Finished:
        """A command of the operator, on the client's host."""
        done = self.lab.run(self.lab.client, f"kvferry {arguments}", timeout_s=timeout_s, log=self._log)
        if done.returncode and not may_fail:
            raise StepFailed(f"kvferry {arguments}: {done.output[-1500:]}{done.errors[-1500:]}")
        return done

    def status(self) -> dict[str, Any]:
        done = self.kvferry("status cluster.yaml --json", timeout_s=90, may_fail=True)
        if not done.output.startswith("{"):
            raise StepFailed(f"no status: {done.output}{done.errors}")
        status: dict[str, Any] = json.loads(done.output)
        return status

    def process(self, name: str) -> dict[str, Any]:
        return next(p for p in self.status()["processes"] if p["name"] == name)

    def until(self, what: str, condition: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise StepFailed(f"not within {timeout_s:g} s: {what}")
            time.sleep(2)

    def check_nothing_is_left(self) -> None:
        left = {host.name: processes for host in self.lab.hosts.values() if (processes := host.processes())}
        check(not left, f"processes were left behind: {left}")
        print("    no process is left on any host")

    def is_well(self) -> bool:
        try:
            return bool(self.status()["well"])
        except StepFailed:  # no controller, at the moment
            return False

    def controllers(self) -> list[tuple[str, int]]:
        """Host and, on this machine, pid of each; there should be one."""
        return [
            (host.name, pid)
            for host in self.lab.hosts.values()
            for pid, line in host.processes().items()
            if line.startswith("ray::Controller")
        ]

    def kill_controller(self) -> None:
        [(_, pid)] = self.controllers()
        os.kill(pid, signal.SIGKILL)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise StepFailed(message)
