"""The last log lines of a deployment's processes, through Ray, which keeps them on each machine."""

from __future__ import annotations

from collections.abc import Iterator

import ray
from ray.util.state import get_log, list_actors

TIMEOUT_S = 30


def log_tails(namespace: str, name: str | None, lines: int) -> Iterator[tuple[str, str]]:
    """Titles and texts: of the process `name`, or of all. Raises LookupError; RuntimeError when Ray cannot tell."""
    try:
        actors = list_actors(filters=[("ray_namespace", "=", namespace)], limit=1000, timeout=TIMEOUT_S, detail=True)
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"Ray does not say which processes there are: {error}") from error
    by_name = {actor.name: actor for actor in actors if actor.state != "DEAD"}
    if name is not None and name not in by_name:
        raise LookupError(f"there is no process {name!r}; there are {', '.join(sorted(by_name)) or 'none'}")
    for actor_name in [name] if name is not None else sorted(by_name):
        actor = by_name[actor_name]
        try:
            text = "".join(get_log(actor_id=actor.actor_id, suffix="err", tail=lines, timeout=TIMEOUT_S))
        except (ray.exceptions.RayError, RuntimeError, ValueError) as error:
            text = f"(no log: {error})"
        yield f"{actor_name}, pid {actor.pid}, node {actor.node_id}", text
