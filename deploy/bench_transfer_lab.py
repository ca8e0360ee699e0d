"""Two network namespaces joined by a shaped link, and processes in them: the machines of `kvferry bench transfer`."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

LINK = "link0"
"""Name of the interface in both namespaces."""
ADDRESSES = {"a": "10.199.0.1", "b": "10.199.0.2"}
START_TIMEOUT_S = 300.0
COMMAND_TIMEOUT_S = 20.0
MAX_LINE_BYTES = 2**24
_BURST_S = 0.002
"""A token bucket of so much time at the full rate: the timer's resolution must not limit fast links."""
_MIN_BURST_BYTES = 64 * 1024
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def parse_link(text: str) -> float | None:
    """Bits a second of "100mbit", "1gbit", ...; None for "unshaped". Raises ValueError."""
    if text == "unshaped":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{text!r} is not a link: write 100mbit, 1gbit or unshaped")
    return float(match[1]) * _UNITS[match[2]]


def check_rights() -> None:
    """Raises PermissionError or FileNotFoundError when this user or machine cannot make network namespaces."""
    if os.geteuid() != 0:
        raise PermissionError(
            "bench transfer makes network namespaces and shapes a link, which needs root: run it as root"
        )
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise FileNotFoundError(f"bench transfer needs {' and '.join(missing)}: install iproute2")


class Lab:
    """Namespaces "a" and "b" of unique names and the link between them; everything is gone when the context ends."""

    def __init__(self) -> None:
        self._names = {end: f"kvferry-{os.getpid()}-{end}" for end in ADDRESSES}
        self._made: list[str] = []

    async def __aenter__(self) -> Self:
        check_rights()
        try:
            for name in self._names.values():
                await _run("ip", "netns", "add", name)
                self._made.append(name)
            a, b = self._names["a"], self._names["b"]
            await _run("ip", "link", "add", LINK, "netns", a, "type", "veth", "peer", "name", LINK, "netns", b)
            for end, name in self._names.items():
                await _run("ip", "-n", name, "addr", "add", f"{ADDRESSES[end]}/24", "dev", LINK)
                for device in ("lo", LINK):
                    await _run("ip", "-n", name, "link", "set", device, "up")
        except BaseException:
            await self._remove()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._remove()

    async def shape(self, bits_per_s: float | None) -> None:
        """Limits both directions with `tbf`; None takes the limit away."""
        for name in self._names.values():
            with suppress(RuntimeError):  # there is none to take away
                await _run("tc", "-n", name, "qdisc", "del", "dev", LINK, "root")
            if bits_per_s is not None:
                burst = max(_MIN_BURST_BYTES, int(bits_per_s / 8 * _BURST_S))
                limits = ["rate", f"{int(bits_per_s)}bit", "burst", str(burst), "latency", "50ms"]
                await _run("tc", "-n", name, "qdisc", "replace", "dev", LINK, "root", "tbf", *limits)

    async def wire_bytes(self) -> int:
        """Bytes that crossed the link so far, both directions, headers included."""
        shown = await _run("ip", "-n", self._names["b"], "-s", "-j", "link", "show", "dev", LINK)
        counters = json.loads(shown)[0]["stats64"]
        return int(counters["rx"]["bytes"]) + int(counters["tx"]["bytes"])

    def inside(self, end: str) -> list[str]:
        """What to put before a command so that it runs at one end."""
        return ["ip", "netns", "exec", self._names[end]]

    async def _remove(self) -> None:
        """The link goes with its namespace."""
        while self._made:
            await _run("ip", "netns", "del", self._made.pop())


class Process:
    """A child in a namespace; it is killed, by its pid, when the context ends."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._command = list(command)
        self._log = log
        self._child: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        with self._log.open("wb") as log:
            self._child = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=MAX_LINE_BYTES,
                start_new_session=True,  # Ctrl-C reaches the benchmark alone, which then ends its children
            )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        child = self._child
        if child is not None:
            if child.returncode is None:
                child.kill()
            # Reads what is left, so that the pipes close with the child.
            await child.communicate()

    async def line_with(self, text: str, *, timeout_s: float = START_TIMEOUT_S) -> str:
        """The next line of its output, or of its log, that holds `text`. Raises RuntimeError when it ends before."""
        assert self._child is not None
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while True:
                    for line in self._log.read_text(errors="replace").splitlines():
                        if text in line:
                            return line
                    if self._child.returncode is not None:
                        break
                    await asyncio.sleep(0.05)
        raise self._gone("did not start")

    async def ask(self, command: dict[str, Any] | None, *, timeout_s: float) -> dict[str, Any]:
        """Sends a line of JSON, if any, and reads one. Raises RuntimeError."""
        assert self._child is not None and self._child.stdin is not None and self._child.stdout is not None
        line = b""
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(timeout_s):
                if command is not None:
                    self._child.stdin.write(json.dumps(command).encode() + b"\n")
                    await self._child.stdin.drain()
                line = await self._child.stdout.readline()
        if not line:
            raise self._gone(f"did not answer within {timeout_s:.0f} s")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"a process of the benchmark failed: {answer['error']}")
        return answer

    def _gone(self, what: str) -> RuntimeError:
        said = "\n".join(self._log.read_text(errors="replace").splitlines()[-8:])
        return RuntimeError(f"{' '.join(self._command[4:9])} {what}: {said}")


async def _run(*command: str) -> str:
    """Runs a short command to its end. Raises RuntimeError with what it said."""
    child = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            out, errors = await child.communicate()
    except BaseException:
        if child.returncode is None:
            child.kill()
        raise
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)}: {errors.decode(errors='replace').strip()}")
    return out.decode()
