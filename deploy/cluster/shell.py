"""Commands on the machines of a cluster, from another machine."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.deploy.cluster.description import ClusterDescription

CONNECT_TIMEOUT_S = 10


class ShellError(RuntimeError):
    """A machine cannot be reached, or a command failed there; `str()` says what it said."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    returncode: int
    output: str
    """stdout and, of `ray exec`, Ray's own lines."""
    errors: str
    seconds: float

    @property
    def said(self) -> str:
        """The last lines, for people."""
        return "\n".join((self.output + self.errors).strip().splitlines()[-8:])


class Shell:
    """Runs commands on the head, and on workers of a local cluster, as a login shell of the user there."""

    def __init__(self, description: ClusterDescription) -> None:
        self._description = description

    def on_head(self, command: str, *, timeout_s: float) -> Finished:
        """Raises ShellError when the head is not reached in time."""
        if self._description.is_local:
            return self.on_host(self._description.head, command, timeout_s=timeout_s)
        return run_here(["ray", "exec", "--no-config-cache", str(self._description.path), command], timeout_s=timeout_s)

    def on_host(self, host: str, command: str, *, timeout_s: float) -> Finished:
        """A host of a local cluster. Raises ShellError."""
        inner = shlex.quote(f"source ~/.bashrc; {command}")
        finished = run_here([*self.ssh_command(host), f"bash --login -c {inner}"], timeout_s=timeout_s)
        if finished.returncode == 255:
            raise ShellError(f"{host} cannot be reached over ssh: {finished.said}")
        return finished

    def ssh_command(self, host: str) -> list[str]:
        auth = self._description.with_file_mounts({})["auth"]
        key = ["-i", auth["ssh_private_key"]] if auth.get("ssh_private_key") else []
        options = ["BatchMode=yes", f"ConnectTimeout={CONNECT_TIMEOUT_S}", "StrictHostKeyChecking=accept-new"]
        return ["ssh", *key, *(part for option in options for part in ("-o", option)), f"{auth['ssh_user']}@{host}"]


def run_here(command: Sequence[str], *, timeout_s: float, env: dict[str, str] | None = None) -> Finished:
    """A command of this machine, to its end. Raises ShellError when it takes longer or does not exist."""
    started = time.monotonic()
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=env,
        )
    except subprocess.TimeoutExpired as error:
        said = b"".join(part for part in (error.stdout, error.stderr) if isinstance(part, bytes)).decode(
            errors="replace"
        )
        raise ShellError(f"{command[0]} took more than {timeout_s:.0f} s: {said[-800:]}") from error
    except FileNotFoundError as error:
        raise ShellError(f"{command[0]} is not installed here, or not on PATH") from error
    return Finished(
        returncode=done.returncode, output=done.stdout, errors=done.stderr, seconds=time.monotonic() - started
    )
