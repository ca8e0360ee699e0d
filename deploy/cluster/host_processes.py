"""Ends what a Ray cluster left on this machine: its own processes, and no other Ray's.

`ray stop` ends every Ray process of the machine, and `ray down` runs it on the head only.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GRACE_S = 10.0
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class HostProcess:
    pid: int
    parent: int
    started: str
    """Start time in ticks: a pid that was given to another process has another one."""
    command: tuple[str, ...]


def end_ray_processes(address: str, *, grace_s: float = GRACE_S) -> list[int]:
    """Ends this machine's processes of the Ray cluster whose head is at `address`: SIGTERM, then SIGKILL.

    `address` is host:port, or :port where the head is this machine. Returns their pids. Raises PermissionError when one
    is another user's.
    """
    ended = _of_cluster(address, list_processes())
    for number, patience in ((signal.SIGTERM, grace_s), (signal.SIGKILL, grace_s)):
        deadline = time.monotonic() + patience
        left = _alive(ended)
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)
        while left and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            left = _alive(ended)
        if not left:
            break
    return [process.pid for process in ended]


def list_processes() -> list[HostProcess]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):  # it ended meanwhile
                found.append(_read(int(entry.name)))
    return found


def _of_cluster(address: str, processes: Iterable[HostProcess]) -> list[HostProcess]:
    """Those that name the head's address, and all that they started. Parents come first."""
    processes = [process for process in processes if process.pid != os.getpid()]
    host, _, port = address.rpartition(":")
    heads = _own_heads(processes, port) if not host else {f"{host}:{port}", f"{_resolved(host)}:{port}"}
    chosen = {process.pid: process for process in processes if _heads_named(process.command) & heads}
    grown = True
    while grown:
        more = [p for p in processes if p.parent in chosen and p.pid not in chosen]
        chosen |= {p.pid: p for p in more}
        grown = bool(more)
    return list(chosen.values())


def _own_heads(processes: Iterable[HostProcess], port: str) -> set[str]:
    """Addresses with this port of heads that run on this machine."""
    named = set()
    for process in processes:
        own = _option(process.command, "node-ip-address")
        named |= {head for head in _heads_named(process.command) if head == f"{own}:{port}"}
    return named


def _heads_named(command: tuple[str, ...]) -> set[str]:
    """The head that one of Ray's own processes belongs to, by its command line; empty for other processes."""
    if head := _option(command, "gcs-address"):
        return {head}
    if "ray.util.client.server" in command:
        return {_option(command, "address")}
    if command and Path(command[0]).name == "gcs_server":
        return {f"{_option(command, 'node-ip-address')}:{_option(command, 'gcs_server_port')}"}
    return set()


def _option(command: tuple[str, ...], name: str) -> str:
    prefixes = (f"--{name}=", f"--{name.replace('-', '_')}=")
    return next((part.split("=", 1)[1] for part in command if part.startswith(prefixes)), "")


def _resolved(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return host


def _alive(processes: Iterable[HostProcess]) -> list[HostProcess]:
    alive = []
    for process in processes:
        with suppress(OSError):
            if _read(process.pid).started == process.started:
                alive.append(process)
    return alive


def _read(pid: int) -> HostProcess:
    """Raises OSError when there is no such process, or only a zombie of one."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    state, parent, *rest = stat[stat.rindex(")") + 2 :].split()
    if state in "ZX":
        raise ProcessLookupError(pid)
    command = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    return HostProcess(
        pid=pid,
        parent=int(parent),
        started=rest[17],
        command=tuple(part.decode(errors="replace") for part in command),
    )
