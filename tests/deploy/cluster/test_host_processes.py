"""Ending what one Ray cluster left on a machine, and nothing of another: processes that look like Ray's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from kvferry.deploy.cluster.host_processes import end_ray_processes, list_processes

# Starts a child without any of the arguments, as a raylet starts its workers; both live until they are ended.
PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
print("ready", flush=True)
time.sleep(120)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(120)
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def begin(code: str, *arguments: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(child)
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        return child

    yield begin
    for child in started:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def children(pid: int) -> list[int]:
    return [process.pid for process in list_processes() if process.parent == pid]


def test_ends_the_cluster_with_all_that_it_started_and_no_other(start: Callable[..., subprocess.Popen[str]]) -> None:
    mine = start(PARENT, "--gcs-address=127.9.9.1:6379")
    agent = start(STUBBORN, "--gcs_address=127.9.9.1:6379", "--node-ip-address=127.9.9.2")
    other = start(PARENT, "--gcs-address=127.9.9.1:6380")
    unrelated = start(PARENT, "--address=127.9.9.1:6379")  # not Ray's
    (worker,) = children(mine.pid)
    ended = end_ray_processes("127.9.9.1:6379", grace_s=1.0)
    assert set(ended) == {mine.pid, worker, agent.pid}
    assert mine.wait(5) == -signal.SIGTERM
    assert agent.wait(5) == -signal.SIGKILL
    time.sleep(0.1)
    assert worker not in {process.pid for process in list_processes()}
    assert other.poll() is None and unrelated.poll() is None
    assert end_ray_processes("127.9.9.1:6379") == []


def test_the_port_alone_means_a_head_of_this_machine(start: Callable[..., subprocess.Popen[str]]) -> None:
    head = start(STUBBORN, "--gcs-address=127.9.9.3:6391", "--node-ip-address=127.9.9.3")
    its_monitor = start(STUBBORN, "--gcs-address=127.9.9.3:6391")
    worker_of_another = start(STUBBORN, "--gcs-address=127.9.9.4:6391", "--node-ip-address=127.9.9.3")
    assert set(end_ray_processes(":6391", grace_s=0.2)) == {head.pid, its_monitor.pid}
    assert worker_of_another.poll() is None


def test_a_name_of_the_head_is_resolved(start: Callable[..., subprocess.Popen[str]]) -> None:
    worker = start(PARENT, "--gcs-address=127.0.0.1:6392")
    assert worker.pid in end_ray_processes("localhost:6392", grace_s=1.0)
