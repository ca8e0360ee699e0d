"""`kvferry up` and `kvferry down`: `ray up` and `ray down`, with what they lack for machines that one has already."""

from __future__ import annotations

import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from kvferry.deploy.cluster.description import ClusterDescription
from kvferry.deploy.cluster.shell import Shell, ShellError, run_here
from kvferry.deploy.security_settings import CLUSTER_FOLDER, CLUSTER_TOKEN_FILE, TOKENS_FILE, SecuritySettings
from kvferry.deploy.settings import Settings
from kvferry.deploy.token_files import make_missing_files

REMOTE_CONFIG = "~/kvferry.yaml"
REMOTE_TOKEN = "~/.ray/auth_token"
RAY_UP_TIMEOUT_S = 1800.0
RAY_DOWN_TIMEOUT_S = 600.0
STATUS_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 90.0
END_HOST_TIMEOUT_S = 60.0
POLL_S = 3.0

Progress = Callable[[str], None]


def up(
    description: ClusterDescription, settings: Settings, *, config: Path | None, wait_s: float, progress: Progress
) -> dict[str, Any]:
    """Starts Ray and the deployment on every machine, and waits until all of it is up.

    `config` is the file of `settings`, or None where the description mounts it. The deployment's tokens are made where
    the settings name none, and go where the description's own files go. Returns the status, as `kvferry status --json`
    prints it. Raises ShellError, TimeoutError, OSError.
    """
    mounts = token_mounts(description, settings.security)
    if config is not None:
        mounts[REMOTE_CONFIG] = str(config.absolute())
    raw = description.with_file_mounts(mounts)
    if REMOTE_TOKEN in raw["file_mounts"]:
        ensure_token(Path(raw["file_mounts"][REMOTE_TOKEN]))
    for remote, local in raw["file_mounts"].items():
        if not Path(local).exists():
            raise ShellError(f"file_mounts: {remote} is to come from {local}, which does not exist")
    with tempfile.TemporaryDirectory(prefix="kvferry-up-") as folder:
        path = Path(folder) / description.path.name
        path.write_text(yaml.safe_dump(raw, sort_keys=False))
        progress(f"ray up: head and workers of {description.name} (minutes)")
        started = time.monotonic()
        done = run_here(
            ["ray", "up", "-y", "--no-config-cache", "--disable-usage-stats", str(path)],
            timeout_s=RAY_UP_TIMEOUT_S,
            env=ray_environment(description),
        )
        if done.returncode:
            raise ShellError(f"ray up failed:\n{done.said}")
        progress(f"the head is up after {time.monotonic() - started:.0f} s; waiting for the processes")
    return _wait_until_well(description, wait_s=wait_s, progress=progress)


def down(description: ClusterDescription, *, progress: Progress) -> dict[str, list[int]]:
    """Ends the deployment, then Ray, on every machine. Returns the pids of Ray processes that were ended, by machine.

    Raises ShellError, naming the machines where that failed, after doing it on all others.
    """
    shell = Shell(description)
    problems: list[str] = []
    try:
        stopped = shell.on_head(f"kvferry stop --config {REMOTE_CONFIG}", timeout_s=STOP_TIMEOUT_S)
        progress("the deployment has ended" if stopped.returncode == 0 else f"kvferry stop: {stopped.said}")
    except ShellError as error:
        progress(f"the deployment did not end by itself: {error}")
    if not description.is_local:
        # The cloud ends the machines, and all that runs on them.
        done = run_here(
            ["ray", "down", "-y", str(description.path)],
            timeout_s=RAY_DOWN_TIMEOUT_S,
            env=ray_environment(description),
        )
        if done.returncode:
            raise ShellError(f"ray down failed:\n{done.said}")
        return {}
    ended: dict[str, list[int]] = {}

    def end(host: str) -> None:
        address = (
            str(description.head_port) if host == description.head else f"{description.head}:{description.head_port}"
        )
        try:
            done = shell.on_host(host, f"kvferry end-host --json {address}", timeout_s=END_HOST_TIMEOUT_S)
            if done.returncode:
                problems.append(f"{host}: {done.said}")
            else:
                ended[host] = json.loads(done.output.splitlines()[-1])["ended"]
                progress(f"{host}: {len(ended[host])} processes of Ray ended")
        except (ShellError, ValueError, KeyError, IndexError) as error:
            problems.append(f"{host}: {error}")

    end(description.head)  # first: its autoscaler would start workers again
    with ThreadPoolExecutor(max_workers=16) as pool:
        list(pool.map(end, description.workers))
    _forget_machines(description)
    if problems:
        raise ShellError("not everything has ended: " + "; ".join(problems))
    return ended


