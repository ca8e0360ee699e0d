"""A deployment that `kvferry up` started on the lab's hosts, as the fault tests see it: see support/deployment.py."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lab import Host, Lab
from support.deployment import WORKERS, Deployment

from kvferry.deploy.client import ClientAccess
from kvferry.proto.peer_security import PeerSecurity
from kvferry.proto.token_file import read_tokens

START_AGAIN_S = 240.0


@dataclass
class HostProc:
    """A `Proc`: an actor of Ray. Its port stays over its lives, its host may not."""

    name: str
    kind: str
    port: int
    host: Host
    pid: int
    """This machine's, not the host's own."""

    @property
    def address(self) -> str:
        return f"{self.host.address}:{self.port}"

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)


class HostDeployment(Deployment):
    """Ray starts killed processes again; the gateways, the directory and the workers' metrics are asked over the lab's
    network, so the caller must be in it (`Lab.join_network`)."""

    join_s = START_AGAIN_S

    def __init__(self, lab: Lab, status: Mapping[str, Any]) -> None:
        """`status`: what `kvferry status --json` says when all is well."""
        secrets = lab.client.root / "root" / ".kvferry"  # where `kvferry up` made them
        self.peers = PeerSecurity(tokens=read_tokens(secrets / "cluster_token"))
        self.access = ClientAccess(token=(secrets / "client_token").read_text().strip())
        self._hosts = [host for host in lab.hosts.values() if host is not lab.client]
        self._procs: dict[str, HostProc] = {}
        for told in status["processes"]:
            address, _, port = told["address"].rpartition(":")
            host = next(host for host in self._hosts if host.address == address)
            pid = host.listener(int(port))
            assert pid is not None, f"nobody listens at {told['address']}"
            self._procs[told["name"]] = HostProc(told["name"], told["role"], int(port), host, pid)

    @property
    def procs(self) -> dict[str, HostProc]:
        return self._procs

    async def bring_back(self, proc: HostProc) -> None:
        """Ray does it: on the same host, but that workers may come back on another one."""
        await self.until(
            lambda: asyncio.to_thread(self.find_anew, proc),
            f"{proc.name} was not started again",
        )

    async def check(self, proc: HostProc) -> None:
        assert os.path.exists(f"/proc/{proc.pid}"), f"{proc.name} ended"

    def find_anew(self, proc: HostProc) -> bool:
        """Notes the process that has taken the place of the one that was known; False: there is none yet."""
        for host in self._hosts if proc.kind in WORKERS else [proc.host]:
            pid = host.listener(proc.port)
            if pid not in (None, proc.pid):
                proc.host, proc.pid = host, pid
                return True
        return False

    def leave_out(self, host: Host) -> None:
        """A host that is switched off."""
        self._hosts.remove(host)
