"""The ports of the settings: free, or who holds them."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from typing import NamedTuple

import psutil

from kvferry.deploy.doctor.finding import Finding, problem, warning
from kvferry.deploy.settings import Settings

OURS = ("kvferry", "GatewayActor", "WorkerActor", "StoreActor")


class WantedPort(NamedTuple):
    key: str
    """What to change in the settings."""
    host: str
    port: int


def wanted_ports(settings: Settings) -> list[WantedPort]:
    """Those that a deployment of these settings binds; ports that the system picks are not among them."""
    wanted = [WantedPort("gateway.port", settings.gateway.host, settings.gateway.port)]
    prefill, decode, store = settings.prefill, settings.decode, settings.store
    for key, host, first, count in (
        ("prefill.port", prefill.host, prefill.port, prefill.count),
        ("decode.port", decode.host, decode.port, decode.count),
        ("store.port", store.host, store.port, 0 if store.nodes else store.count),
    ):
        wanted += [WantedPort(key, host, first and first + i) for i in range(count)]
    if settings.metrics.enabled:
        offset = settings.metrics.port_offset
        wanted += [
            WantedPort("metrics.port_offset", settings.metrics.host, port + offset) for _, _, port in wanted if port
        ]
    return [one for one in wanted if one.port]


def port_findings(settings: Settings) -> Iterator[Finding]:
    wanted = wanted_ports(settings)
    free = []
    seen: dict[tuple[str, int], str] = {}
    for one in wanted:
        if (other := seen.setdefault((one.host, one.port), one.key)) != one.key:
            yield problem(f"port {one.port}", f"wanted twice: {other} and {one.key}", f"choose another {one.key}")
            continue
        finding = check_port(one)
        if finding is None:
            free.append(str(one.port))
        else:
            yield finding
    if free:
        yield Finding("ports", f"free: {' '.join(free)}")


def check_port(wanted: WantedPort) -> Finding | None:
    """None when it is free."""
    topic = f"port {wanted.port}"
    if not 0 < wanted.port < 65536:
        return problem(topic, "no such port", f"choose another {wanted.key}")
    family = socket.AF_INET6 if ":" in wanted.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((wanted.host, wanted.port))
            probe.listen(1)  # two sockets may be bound to a port; not two may listen
        return None
    except socket.gaierror:
        return problem(topic, f"no address is named {wanted.host}", f"choose a host for {wanted.key} that exists")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return _taken(wanted, topic)
        if error.errno == errno.EADDRNOTAVAIL:
            reason = f"{wanted.host} is no address of this machine: choose another host beside {wanted.key}"
        elif error.errno == errno.EACCES:
            reason = f"this user may not bind it: choose a port from 1024 on ({wanted.key})"
        else:
            reason = f"choose another {wanted.key}"
        return problem(topic, os.strerror(error.errno or 0), reason)


def _taken(wanted: WantedPort, topic: str) -> Finding:
    pid, name = _holder(wanted.port)
    value = "taken" if pid is None else f"taken by process {pid} ({name})"
    if pid is not None and any(word in name for word in OURS):
        return warning(topic, value, f"kvferry runs here already: stop it before another one, or change {wanted.key}")
    hint = "" if pid is not None else " (run the doctor as root to see whose it is)"
    return problem(topic, value, f"end that process{hint}, or choose another {wanted.key}")


def _holder(port: int) -> tuple[int | None, str]:
    """Process id and name of who listens there; None where this user may not see it. Its arguments are not told: they
    may hold a password."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:
        return None, ""
    for connection in connections:
        listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
        if listens and connection.pid:
            try:
                process = psutil.Process(connection.pid)
                words = process.cmdline()
                module = f" -m {words[words.index('-m') + 1]}" if "-m" in words[:-1] else ""
                return connection.pid, process.name() + module
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                return connection.pid, "of another user"
    return None, ""
