"""Where a Redis is and how to get in: one server, Sentinels, or the nodes of a cluster.

redis-py is imported where it is used, so that a node without Redis does not pay for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

_SCHEMES = ("redis", "rediss", "unix")


@dataclass(frozen=True, kw_only=True)
class RedisTls:
    """PEM files: the authority that the server's certificate must come from, and the client's own pair."""

    ca: str | None = None  # None: the system's authorities
    cert: str | None = None
    key: str | None = None


@dataclass(frozen=True, kw_only=True)
class RedisPlace:
    """A Redis. Raises ValueError for what cannot be; no message and no repr holds the password.

    Exactly one of `url` (redis://, rediss:// with TLS, or unix://, one server), `cluster` (host:port of
    some of a cluster's nodes) and `sentinels` (host:port of Sentinels, which know the master of `service`).
    """

    url: str | None = field(default=None, repr=False)
    cluster: tuple[str, ...] = ()
    sentinels: tuple[str, ...] = ()
    service: str | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: RedisTls | None = None

    def __post_init__(self) -> None:
        if sum(map(bool, (self.url, self.cluster, self.sentinels))) != 1:
            raise ValueError("a Redis needs exactly one of url, cluster and sentinel")
        if bool(self.sentinels) != bool(self.service):
            raise ValueError("Redis Sentinel needs the addresses of Sentinels and the name of a service")
        for address in (*self.cluster, *self.sentinels):
            _host_and_port(address)
        if self.tls is not None and bool(self.tls.cert) != bool(self.tls.key):
            raise ValueError("a client certificate for Redis needs both cert and key")
        if self.url is None:
            return
        parts = urlsplit(self.url)
        if parts.scheme not in _SCHEMES or not (parts.hostname or parts.path):
            raise ValueError("a Redis URL starts with redis://, rediss:// (TLS) or unix://, and names a place")
        if self.tls is not None and parts.scheme != "rediss":
            raise ValueError("TLS needs a rediss:// URL")
        if self.password is not None and parts.password:
            raise ValueError("the Redis password is given twice, in the URL and beside it")

    @property
    def text(self) -> str:
        """For messages: no password."""
        if self.cluster:
            return "cluster " + ",".join(self.cluster)
        if self.sentinels:
            return f"{self.service} of the Sentinels {','.join(self.sentinels)}"
        parts = urlsplit(self.url or "")
        return parts.path if parts.scheme == "unix" else f"{parts.hostname}:{parts.port or 6379}"

    def connection_options(self, *, connect_timeout_s: float, op_timeout_s: float) -> dict[str, Any]:
        """What redis-py needs beside the address. Nothing is tried twice."""
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        options: dict[str, Any] = {
            "socket_connect_timeout": connect_timeout_s,
            "socket_timeout": op_timeout_s,
            # redis-py retries by default, each time for a whole timeout.
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
        }
        if self.user is not None:
            options["username"] = self.user
        if self.password is not None:
            options["password"] = self.password
        if self.tls is not None:
            options |= {"ssl_ca_certs": self.tls.ca, "ssl_certfile": self.tls.cert, "ssl_keyfile": self.tls.key}
        return options

    def connect(self, *, max_connections: int, connect_timeout_s: float, op_timeout_s: float) -> Any:
        """A redis-py client of the server, or of the master that the Sentinels name. Connects on first use."""
        import redis.asyncio
        import redis.asyncio.sentinel

        options = self.connection_options(connect_timeout_s=connect_timeout_s, op_timeout_s=op_timeout_s)
        if self.sentinels:
            # Sentinels have passwords of their own, if any: the data's is not sent to them.
            to_sentinel = {name: options[name] for name in ("socket_connect_timeout", "socket_timeout", "retry")}
            options["ssl"] = self.tls is not None
            make: Any = redis.asyncio.sentinel.Sentinel
            sentinel = make(
                [_host_and_port(address) for address in self.sentinels], sentinel_kwargs=to_sentinel, **options
            )
            return sentinel.master_for(self.service or "", max_connections=max_connections)
        if self.url is None:
            raise ValueError("a cluster has no single server to connect to")
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            self.url, max_connections=max_connections, timeout=op_timeout_s, **options
        )
        return redis.asyncio.Redis.from_pool(pool)

    def nodes(self) -> list[tuple[str, int]]:
        """Host and port of the cluster's nodes that are known from the start."""
        return [_host_and_port(address) for address in self.cluster]

    def node(self, host: str, port: int) -> RedisPlace:
        """One node of the cluster, with this place's way in."""
        scheme = "redis" if self.tls is None else "rediss"
        host = f"[{host}]" if ":" in host else host
        return RedisPlace(url=f"{scheme}://{host}:{port}/0", user=self.user, password=self.password, tls=self.tls)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = unquote(address).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is not host:port")
    return host.strip("[]"), int(port)
