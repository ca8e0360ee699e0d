"""A whole deployment of real processes that find each other through a directory, to be killed and restarted."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from kvferry.deploy.directory_client import list_members
from kvferry.proto import gateway_pb2, gateway_pb2_grpc, worker_pb2, worker_pb2_grpc
from support.processes import free_port

_ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0
END_S = 60.0
WORKERS = ("prefill", "decode")


@dataclass
class Proc:
    """One process, over its lives; its port stays."""

    name: str
    kind: str  # directory, store, prefill, decode, gateway
    port: int
    log: Path
    pid: int = 0
    code: int | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def signal(self, number: int) -> None:
        if not self.ended.is_set():
            os.kill(self.pid, number)


class Forge:
    """See support/forge.py."""

    def __init__(self) -> None:
        environment = dict(os.environ, PYTHONPATH=f"{_ROOT / 'src'}:{_ROOT / 'tests'}", TOKENIZERS_PARALLELISM="false")
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "support.forge"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=_ROOT,
        )
        self._by_pid: dict[int, Proc] = {}
        self._early: dict[int, int] = {}
        self._lock = threading.Lock()
        self._started: queue.Queue[int] = queue.Queue()
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(START_S), "the forge did not start"

    def start(self, proc: Proc, args: list[str]) -> None:
        assert self._popen.stdin is not None
        order = json.dumps({"args": args, "log": str(proc.log)}) + "\n"
        self._popen.stdin.write(order.encode())
        self._popen.stdin.flush()
        pid = self._started.get(timeout=START_S)
        with self._lock:
            proc.pid, proc.code, proc.ended = pid, None, threading.Event()
            self._by_pid[pid] = proc
            if pid in self._early:
                proc.code = self._early.pop(pid)
                proc.ended.set()

    def close(self) -> None:
        for proc in list(self._by_pid.values()):
            proc.signal(signal.SIGCONT)
            proc.signal(signal.SIGKILL)
        for proc in list(self._by_pid.values()):
            proc.ended.wait(10)
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        self._popen.wait(10)
        self._reader.join(10)
        assert self._popen.stdout is not None
        self._popen.stdout.close()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for raw in self._popen.stdout:
            match raw.decode().split():
                case ["ready"]:
                    self._ready.set()
                case ["started", pid]:
                    self._started.put(int(pid))
                case ["ended", pid, code]:
                    with self._lock:
                        proc = self._by_pid.pop(int(pid), None)
                        if proc is None:
                            self._early[int(pid)] = int(code)
                        else:
                            proc.code = int(code)
                            proc.ended.set()


class Cluster:
    """Use it as a context manager. Every process logs to its own file in `folder`."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self._config = folder / "kvferry.yaml"
        self._config.write_text(
            f"model: {model}\nserved_model_name: tiny\ndtype: float32\npreset: kv16\nblock_size: 32\nthreads: 1\n"
            "decode: {kv_memory: 32MiB, prefix_caching: false}\nprefill: {fetch: always}\nstore: {memory: 64MiB}\n"
        )
        self.procs: dict[str, Proc] = {}
        self._forge = Forge()
        self.directory = self._new("directory", "directory")

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._forge.close()

    def of_kind(self, *kinds: str) -> list[Proc]:
        return [proc for proc in self.procs.values() if proc.kind in kinds]

    @property
    def gateways(self) -> list[str]:
        return [proc.address for proc in self.of_kind("gateway")]

    def _new(self, name: str, kind: str) -> Proc:
        proc = self.procs[name] = Proc(name, kind, free_port(), self.folder / f"{name}.log")
        return proc

    def add(self, name: str, kind: str) -> Proc:
        """A process of `kind` on a port of its own, started."""
        proc = self.procs.get(name) or self._new(name, kind)
        self.start(proc)
        return proc

    def start(self, proc: Proc) -> None:
        port = ["--port", str(proc.port)]
        directory = ["--directory", self.directory.address]
        config = ["--config", str(self._config)]
        drain = ["--drain-timeout", "20"]
        args = {
            "directory": ["directory", *port, "--state", str(self.folder / "epochs")],
            "store": ["store", *port, *directory, *config],
            "prefill": ["worker", "--role", "prefill", *port, *directory, *config, *drain],
            "decode": ["worker", "--role", "decode", *port, *directory, *config, *drain],
            "gateway": ["gateway", *port, *directory, *config, *drain],
        }[proc.kind]
        self._forge.start(proc, args)

    async def ended(self, proc: Proc) -> int:
        """Its exit code; fails when it does not end."""
        assert await asyncio.to_thread(proc.ended.wait, END_S), f"{proc.name} does not end: {proc.log.read_text()}"
        assert proc.code is not None
        return proc.code

    async def until_joined(self, *procs: Proc) -> None:
        """Until they are members, and every gateway uses them if they are workers."""
        await self.until(lambda: self._joined(procs), f"{[p.name for p in procs]} did not join")

    async def until_left(self, proc: Proc) -> None:
        async def left() -> bool:
            return proc.address not in await self.members()

        await self.until(left, f"{proc.name} is still a member")

    async def members(self) -> set[str]:
        return {member.address for member in (await list_members(self.directory.address)).members}

    async def _joined(self, procs: tuple[Proc, ...]) -> bool:
        for proc in procs:
            assert not proc.ended.is_set(), f"{proc.name} ended: {proc.log.read_text()[-2000:]}"
        try:
            members = await self.members()
        except OSError:
            return False
        if any(proc.kind != "directory" and proc.address not in members for proc in procs):
            return False
        for gateway in self.of_kind("gateway"):
            stats = await self.gateway_stats(gateway)
            if stats is None or any(p.kind in WORKERS and p.address not in stats.workers for p in procs):
                return False
        return True

    @staticmethod
    async def until(condition, problem: str, seconds: float = START_S) -> None:  # type: ignore[no-untyped-def]
        end = time.monotonic() + seconds
        while not await condition():
            assert time.monotonic() < end, problem
            await asyncio.sleep(0.05)

    async def gateway_stats(self, proc: Proc) -> gateway_pb2.GatewayStats | None:
        """None when it does not answer."""
        async with grpc.aio.insecure_channel(proc.address) as channel:
            try:
                return await gateway_pb2_grpc.GatewayStub(channel).Stats(gateway_pb2.StatsRequest(), timeout=1.0)
            except grpc.aio.AioRpcError:
                return None

    async def calls(self, proc: Proc) -> worker_pb2.CallStats | None:
        """What a worker says of its calls; None when it does not answer."""
        async with grpc.aio.insecure_channel(proc.address) as channel:
            try:
                stats = await worker_pb2_grpc.WorkerStub(channel).Stats(worker_pb2.StatsRequest(), timeout=1.0)
            except grpc.aio.AioRpcError:
                return None
        return stats.calls

    async def sum_of(self, field_name: str) -> int:
        """A counter of the gateways that answer, together."""
        stats = [await self.gateway_stats(proc) for proc in self.of_kind("gateway")]
        return sum(getattr(one, field_name) for one in stats if one is not None)


async def start_two_of_each(cluster: Cluster) -> None:
    """The directory and two processes of each other kind, ready."""
    cluster.start(cluster.directory)
    kinds = ("prefill", "decode", "gateway", "store")
    await cluster.until_joined(*(cluster.add(f"{kind}-{i}", kind) for kind in kinds for i in range(2)))
