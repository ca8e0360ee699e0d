"""A rolling restart against processes that are only as much as it looks at: health, a place in a real directory, and
gateways that say which workers they use."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from kvferry.deploy.cluster.controller import MemberState
from kvferry.deploy.cluster.members import Started
from kvferry.deploy.cluster.rolling import choose, rolling_restart, without_stand_in
from kvferry.deploy.directory_client import Registration
from kvferry.deploy.directory_server import DirectoryConfig, DirectoryServer
from kvferry.proto import gateway_pb2, gateway_pb2_grpc, kvstore_pb2, kvstore_pb2_grpc, worker_pb2, worker_pb2_grpc

WAIT_S = 60.0


class Everything(worker_pb2_grpc.WorkerServicer, kvstore_pb2_grpc.KVStoreServicer, gateway_pb2_grpc.GatewayServicer):
    """Whatever a status asks for."""

    def __init__(self, usable: set[str]) -> None:
        self._usable = usable

    def Describe(self, request: object, context: object) -> worker_pb2.WorkerInfo:
        return worker_pb2.WorkerInfo()

    def Stats(self, request: object, context: object) -> object:
        if isinstance(request, gateway_pb2.StatsRequest):
            return gateway_pb2.GatewayStats(workers=sorted(self._usable))
        return kvstore_pb2.StatsReply() if isinstance(request, kvstore_pb2.StatsRequest) else worker_pb2.WorkerStats()


class Town:
    """Two of each kind and a directory, on threads; `restart` is the controller's part."""

    def __init__(self) -> None:
        self.usable: set[str] = set()
        """Workers that the gateways use."""
        self.events: list[str] = []
        self.joins = True
        """Whether a process that was restarted comes into the directory."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._servers: list[grpc.Server] = []
        self._registrations: dict[str, Registration] = {}
        self._directory = DirectoryServer(DirectoryConfig(settle_s=0.0))
        address = self._on_loop(self._directory.start())
        self.states = {"directory": self._state("directory", "directory", address, pid=1)}
        for role in ("gateway", "decode", "prefill", "store"):
            for i in range(2):
                self._add(f"{role}-{i}", role)

    def members(self) -> list[MemberState]:
        return list(self.states.values())

    def restart(self, name: str) -> None:
        self.events.append(name)
        before = self.states[name]
        assert before.started is not None
        if before.role == "directory":
            self.states[name] = self._state(name, before.role, before.started.address, pid=before.started.pid + 1)
            return
        self.usable.discard(before.started.address)
        self._on_loop(self._registrations.pop(name).leave())
        self.states[name] = replace(before, state="starting", problem="restarting")
        threading.Timer(0.2, self._come_back, [name, before]).start()

    def close(self) -> None:
        for registration in self._registrations.values():
            self._on_loop(registration.leave())
        self._on_loop(self._directory.stop(0))
        for server in self._servers:
            server.stop(0).wait()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _come_back(self, name: str, before: MemberState) -> None:
        assert before.started is not None
        self._add(name, before.role, pid=before.started.pid + 1)

    def _add(self, name: str, role: str, pid: int = 1) -> None:
        server = grpc.server(ThreadPoolExecutor(max_workers=4))
        health = HealthServicer()
        health.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        everything = Everything(self.usable)
        for add in (
            worker_pb2_grpc.add_WorkerServicer_to_server,
            kvstore_pb2_grpc.add_KVStoreServicer_to_server,
            gateway_pb2_grpc.add_GatewayServicer_to_server,
        ):
            add(everything, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        self._servers.append(server)
        self.states[name] = self._state(name, role, address, pid=pid)
        if self.joins:
            self._on_loop(self._join(name, role, address))
            if role in ("prefill", "decode"):
                threading.Timer(0.3, self._use, [name, address]).start()  # gateways take a moment

    def _use(self, name: str, address: str) -> None:
        self.usable.add(address)
        self.events.append(f"{name} used")

    async def _join(self, name: str, role: str, address: str) -> None:
        directory = self.states["directory"].started
        assert directory is not None
        self._registrations[name] = Registration(directory.address, address=address, roles=[role])
        self._registrations[name].start()
        await self._registrations[name].registered.wait()

    def _on_loop(self, coroutine: object) -> object:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(WAIT_S)  # type: ignore[arg-type]

    @staticmethod
    def _state(name: str, role: str, address: object, *, pid: int) -> MemberState:
        started = Started(address=str(address), pid=pid, machine="m", version="0")
        return MemberState(name=name, role=role, state="up", machine="m", started=started, num_starts=pid)


@pytest.fixture
def town() -> Iterator[Town]:
    town = Town()
    yield town
    town.close()


def test_one_after_the_other_each_when_the_one_before_is_used(town: Town) -> None:
    lines: list[str] = []
    deadline = time.monotonic() + WAIT_S
    while len(town.usable) < 4:
        assert time.monotonic() < deadline, "the gateways do not use the workers"
        time.sleep(0.02)
    town.events.clear()
    count = rolling_restart(town.members, town.restart, wait_s=WAIT_S, progress=lines.append)
    assert count == len(lines) == 9
    assert town.events == [
        "directory", "store-0", "store-1",
        "prefill-0", "prefill-0 used", "prefill-1", "prefill-1 used",
        "decode-0", "decode-0 used", "decode-1", "decode-1 used", "gateway-0", "gateway-1",
    ]  # fmt: skip
    assert {state.started.pid for state in town.members() if state.started} == {2}


def test_what_does_not_come_back_ends_it(town: Town) -> None:
    town.joins = False
    with pytest.raises(TimeoutError, match=r"store-0 is not back after 2 s: the directory does not list store-0"):
        rolling_restart(town.members, town.restart, only=["store"], wait_s=2, progress=print)
    assert town.events.count("store-0") == 1 and "store-1" not in town.events


def test_it_begins_only_when_all_is_well(town: Town) -> None:
    town.states["decode-1"] = replace(town.states["decode-1"], state="starting")
    with pytest.raises(ValueError, match="not well: decode-1"):
        rolling_restart(town.members, town.restart, only=["gateway"], wait_s=WAIT_S, progress=print)
    assert "gateway-0" not in town.events


def test_a_role_with_one_process_needs_a_word(town: Town) -> None:
    del town.states["prefill-1"]
    with pytest.raises(ValueError, match=r"one prefill only.*--interrupt"):
        rolling_restart(town.members, town.restart, wait_s=WAIT_S, progress=print)
    lines: list[str] = []
    rolling_restart(
        town.members, town.restart, only=["prefill-0"], wait_s=WAIT_S, may_interrupt=True, progress=lines.append
    )
    assert len(lines) == 1


def test_what_is_chosen() -> None:
    names = ["gateway-0", "decode-0", "decode-1", "store-0", "directory"]
    states = [MemberState(name=name, role=name.partition("-")[0], state="up") for name in names]
    order = [state.name for state in choose(states, [])]
    assert order == ["directory", "store-0", "decode-0", "decode-1", "gateway-0"]
    assert [state.name for state in choose(states, ["gateway-0", "decode"])] == ["decode-0", "decode-1", "gateway-0"]
    with pytest.raises(ValueError, match="no role prefill; there are decode, decode-0"):
        choose(states, ["prefill"])
    assert without_stand_in(states, choose(states, ["decode", "store"])) == []
    assert without_stand_in(states, states) == ["gateway"]
