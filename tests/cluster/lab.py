"""Machines for cluster tests, on this one: each has its own network, processes, mounts, /tmp, HOME and sshd.

A host is a set of namespaces (net, pid, mount, uts, ipc) that shares this machine's file system, except for what a
host has of its own. The client is a host like the others; the bridge that joins them is in its network namespace, so
nothing of the lab touches this machine's network.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

NETWORK = "10.83.0"
CLIENT = "client"
PREFIX = "kvferry-lab-"
"""Of namespaces and folders; the lab's pid follows."""
FOLDER = Path("/var/tmp")
"""Not below /tmp or HOME, which every host has of its own."""
KEY = ".ssh/id_lab"
_LISTENING = "0A"
_CLONE_NEWNET = 0x40000000
START_TIMEOUT_S = 20.0
_TOOLS = {
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "/usr/sbin/sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "rsync": "rsync",
    "screen": "screen",
}


class LabError(RuntimeError):
    """The machines cannot be made; `str()` says what to do."""


def why_not() -> str:
    """Why this machine and user cannot have a lab, with what to do about it; empty when they can."""
    if sys.platform != "linux":
        return "the lab is made of Linux namespaces: run it on Linux"
    if os.geteuid() != 0:
        return (
            "the lab makes network, process and mount namespaces, which needs root: run it as root (sudo -E make ...)"
        )
    missing = sorted({package for tool, package in _TOOLS.items() if shutil.which(tool) is None})
    if missing:
        return f"the lab needs {', '.join(missing)}: apt-get install -y --no-install-recommends {' '.join(missing)}"
    return ""


@dataclass(frozen=True)
class Finished:
    """A command that ran on a host."""

    returncode: int
    output: str
    """stdout"""
    errors: str
    """stderr"""
    seconds: float


class Host:
    """One machine of the lab."""

    def __init__(self, name: str, address: str, namespace: str, root: Path) -> None:
        self.name = name
        self.address = address
        self.namespace = namespace
        self.root = root
        """Holds this host's own root/ (HOME) and tmp/, and sshd.log."""
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def init_pid(self) -> int:
        """This machine's pid of the host's first process. Raises LabError when the host is not up."""
        if self.process is None:
            raise LabError(f"{self.name} is not started")
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            return int(children.read_text().split()[0])
        except (OSError, IndexError):
            raise LabError(f"{self.name} is not up: {self.log()[-400:]}") from None

    def log(self) -> str:
        return (self.root / "sshd.log").read_text(errors="replace")

    def processes(self) -> dict[int, str]:
        """Every process of this host by its pid on this machine, with its command line, but the first (sshd)."""
        if self.process is None:
            return {}
        init = self.init_pid
        namespace = os.readlink(f"/proc/{init}/ns/pid")
        found: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal() or int(entry.name) == init:
                continue
            with suppress(OSError):  # it ended meanwhile
                if os.readlink(entry / "ns/pid") == namespace:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    found[int(entry.name)] = line or f"[{(entry / 'comm').read_text().strip()}]"
        return found

    def listener(self, port: int) -> int | None:
        """This machine's pid of the process that listens on a TCP port of the host; None: nobody does."""
        sockets = set()
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{self.init_pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{fields[9]}]")
        for pid in sorted(self.processes()) if sockets else ():
            with suppress(OSError):  # it ended meanwhile
                for fd in Path(f"/proc/{pid}/fd").iterdir():
                    with suppress(OSError):
                        if os.readlink(fd) in sockets:
                            return pid
        return None


