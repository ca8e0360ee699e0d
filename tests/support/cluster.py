"""A whole deployment of real processes on this machine that find each other through a directory."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

from kvferry.proto.peer_security import PeerSecurity
from support.deployment import Deployment
from support.processes import free_port

_ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0
END_S = 60.0


@dataclass
class LocalProc:
    """A `Proc`; its port stays over its lives."""

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
        self._by_pid: dict[int, LocalProc] = {}
        self._early: dict[int, int] = {}
        self._lock = threading.Lock()
        self._started: queue.Queue[int] = queue.Queue()
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(START_S), "the forge did not start"

    def start(self, proc: LocalProc, args: list[str]) -> None:
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


class Cluster(Deployment):
    """Use it as a context manager. Every process logs to its own file in `folder`."""

    def __init__(self, folder: Path, model: Path, *, security: str = "", peers: PeerSecurity | None = None) -> None:
        """`security`: that section of the configuration; `peers`: what these tests show the processes then."""
        self.folder = folder
        self.peers = peers or PeerSecurity()
        self.config = folder / "kvferry.yaml"
        self.config.write_text(
            f"model: {model}\nserved_model_name: tiny\ndtype: float32\npreset: kv16\nblock_size: 32\nthreads: 1\n"
            "decode: {kv_memory: 32MiB, prefix_caching: false}\nprefill: {fetch: always}\nstore: {memory: 64MiB}\n"
            f"{security}"
        )
        self._procs: dict[str, LocalProc] = {}
        self._forge = Forge()
        self._new("directory", "directory")

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._forge.close()

    @property
    def procs(self) -> dict[str, LocalProc]:
        return self._procs

    def _new(self, name: str, kind: str) -> LocalProc:
        proc = self.procs[name] = LocalProc(name, kind, free_port(), self.folder / f"{name}.log")
        return proc

    def add(self, name: str, kind: str) -> LocalProc:
        """A process of `kind` on a port of its own, started."""
        proc = self.procs.get(name) or self._new(name, kind)
        self.start(proc)
        return proc

    def start(self, proc: LocalProc) -> None:
        port = ["--port", str(proc.port)]
        directory = ["--directory", self.directory.address]
        config = ["--config", str(self.config)]
        drain = ["--drain-timeout", "20"]
        args = {
            "directory": ["directory", *port, *config, "--state", str(self.folder / "epochs")],
            "store": ["store", *port, *directory, *config],
            "prefill": ["worker", "--role", "prefill", *port, *directory, *config, *drain],
            "decode": ["worker", "--role", "decode", *port, *directory, *config, *drain],
            "gateway": ["gateway", *port, *directory, *config, *drain],
        }[proc.kind]
        self._forge.start(proc, args)

    async def ended(self, proc: LocalProc) -> int:
        """Its exit code; fails when it does not end."""
        assert await asyncio.to_thread(proc.ended.wait, END_S), f"{proc.name} does not end: {proc.log.read_text()}"
        assert proc.code is not None
        return proc.code

    async def bring_back(self, proc: LocalProc) -> None:
        assert await self.ended(proc) == -signal.SIGKILL
        self.start(proc)

    async def check(self, proc: LocalProc) -> None:
        assert not proc.ended.is_set(), f"{proc.name} ended: {proc.log.read_text()[-2000:]}"


async def start_two_of_each(cluster: Cluster) -> None:
    """The directory and two processes of each other kind, ready."""
    cluster.start(cluster.procs["directory"])
    kinds = ("prefill", "decode", "gateway", "store")
    await cluster.until_joined(*(cluster.add(f"{kind}-{i}", kind) for kind in kinds for i in range(2)))