def ray_environment(description: ClusterDescription) -> dict[str, str]:
    """The environment for Ray's own commands: this one, without what would break them."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    # `ray` is a script beside this Python, which need not be on PATH.
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment.get('PATH', os.defpath)}"
    if description.is_local:
        # Ray 2.60's second autoscaler starts no worker with provider local (ray issues 57153, 59905).
        environment["RAY_UP_enable_autoscaler_v2"] = "0"
    return environment


def mounted_config(description: ClusterDescription) -> Path | None:
    """The file that the description itself puts in the configuration's place; None where it has none."""
    mounts = description.with_file_mounts({})["file_mounts"]
    return Path(mounts[REMOTE_CONFIG]) if REMOTE_CONFIG in mounts else None


def token_mounts(description: ClusterDescription, security: SecuritySettings) -> dict[str, str]:
    """Where the default token files of `security` come from, by their place on the machines; made here where they are
    not. A description that mounts its own has the last word. Raises OSError."""
    own = description.with_file_mounts({})["file_mounts"]
    wanted = [
        default
        for path, default in (
            (security.cluster_token_file, CLUSTER_TOKEN_FILE),
            (security.tokens_file, TOKENS_FILE),
        )
        if path == default or str(default) in own
    ]
    here = CLUSTER_FOLDER.expanduser()
    sources = {str(path): own.get(str(path), str(here / path.name)) for path in wanted}
    if any(Path(source).parent == here for source in sources.values()):
        make_missing_files(here)
    return sources


def ensure_token(path: Path) -> None:
    """Makes Ray's token where there is none, readable by this user only."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


def read_status(description: ClusterDescription) -> dict[str, Any]:
    """What `kvferry status --json` says on the head. Raises ShellError."""
    done = Shell(description).on_head(f"kvferry status --config {REMOTE_CONFIG} --json", timeout_s=STATUS_TIMEOUT_S)
    for line in done.output.splitlines():  # Ray's own lines may be around it
        if line.startswith('{"name"'):
            status: dict[str, Any] = json.loads(line)
            return status
    raise ShellError(f"no status from the head: {done.said}")


def _wait_until_well(description: ClusterDescription, *, wait_s: float, progress: Progress) -> dict[str, Any]:
    deadline = time.monotonic() + wait_s
    told = ""
    while True:
        try:
            status = read_status(description)
            if status["well"]:
                return status
            now = ", ".join(f"{p['name']} {p['state']}" for p in status["processes"] if p["state"] != "up")
            now = now or "waiting for the gateway to serve"
            failed = [f"{p['name']} {p['problem']}" for p in status["processes"] if p["state"] == "failed"]
            now = "; ".join([now, *failed])
        except ShellError as error:
            now = str(error)
        if now != told:
            progress(now)
            told = now
        if time.monotonic() > deadline:
            raise TimeoutError(f"not up after {wait_s:g} s: {now}")
        time.sleep(POLL_S)


def _forget_machines(description: ClusterDescription) -> None:
    """Removes Ray's note, on this machine, of which machines it has started."""
    from ray.autoscaler._private.local.config import get_lock_path, get_state_path

    for path in (get_state_path(description.name), get_lock_path(description.name)):
        Path(path).unlink(missing_ok=True)