class Lab:
    """`with Lab(["head", "worker-1"], ...) as lab`: hosts, and the client. All of it is gone when the block ends."""

    def __init__(
        self, names: Sequence[str], *, path: Sequence[Path], env: dict[str, str], visible: Sequence[Path]
    ) -> None:
        """`path` and `env` go into every host's login shell; `visible` are folders that must be seen in hosts even
        where they lie below /tmp or HOME. Raises LabError."""
        if problem := why_not():
            raise LabError(problem)
        remove_stale()
        prefix = f"{PREFIX}{os.getpid()}"
        self.folder = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=FOLDER))
        self._path, self._env, self._visible = path, env, [p.resolve() for p in visible]
        self.hosts = {
            name: Host(name, f"{NETWORK}.{number}", f"{prefix}-{number}", self.folder / name)
            for number, name in enumerate([*names, CLIENT], start=1)
        }
        self._made: list[str] = []

    @property
    def client(self) -> Host:
        return self.hosts[CLIENT]

    def __enter__(self) -> Self:
        try:
            self._keys()
            self._network()
            for host in self.hosts.values():
                self._boot(host)
            for host in self.hosts.values():
                self._await_sshd(host)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process of every host, then removes namespaces and files. Safe to call twice."""
        for host in self.hosts.values():
            self.switch_off(host)
        while self._made:
            _run("ip", "netns", "del", self._made.pop())
        mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        if any(mount.startswith(str(self.folder)) for mount in mounted):  # never delete through a mount
            raise LabError(f"{self.folder} still holds mounts: umount them and remove it")
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(
        self,
        host: Host,
        command: str,
        *,
        timeout_s: float,
        env: dict[str, str] | None = None,
        log: IO[str] | None = None,
    ) -> Finished:
        """Runs a shell command on a host, at its own console. Output goes to `log`, too. Raises TimeoutError."""
        inner = f"source ~/.bashrc; cd ~; {command}"
        variables = {
            "HOME": "/root",
            "USER": "root",
            "LOGNAME": "root",
            "TERM": "xterm",
            "LANG": "C.UTF-8",
            "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
        }
        assignments = [f"{key}={value}" for key, value in (variables | (env or {})).items()]
        started = time.monotonic()
        # `timeout` runs inside: what nsenter started does not end with nsenter.
        enter = ["nsenter", "-t", str(host.init_pid), "-a", "--", "env", "-i", *assignments]
        child = subprocess.run(
            [*enter, "timeout", "-k", "5", str(timeout_s), "bash", "-c", inner],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout_s + 20,
            text=True,
            errors="replace",
        )
        done = Finished(child.returncode, child.stdout, child.stderr, time.monotonic() - started)
        if log is not None:
            log.write(
                f"$ [{host.name}] {command}\n{done.output}{done.errors}-> {done.returncode}, {done.seconds:.1f} s\n"
            )
            log.flush()
        if done.returncode == 124:
            raise TimeoutError(
                f"{command!r} on {host.name} took more than {timeout_s:.0f} s: {(done.output + done.errors)[-1500:]}"
            )
        return done

    def switch_off(self, host: Host) -> None:
        """Ends all processes of a host at once, as a power loss would; nobody answers at its address then."""
        if host.process is not None:
            host.process.kill()  # --kill-child: its child is the first process of the PID namespace
            host.process.wait()
            host.process = None

    def join_network(self, host: Host) -> None:
        """From here on this thread, and all that it starts, is in the host's network. Raises OSError."""
        libc = ctypes.CDLL(None, use_errno=True)
        fd = os.open(f"/var/run/netns/{host.namespace}", os.O_RDONLY)
        try:
            if libc.setns(fd, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter the network of {host.name}")
        finally:
            os.close(fd)

    def kill(self, host: Host, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to a process of a host, by the host's own pid."""
        _run("nsenter", "-t", str(host.init_pid), "-a", "--", "kill", f"-{number.value}", str(pid))

    def _keys(self) -> None:
        for name in ("id", "host"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))

    def _network(self) -> None:
        for host in self.hosts.values():
            _run("ip", "netns", "add", host.namespace)
            self._made.append(host.namespace)
            _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
        bridge = self.client.namespace
        _run("ip", "-n", bridge, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", bridge, "addr", "add", f"{self.client.address}/24", "dev", "br0")
        _run("ip", "-n", bridge, "link", "set", "br0", "up")
        for number, host in enumerate(self.hosts.values()):
            if host is not self.client:
                port = f"port{number}"
                _run(
                    "ip",
                    "-n",
                    bridge,
                    "link",
                    "add",
                    port,
                    "type",
                    "veth",
                    "peer",
                    "name",
                    "eth0",
                    "netns",
                    host.namespace,
                )
                _run("ip", "-n", bridge, "link", "set", port, "master", "br0", "up")
                _run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
                _run("ip", "-n", host.namespace, "link", "set", "eth0", "up")
            # Ray finds its own address by "connecting" a UDP socket to a public one: that needs a route.
            _run(
                "ip",
                "-n",
                host.namespace,
                "route",
                "add",
                "default",
                "via",
                self.client.address if host is not self.client else f"{NETWORK}.1",
            )

    def _boot(self, host: Host) -> None:
        home, tmp = host.root / "root", host.root / "tmp"
        (home / ".ssh").mkdir(parents=True)
        tmp.mkdir()
        tmp.chmod(0o1777)
        for folder in (home, home / ".ssh"):
            folder.chmod(0o700)
        for source, target in (("id.pub", ".ssh/authorized_keys"), ("id", KEY)):
            shutil.copy(self.folder / source, home / target)
            (home / target).chmod(0o600)
        exports = {**self._env, "PATH": ":".join([*map(str, self._path), "/usr/bin:/bin:/usr/sbin:/sbin"])}
        profile = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in exports.items())
        for name in (".bashrc", ".bash_profile"):
            (home / name).write_text(profile)
        (host.root / "boot.sh").write_text(self._boot_script(host, home, tmp))
        with (host.root / "sshd.log").open("wb") as log:
            host.process = subprocess.Popen(
                ["ip", "netns", "exec", host.namespace, "unshare", "--mount", "--pid", "--uts", "--ipc", "--fork",
                 "--kill-child", "--mount-proc", "bash", str(host.root / "boot.sh")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def _boot_script(self, host: Host, home: Path, tmp: Path) -> str:
        lines = ["set -e", f"hostname {host.name}"]
        for own, mount_point in ((home, "/root"), (tmp, "/tmp")):
            for path in self._visible:
                if path.is_relative_to(mount_point):
                    inside = own / path.relative_to(mount_point)
                    lines += [f"mkdir -p {shlex.quote(str(inside))}"]
                    lines += [f"mount --rbind {shlex.quote(str(path))} {shlex.quote(str(inside))}"]
        lines += [
            "mount -t tmpfs -o size=1g tmpfs /dev/shm",
            "mount -t tmpfs -o size=64m tmpfs /run",
            "mkdir -p /run/sshd /run/screen && chmod 1777 /run/screen",
            f"mount --rbind {home} /root",
            f"mount --rbind {tmp} /tmp",
            f"exec /usr/sbin/sshd -D -e -f /dev/null -o PidFile=none -o HostKey={self.folder}/host -o UsePAM=no"
            " -o PermitRootLogin=prohibit-password -o MaxSessions=64 -o MaxStartups=64:30:128 -o UseDNS=no"
            f" -o ListenAddress={host.address} -o Subsystem='sftp internal-sftp'",
        ]
        return "\n".join(lines) + "\n"

    def _await_sshd(self, host: Host) -> None:
        assert host.process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Server listening" not in host.log():
            if host.process.poll() is not None or time.monotonic() > deadline:
                raise LabError(f"{host.name} did not start: {host.log()[-800:]}")
            time.sleep(0.05)


def remove_stale() -> None:
    """Removes what labs left whose process was killed."""

    def is_stale(name: str) -> bool:
        pid = name.removeprefix(PREFIX).partition("-")[0]
        return name.startswith(PREFIX) and pid.isdecimal() and not Path(f"/proc/{pid}").exists()

    for line in _run("ip", "netns", "list").splitlines():
        if line and is_stale(namespace := line.split()[0]):
            for pid in _run("ip", "netns", "pids", namespace).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _run("ip", "netns", "del", namespace)
    for folder in FOLDER.iterdir():
        if is_stale(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def _run(*command: str) -> str:
    """A short command of this machine. Raises LabError with what it said."""
    child = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if child.returncode:
        raise LabError(f"{' '.join(command)}: {child.stderr.strip()}")
    return child.stdout
