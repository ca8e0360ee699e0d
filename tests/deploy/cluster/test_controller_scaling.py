"""The controller adds and drains workers by their load: real threads and gRPC, and a stand-in for Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import ray

from kvferry.deploy.cluster import controller as module
from kvferry.deploy.cluster.controller import LEAVE_DRAIN_S, Controller
from kvferry.deploy.cluster.members import Started
from kvferry.deploy.cluster.settings import (
    AutoscaleSettings,
    ClusterSettings,
    DecodeAutoscaleSettings,
    PrefillAutoscaleSettings,
)
from kvferry.deploy.settings import Settings
from kvferry.proto import worker_pb2, worker_pb2_grpc

TIMEOUT_S = 30.0
HEAD = "ab" * 28


class Call:
    """What a remote call returns: a result that comes when `done` is set."""

    def __init__(self, result: Any, done: threading.Event) -> None:
        self.result, self.done = result, done


class Actor:
    """One that is up at once, and takes until `may_leave` to stop."""

    def __init__(self, name: str, started: Started) -> None:
        self.name = name
        self.may_leave = threading.Event()
        self.drains: list[float] = []
        self.num_asked = 0
        self._started = started
        self._now = threading.Event()
        self._now.set()
        self.ensure = SimpleNamespace(remote=self._ensure)
        self.stop = SimpleNamespace(remote=self._stop)

    def _ensure(self, directory: str) -> Call:
        self.num_asked += 1
        return Call(self._started, self._now)

    def _stop(self, drain_s: float) -> Call:
        self.drains.append(drain_s)
        return Call(None, self.may_leave)


class StandInRay:
    """One machine with room for all, and actors by name."""

    exceptions = ray.exceptions

    def __init__(self, address: str) -> None:
        self._started = Started(address=address, pid=1, machine=HEAD, version="0")
        self.actors: dict[str, Actor] = {}
        self.killed: list[str] = []
        self.restarted: list[str] = []
        self.util = SimpleNamespace(list_named_actors=self._list_named_actors)

    def workers(self, role: str) -> list[str]:
        return sorted(name for name in self.actors if name.startswith(f"{role}-"))

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: HEAD)

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": HEAD, "NodeManagerAddress": "h", "Resources": {"CPU": 64.0}, "Alive": True}]

    def get_actor(self, name: str, namespace: str) -> Actor:
        if name not in self.actors:
            raise ValueError(name)
        return self.actors[name]

    def remote(self, kind: type) -> Any:
        def options(*, name: str, **_: Any) -> Any:
            return SimpleNamespace(remote=lambda *_: self.actors.setdefault(name, Actor(name, self._started)))

        return SimpleNamespace(options=options)

    def get(self, call: Call, timeout: float) -> Any:
        assert call.done.wait(timeout)
        return call.result

    def wait(self, calls: list[Call], *, timeout: float, num_returns: int = 1) -> tuple[list[Call], list[Call]]:
        deadline = time.monotonic() + timeout
        done = [call for call in calls if call.done.wait(max(0.0, deadline - time.monotonic()))]
        return done, [call for call in calls if call not in done]

    def kill(self, actor: Actor, no_restart: bool) -> None:
        if not no_restart:
            self.restarted.append(actor.name)
            return
        del self.actors[actor.name]
        self.killed.append(actor.name)

    def _list_named_actors(self, all_namespaces: bool) -> list[dict[str, str]]:
        return [{"name": name, "namespace": "kvferry"} for name in self.actors]


class Workers(worker_pb2_grpc.WorkerServicer):
    """All workers in one: each says `queued_tokens`, and that nothing is decoded."""

    queued_tokens = 0

    def Stats(self, request: worker_pb2.StatsRequest, context: grpc.ServicerContext) -> worker_pb2.WorkerStats:
        return worker_pb2.WorkerStats(
            prefill=worker_pb2.PrefillStats(queued_tokens=self.queued_tokens),
            decode=worker_pb2.DecodeStats(pool_blocks=10),
        )


@pytest.fixture
def workers() -> Iterator[tuple[Workers, str]]:
    servicer = Workers()
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    worker_pb2_grpc.add_WorkerServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None).wait(5)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def settings_that_hurry() -> Settings:
    """Without the delays that validation asks for."""
    prefill = PrefillAutoscaleSettings(max=3, target_queued_tokens=1000, up_after_s=0)
    decode = DecodeAutoscaleSettings(max=3, up_after_s=0)
    hurried = AutoscaleSettings(prefill=prefill.model_copy(update={"down_after_s": 0.0}), decode=decode)
    return Settings(cluster=ClusterSettings(autoscale=hurried))


@pytest.fixture
def stand_in(workers: tuple[Workers, str], monkeypatch: pytest.MonkeyPatch) -> StandInRay:
    stand_in = StandInRay(workers[1])
    monkeypatch.setattr(module, "ray", stand_in)
    monkeypatch.setattr(module, "configure_logs", lambda *_, **__: None)
    return stand_in


def test_a_process_that_restarts_is_left_alone_until_it_has_ended(stand_in: StandInRay) -> None:
    controller = Controller(Settings())
    try:
        wait_for(lambda: any(state.name == "decode-0" and state.state == "up" for state in controller.members()))
        actor = stand_in.actors["decode-0"]
        controller.restart("decode-0", 7.0)
        wait_for(lambda: actor.drains == [7.0])
        with pytest.raises(ValueError, match="decode-0 is not up"):
            controller.restart("decode-0", 7.0)
        with pytest.raises(ValueError, match="decode-7 is not up"):
            controller.restart("decode-7", 7.0)
        num_asked, others = actor.num_asked, stand_in.actors["gateway-0"].num_asked
        wait_for(lambda: stand_in.actors["gateway-0"].num_asked >= others + 3)
        assert actor.num_asked <= num_asked + 1  # one may have been on its way; asked now, it would start anew
        actor.may_leave.set()
        wait_for(lambda: stand_in.restarted == ["decode-0"])
        wait_for(lambda: actor.num_asked > num_asked + 1)
        assert stand_in.killed == []
    finally:
        for actor in list(stand_in.actors.values()):
            actor.may_leave.set()
        controller.stop()


def test_a_controller_that_comes_with_the_loss_of_a_machine_replaces_what_ran_there(stand_in: StandInRay) -> None:
    """A new deployment waits for its machines; one that runs has had them."""
    settings = Settings(cluster=ClusterSettings(machines=2))
    first = Controller(settings)
    wait_for(lambda: any("1 of 2 machines" in state.problem for state in first.members()))
    first.stop()
    assert stand_in.actors == {}
    stand_in.remote(object).options(name="gateway-0").remote()
    second = Controller(settings)
    try:
        wait_for(lambda: {state.state for state in second.members()} == {"up"})
        assert stand_in.workers("decode") == ["decode-0"]
    finally:
        for actor in list(stand_in.actors.values()):
            actor.may_leave.set()
        second.stop()


def test_workers_come_and_leave_by_load(workers: tuple[Workers, str], stand_in: StandInRay) -> None:
    load, _ = workers
    controller = Controller(settings_that_hurry())
    try:
        wait_for(lambda: stand_in.workers("prefill") == ["prefill-0"] and stand_in.workers("decode") == ["decode-0"])
        load.queued_tokens = 2000
        wait_for(lambda: stand_in.workers("prefill") == ["prefill-0", "prefill-1", "prefill-2"])
        wait_for(lambda: [role.running for role in controller.scaling()] == [3, 1])
        assert controller.scaling()[0].decision.startswith("up from 2 to 3: ")

        # Spare, and no more than one: it drains, and is not ended before it is done.
        controller.scale("prefill", 2)
        last = stand_in.actors["prefill-2"]
        load.queued_tokens = 0
        wait_for(lambda: bool(last.drains))
        assert last.drains == [LEAVE_DRAIN_S]
        load.queued_tokens = 2000
        wait_for(lambda: controller.scaling()[0].wanted == 3)
        wait_for(lambda: controller.scaling()[0].running == 2)
        assert stand_in.actors["prefill-2"] is last
        assert stand_in.killed == []

        # It has left: its name is free for a new one.
        last.may_leave.set()
        wait_for(lambda: stand_in.actors.get("prefill-2") not in (None, last))
        wait_for(lambda: controller.scaling()[0].running == 3)
        assert stand_in.killed == ["prefill-2"]

        # By hand: a floor of a role whose load asks for one.
        controller.scale("decode", 2)
        wait_for(lambda: stand_in.workers("decode") == ["decode-0", "decode-1"])
        with pytest.raises(ValueError, match="between 1 and 3"):
            controller.scale("decode", 4)
        wait_for(lambda: controller.scaling()[1].running == 2)
    finally:
        for actor in list(stand_in.actors.values()):
            actor.may_leave.set()
        controller.stop()
    assert stand_in.actors == {}
