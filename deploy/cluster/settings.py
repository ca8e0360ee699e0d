"""The `cluster` section: what differs when the processes run on the machines of a Ray cluster."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kvferry.deploy.cluster.autoscale import Limits
from kvferry.deploy.store_settings import Section


class RoleAutoscaleSettings(Section):
    """Between how many workers, and how soon."""

    min: int = Field(1, ge=1, le=64)
    max: int = Field(ge=1, le=64)
    up_after_s: float = Field(5.0, ge=0, le=3600)
    """How long the load must ask for more workers."""
    down_after_s: float = Field(300.0, ge=10, le=86400)
    """How long one worker fewer must have been enough."""

    @model_validator(mode="after")
    def _ordered(self) -> RoleAutoscaleSettings:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max {self.max}: raise max or lower min")
        return self

    @property
    def limits(self) -> Limits:
        return Limits(min=self.min, max=self.max, up_after_s=self.up_after_s, down_after_s=self.down_after_s)


class PrefillAutoscaleSettings(RoleAutoscaleSettings):
    target_queued_tokens: int = Field(8192, ge=1)
    """Prompt tokens that may wait for each worker."""


class DecodeAutoscaleSettings(RoleAutoscaleSettings):
    target_usage: float = Field(0.8, gt=0, le=1)
    """The share of pool blocks that running requests may use."""


class AutoscaleSettings(Section):
    """None: the role's `count` stays."""

    prefill: PrefillAutoscaleSettings | None = None
    decode: DecodeAutoscaleSettings | None = None


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
    autoscale: AutoscaleSettings = AutoscaleSettings()
