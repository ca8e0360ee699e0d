"""Starts, asks and ends the deployment of a Ray cluster, as a driver that comes and goes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Ray reads these when it is imported. By itself it uses a token that is there for a cluster that it starts, but not for
# one that it joins.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token" if (Path.home() / ".ray" / "auth_token").is_file() else "disabled")

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvferry.deploy.cluster.autoscaler import RoleScaling
from kvferry.deploy.cluster.controller import CONTROLLER, Controller, MemberState
from kvferry.deploy.security import require_files
from kvferry.deploy.settings import Settings

CALL_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 80.0
POLL_S = 1.0


class NotRunning(RuntimeError):
    """There is no deployment of this name in the Ray cluster."""


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to a Ray cluster that is there; none is started. Raises ConnectionError."""
    try:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConnectionError(f"there is no Ray cluster at {address!r}: {_first_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def start(settings: Settings, *, keep: bool = False) -> None:
    """Has the cluster run this deployment, whether or not this process goes on. Raises ValueError, OSError,
    RuntimeError.

    `keep`: one that runs already is left as it is, instead of an error.
    """
    machines = [node for node in ray.nodes() if node["Alive"]]
    if settings.cluster.bind == "loopback" and (settings.cluster.machines > 1 or len(machines) > 1):
        raise ValueError("processes on several machines cannot meet on 127.0.0.1: set cluster.bind to machine")
    require_files(settings)
    if _find(settings.cluster.name) is not None:
        if keep:
            return
        raise RuntimeError(f"a deployment named {settings.cluster.name!r} is running: end it with kvferry stop")
    here = ray.get_runtime_context().get_node_id()
    handle = ray.remote(Controller).options(
        name=CONTROLLER,
        namespace=settings.cluster.name,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=0,
        max_concurrency=4,
        scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
    ).remote(settings)  # fmt: skip
    ray.get(handle.members.remote(), timeout=CALL_TIMEOUT_S)


def members(name: str) -> list[MemberState]:
    """What the deployment's processes are. Raises NotRunning."""
    states: list[MemberState] = ray.get(_controller(name).members.remote(), timeout=CALL_TIMEOUT_S)
    return states


def scaling(name: str) -> list[RoleScaling]:
    """How many workers each role is to have, and why. Raises NotRunning."""
    roles: list[RoleScaling] = ray.get(_controller(name).scaling.remote(), timeout=CALL_TIMEOUT_S)
    return roles


def scale(name: str, role: str, count: int) -> None:
    """Raises NotRunning, ValueError."""
    try:
        ray.get(_controller(name).scale.remote(role, count), timeout=CALL_TIMEOUT_S)
    except ray.exceptions.RayTaskError as error:
        raise ValueError(str(error.cause)) from error


def restart(name: str, process: str, drain_s: float) -> None:
    """One process ends when it has drained, and starts anew; returns at once. Raises NotRunning, ValueError."""
    try:
        ray.get(_controller(name).restart.remote(process, drain_s), timeout=CALL_TIMEOUT_S)
    except ray.exceptions.RayTaskError as error:
        raise ValueError(str(error.cause)) from error


def stop(name: str) -> None:
    """Ends every process of the deployment. Raises NotRunning."""
    handle = _controller(name)
    try:
        ray.get(handle.stop.remote(), timeout=STOP_TIMEOUT_S)
    finally:
        ray.kill(handle, no_restart=True)


def wait_until_up(name: str, timeout_s: float) -> list[MemberState]:
    """Returns when every process is up. Raises TimeoutError, saying which are not and why, and NotRunning."""
    deadline = time.monotonic() + timeout_s
    while True:
        states = members(name)
        late = [state for state in states if state.state != "up"]
        if not late:
            return states
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"not up after {timeout_s:g} s: "
                + "; ".join(f"{state.name} is {state.state} {state.problem}".strip() for state in late)
            )
        time.sleep(POLL_S)


def _controller(name: str) -> Any:
    handle = _find(name)
    if handle is None:
        raise NotRunning(f"no deployment named {name!r} runs in this Ray cluster: start it with kvferry run")
    return handle


def _find(name: str) -> Any | None:
    try:
        return ray.get_actor(CONTROLLER, namespace=name)
    except ValueError:
        return None


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
