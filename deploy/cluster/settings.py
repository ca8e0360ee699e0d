"""The `cluster` section: what differs when the processes run on the machines of a Ray cluster."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kvferry.deploy.store_settings import Section


class ClusterSettings(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,62}$")] = "kvferry"
    """The deployment's Ray namespace: two deployments on one Ray cluster need two names."""
    bind: Literal["loopback", "machine"] = "loopback"
    """What processes listen on: 127.0.0.1, or their machine's own address, as Ray knows it. The `host` keys of the
    sections are for one machine and not used."""
    machines: int = Field(1, ge=1, le=4096)
    """How many machines to wait for before the first process is placed."""
    wait_s: float = Field(600.0, ge=0)
    """How long to wait for them; then the processes are placed on those that came."""
    directory_port: Annotated[int, Field(ge=1, le=65535)] = 7590
    """On the head: where the processes announce themselves and learn of each other."""
    directory: Annotated[str, Field(pattern=r"^[^\s:]+:[0-9]{1,5}$")] | None = None
    """host:port of a directory that runs elsewhere: then none is started on the head."""
