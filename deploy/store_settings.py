"""The `store` section: the KV store nodes, where they listen, and the tiers that keep their records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

from kvferry.kvstore.config import NodeConfig
from kvferry.kvstore.redis_place import RedisPlace, RedisTls
from kvferry.kvstore.ring_config import MAX_NODES, MAX_REPLICATION, RingConfig, checked_nodes
from kvferry.kvstore.size import parse_size
from kvferry.kvstore.store_config import DiskConfig, StoreConfig


def _bytes(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _bytes_or_off(value: object) -> object:
    # YAML reads a bare `off` as false.
    return None if value is False or value == "off" else _bytes(value)


def _port_or_off(value: object) -> object:
    return None if value is False or value == "off" else value


def _url_alone(value: object) -> object:
    return {"url": value} if isinstance(value, str) else value


Bytes = Annotated[int, BeforeValidator(_bytes, json_schema_input_type=int | str), Field(gt=0)]
BytesOrOff = Annotated[
    Annotated[int, Field(gt=0)] | None, BeforeValidator(_bytes_or_off, json_schema_input_type=int | str | bool | None)
]
Port = Annotated[int, Field(ge=0, le=65535)]


class Section(BaseModel):
    """A part of the settings. Its errors do not repeat what was given: that may be a password."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class DiskSettings(Section):
    path: Path
    bytes: Bytes


class RedisTlsSettings(Section):
    ca: str | None = None
    cert: str | None = None
    key: str | None = None


class SentinelSettings(Section):
    nodes: list[str]
    service: str


class RedisSettings(Section):
    """Exactly one of url, cluster and sentinel; a string stands for a url."""

    url: str | None = Field(None, repr=False)  # may hold a password
    cluster: list[str] = []
    sentinel: SentinelSettings | None = None
    user: str | None = None
    password: SecretStr | None = None
    password_file: Path | None = None
    tls: RedisTlsSettings | None = None

    @model_validator(mode="after")
    def _is_a_place(self) -> RedisSettings:
        if self.password is not None and self.password_file is not None:
            raise ValueError("give password or password_file, not both")
        self._place(None if self.password is None else self.password.get_secret_value())
        return self

    def place(self) -> RedisPlace:
        """With the password, from its file where there is one. Raises OSError when that cannot be read."""
        if self.password_file is not None:
            return self._place(self.password_file.expanduser().read_text().strip())
        return self._place(None if self.password is None else self.password.get_secret_value())

    def _place(self, password: str | None) -> RedisPlace:
        sentinel = self.sentinel
        return RedisPlace(
            url=self.url,
            cluster=tuple(self.cluster),
            sentinels=() if sentinel is None else tuple(sentinel.nodes),
            service=None if sentinel is None else sentinel.service,
            user=self.user,
            password=password,
            tls=None if self.tls is None else RedisTls(**self.tls.model_dump()),
        )


class StoreSettings(Section):
    host: str = "127.0.0.1"
    port: Port = 7700
    """The first node's; the next ones count up. 0: any free ports."""
    bulk_port: Annotated[Port | None, BeforeValidator(_port_or_off)] = 7770
    """Where the first node's records are got in bulk, beside gRPC; the next ones' count up. 0: any free ports, also
    where `port` is 0; None, written as `off`: gRPC carries them."""
    count: int = Field(1, ge=1, le=MAX_NODES)
    """Nodes on this machine, each with these tiers."""
    nodes: list[str] = []
    """host:port of nodes that run elsewhere: then none is started here."""
    replication: int = Field(1, ge=1, le=MAX_REPLICATION)
    """Nodes that get a copy of each record."""
    lookup_timeout: float = Field(0.2, gt=0, le=60)
    """Seconds that a look-up may take: what a lost store may add to a request's TTFT."""
    worker_cache: BytesOrOff = None
    """What each worker keeps of the records that it read; None, written as `off`: nothing."""
    memory: BytesOrOff = 2**30
    """None, written as `off`: no memory tier."""
    disk: DiskSettings | None = None
    redis: Annotated[
        RedisSettings | None, BeforeValidator(_url_alone, json_schema_input_type=RedisSettings | str | None)
    ] = None
    write: Literal["through", "back"] = "through"

    @model_validator(mode="after")
    def _has_tiers(self) -> StoreSettings:
        if self.memory is None and self.disk is None and self.redis is None:
            raise ValueError("memory is off, so the store needs a disk or a redis")
        if self.memory is None and self.write == "back":
            raise ValueError("write: back needs a memory tier")
        return self

    @model_validator(mode="after")
    def _has_nodes(self) -> StoreSettings:
        if self.nodes:
            checked_nodes(self.nodes)
            of_nodes = sorted(self.model_fields_set & {"count", "bulk_port", "memory", "disk", "redis", "write"})
            if of_nodes:
                raise ValueError(f"nodes run elsewhere, so what they are is not set here: remove {', '.join(of_nodes)}")
        if self.port and self.port + self.count - 1 > 65535:
            raise ValueError(f"port + count: {self.count} ports from {self.port} on do not exist")
        if self.bulk_port and self.bulk_port + self.count - 1 > 65535:
            raise ValueError(f"bulk_port + count: {self.count} ports from {self.bulk_port} on do not exist")
        if self.port and self.bulk_port and abs(self.port - self.bulk_port) < self.count:
            raise ValueError(f"port and bulk_port: the ports of {self.count} nodes overlap")
        num_nodes = len(self.nodes) or self.count
        if self.replication > num_nodes:
            raise ValueError(f"replication is {self.replication}, more than there are nodes ({num_nodes})")
        return self

    def ring_config(self, addresses: Sequence[str], *, min_nodes: int = 1) -> RingConfig:
        """The ring of these nodes: those that were started here, or `nodes`."""
        return RingConfig(
            nodes=tuple(addresses),
            min_nodes=min_nodes,
            replication=self.replication,
            lookup_timeout_s=self.lookup_timeout,
        )

    def node_config(self, index: int = 0) -> NodeConfig:
        """Where one of the nodes listens."""
        bulk_port = self.bulk_port and (self.bulk_port + index if self.port else 0)
        return NodeConfig(host=self.host, port=self.port and self.port + index, bulk_port=bulk_port)

    def store_config(self, index: int = 0) -> StoreConfig:
        """What `make_backend` takes, for one of the nodes. Raises OSError when a password file cannot be read."""
        disk = None
        if self.disk is not None:
            folder = self.disk.path.expanduser()
            if self.count > 1:  # a folder has one user
                folder /= f"node-{index}"
            disk = DiskConfig(folder=folder, capacity_bytes=self.disk.bytes)
        return StoreConfig(
            memory_bytes=self.memory,
            disk=disk,
            redis=None if self.redis is None else self.redis.place(),
            write=self.write,
        )


def disk_options(path: Path | None, num_bytes: str | None) -> dict[str, Any] | None:
    """The command line's part of `store.disk`; None when nothing of it was given."""
    given = {"path": path, "bytes": num_bytes}
    return {key: value for key, value in given.items() if value is not None} or None
