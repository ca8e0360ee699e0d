"""Autoscaling between settings and counts, with statistics as workers send them, and how they are asked for."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from pydantic import ValidationError

from kvferry.deploy.cli_config import find_warnings
from kvferry.deploy.cluster.autoscaler import ROLES, Autoscaler, KnownWorker, RoleScaling
from kvferry.deploy.cluster.commands import _print_status
from kvferry.deploy.cluster.status import as_json, scaling_line
from kvferry.deploy.cluster.worker_stats import WorkerStatsPoller
from kvferry.deploy.settings import Settings
from kvferry.proto import worker_pb2, worker_pb2_grpc

PROMPT_TIMEOUT_S = 20.0


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], Settings]:
    def load(text: str) -> Settings:
        path = tmp_path / "kvferry.yaml"
        path.write_text(text)
        return Settings.load(path)

    return load


BOTH = """
prefill: {count: 1}
decode: {count: 3, max_num_seqs: 8}
cluster:
  autoscale:
    prefill: {max: 4, target_queued_tokens: 1000, up_after_s: 2, down_after_s: 20}
    decode: {min: 2, max: 6, target_usage: 0.5, up_after_s: 2, down_after_s: 20}
"""


def told(*, queued_tokens: int = 0, blocks: int = 0, waiting: int = 0) -> worker_pb2.WorkerStats:
    """Of a worker with both roles; each role reads its own part."""
    return worker_pb2.WorkerStats(
        prefill=worker_pb2.PrefillStats(queued_tokens=queued_tokens),
        decode=worker_pb2.DecodeStats(
            pool_blocks=100, pool_blocks_used=blocks, num_requests=2, num_waiting=waiting, num_running=2 - waiting
        ),
    )


class Deployment:
    """The counts of an autoscaler whose workers are all up and say what `load` says."""

    def __init__(self, settings: Settings, **counts: int) -> None:
        self.now = 100.0
        self.autoscaler = Autoscaler(settings, counts, now=self.now)

    def look(self, times: int, stats: worker_pb2.WorkerStats | None, *, silent: tuple[str, ...] = ()) -> dict[str, int]:
        for _ in range(times):
            self.now += 1.0
            counts = self.autoscaler.counts()
            workers = {
                role: [KnownWorker(name=f"{role}-{i}", has_started=True) for i in range(counts[role])]
                for role in self.autoscaler.roles
            }
            names = [worker.name for known in workers.values() for worker in known if worker.name not in silent]
            self.autoscaler.step(self.now, workers, {} if stats is None else dict.fromkeys(names, stats))
        return self.autoscaler.counts()

    def describe(self, role: str, running: int = 1) -> RoleScaling:
        assert role in ("prefill", "decode")
        return self.autoscaler.describe(role, self.now, count=7, running=running)  # type: ignore[arg-type]


def test_each_role_by_its_own_load(load: Callable[[str], Settings]) -> None:
    deployment = Deployment(load(BOTH), prefill=1, decode=3)
    assert deployment.look(4, told(queued_tokens=5000)) == {"prefill": 2, "decode": 3}
    assert deployment.look(20, told(queued_tokens=5000)) == {"prefill": 4, "decode": 2}
    assert deployment.look(10, told(blocks=90)) == {"prefill": 4, "decode": 6}
    assert deployment.look(100, told()) == {"prefill": 1, "decode": 2}


def test_a_silent_worker_keeps_all_of_its_role_and_no_other(load: Callable[[str], Settings]) -> None:
    deployment = Deployment(load(BOTH), prefill=3, decode=4)
    assert deployment.look(200, told(), silent=("decode-1",)) == {"prefill": 1, "decode": 4}
    assert "1 workers do not answer" in deployment.describe("decode").sees
    assert deployment.look(200, None) == {"prefill": 1, "decode": 4}


def test_a_role_that_is_not_named_stays(load: Callable[[str], Settings]) -> None:
    deployment = Deployment(load("cluster: {autoscale: {decode: {max: 2}}}"), prefill=1, decode=1)
    assert deployment.look(30, told(queued_tokens=10**6)) == {"decode": 1}
    assert Deployment(load("model: demo"), prefill=1, decode=1).autoscaler.roles == ()
    scaling = deployment.describe("prefill", running=5)
    assert (scaling.wanted, scaling.running, scaling.is_automatic) == (7, 5, False)
    assert scaling_line(scaling) == "prefill: 5 of 7 wanted workers up; the number is fixed"


def test_a_count_by_hand_is_a_floor_within_the_limits(load: Callable[[str], Settings]) -> None:
    deployment = Deployment(load(BOTH), prefill=1, decode=3)
    deployment.autoscaler.set_floor("decode", 5)
    assert deployment.look(60, told())["decode"] == 5
    deployment.autoscaler.set_floor("decode", 2)
    assert deployment.look(100, told())["decode"] == 2
    for count in (1, 7):
        with pytest.raises(ValueError, match=r"between 2 and 6.*cluster\.autoscale\.decode"):
            deployment.autoscaler.set_floor("decode", count)


def test_status_says_what_is_wanted_and_why(load: Callable[[str], Settings]) -> None:
    deployment = Deployment(load(BOTH), prefill=1, decode=3)
    deployment.look(4, told(queued_tokens=1500))
    deployment.look(2, told())
    assert scaling_line(deployment.describe("prefill", running=1)) == (
        "prefill: 1 of 2 wanted workers up; 1 to 4 by load. Last: up from 1 to 2: 1500 queued tokens, 1000 a worker; "
        "busy as 0.00 workers, 3 s ago. Now: 0 queued tokens, 1000 a worker; busy as 0.00 workers"
    )
    content = as_json("kvferry", [], [deployment.describe("decode")])
    assert content["scaling"][0] | {"sees": "", "decided_s_ago": 0} == {
        "role": "decode",
        "wanted": 3,
        "running": 1,
        "is_automatic": True,
        "min": 2,
        "max": 6,
        "sees": "",
        "decision": "3 at the start",
        "decided_s_ago": 0,
    }


def test_status_prints_what_came_as_json(load: Callable[[str], Settings], capsys: pytest.CaptureFixture[str]) -> None:
    deployment = Deployment(load(BOTH), prefill=1, decode=3)
    content = json.loads(json.dumps(as_json("kvferry", [], [deployment.describe(role) for role in ROLES])))
    _print_status(content)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if "wanted workers" in line] == [
        "prefill: 1 of 1 wanted workers up; 1 to 4 by load. Last: 1 at the start, 0 s ago.",
        "decode: 1 of 3 wanted workers up; 2 to 6 by load. Last: 3 at the start, 0 s ago.",
    ]


@pytest.mark.parametrize(
    "text, said",
    [
        ("cluster: {autoscale: {decode: {min: 3, max: 2}}}", "min is 3 and max 2: raise max or lower min"),
        ("cluster: {autoscale: {decode: {min: 1}}}", "max\n  Field required"),
        ("cluster: {autoscale: {decode: {max: 2, target_usage: 1.5}}}", "less than or equal to 1"),
        ("cluster: {autoscale: {decode: {max: 2, down_after_s: 1}}}", "greater than or equal to 10"),
        ("cluster: {autoscale: {prefill: {max: 2, target: 1}}}", "Extra inputs are not permitted"),
        ("{prefill: {count: 0}, cluster: {autoscale: {prefill: {max: 2}}}}", "set prefill.count to 1 or more"),
    ],
)
def test_wrong_settings_are_named(load: Callable[[str], Settings], text: str, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        load(text)
    assert said in str(caught.value)


def test_ports_of_all_that_may_come_are_looked_at(load: Callable[[str], Settings]) -> None:
    warning = "prefill.port and decode.port: their ranges of ports overlap"
    assert warning not in find_warnings(load("cluster: {autoscale: {prefill: {max: 40}}}"))
    assert warning in find_warnings(load("cluster: {autoscale: {prefill: {max: 41}}}"))


class WorkerServer(worker_pb2_grpc.WorkerServicer):
    """Says what it is told to say; while `stuck`, nothing."""

    def __init__(self) -> None:
        self.stuck = threading.Event()
        self.num_asked = 0

    def Stats(self, request: worker_pb2.StatsRequest, context: grpc.ServicerContext) -> worker_pb2.WorkerStats:
        self.num_asked += 1
        while self.stuck.is_set() and context.is_active():
            time.sleep(0.05)
        return told(queued_tokens=17)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def serve(stack: ExitStack) -> tuple[WorkerServer, str]:
    servicer = WorkerServer()
    server = grpc.server(ThreadPoolExecutor(max_workers=2))
    worker_pb2_grpc.add_WorkerServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    stack.callback(lambda: server.stop(None).wait(5))
    stack.callback(servicer.stuck.clear)
    return servicer, f"127.0.0.1:{port}"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PROMPT_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def test_the_poller_tells_who_answers_and_forgets_who_does_not(stack: ExitStack) -> None:
    (_, good_at), (stuck, stuck_at) = serve(stack), serve(stack)
    stuck.stuck.set()
    poller = WorkerStatsPoller()
    assert poller.latest() == {}
    poller.follow({"prefill-0": good_at, "decode-0": stuck_at, "decode-1": "127.0.0.1:1"})
    poller.start()
    stack.callback(poller.stop)
    wait_for(lambda: bool(poller.latest()))
    wait_for(lambda: stuck.num_asked >= 2)  # asked again although it never answered
    assert list(poller.latest()) == ["prefill-0"]
    assert poller.latest()["prefill-0"].prefill.queued_tokens == 17
    stuck.stuck.clear()
    wait_for(lambda: "decode-0" in poller.latest())
    stuck.stuck.set()
    wait_for(lambda: "decode-0" not in poller.latest())  # what it said is too old
    assert "prefill-0" in poller.latest()
    poller.follow({"prefill-0": stuck_at})
    assert poller.latest() == {}  # another place is another worker
