"""Settings of the node and of the client. Durations are seconds, sizes are bytes."""

from __future__ import annotations

from dataclasses import dataclass

from kvferry.kvstore.metrics_endpoint import MetricsPlace

MIB = 1 << 20

# Messages of 1 MiB are the fastest on gRPC (16 MiB ones reach about 60 % of it), and they fit
# every client's default message limit of 4 MiB.
FRAME_BYTES = MIB

# A frame plus its fields; also room for the keys of the longest allowed request.
MAX_MESSAGE_BYTES = 2 * MIB

DEFAULT_MAX_RECORD_BYTES = 64 * MIB
DEFAULT_MAX_KEYS = 16384


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """Settings of one KV store node. Raises ValueError on impossible values."""

    host: str = "127.0.0.1"  # binds loopback unless told otherwise
    port: int = 0  # 0: the system picks one, `KVStoreServer.start` returns it
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES
    max_staged_bytes: int = 256 * MIB  # records being put but not committed, all streams together
    staging_timeout_s: float = 10.0  # from the first frame of a put to its commit
    stalled_reader_s: float = 10.0  # a Get whose client takes no frame for so long is ended
    max_lease_s: float = 30.0
    max_keys_per_request: int = DEFAULT_MAX_KEYS
    max_concurrent_calls: int = 1024
    metrics: MetricsPlace | None = None  # where Prometheus asks; None: nowhere
    # Where records are got in bulk, beside gRPC (see bulk_server.py). None: not offered; 0: the system picks one.
    bulk_port: int | None = 0
    # What clients are told to connect to, host:port; None: the bulk port on the host that they reached the node by.
    bulk_address: str | None = None
    max_bulk_connections: int = 128  # a thread each; beyond them clients use gRPC

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, f"port must be 0..65535, not {self.port}")
        _require(self.max_record_bytes >= 1, "max_record_bytes must be positive")
        _require(
            self.max_staged_bytes >= self.max_record_bytes,
            "max_staged_bytes must hold at least one record of max_record_bytes",
        )
        _require(self.max_lease_s >= 0, "max_lease_s must not be negative")
        _require(
            1 <= self.max_keys_per_request <= DEFAULT_MAX_KEYS,
            f"max_keys_per_request must be 1..{DEFAULT_MAX_KEYS} (the keys must fit one message)",
        )
        _require(self.max_concurrent_calls >= 1, "max_concurrent_calls must be positive")
        if self.bulk_port is not None:
            _require(0 <= self.bulk_port <= 65535, f"bulk_port must be 0..65535 or None, not {self.bulk_port}")
            taken = self.bulk_port != 0 and self.bulk_port == self.port
            _require(not taken, f"bulk_port and port are both {self.port}; give one of them another number")
        if self.bulk_address is not None:
            _require(":" in self.bulk_address, f"bulk_address must be host:port, not {self.bulk_address!r}")
        _require(self.max_bulk_connections >= 1, "max_bulk_connections must be positive")
        for name in ("staging_timeout_s", "stalled_reader_s"):
            _require(getattr(self, name) > 0, f"{name} must be positive")


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """Settings of one client of one node. Raises ValueError on impossible values."""

    address: str  # host:port
    lookup_timeout_s: float = 0.2  # also of release, delete, stats and the breaker's probe
    get_timeout_s: float = 30.0  # a whole get
    put_timeout_s: float = 5.0  # a whole put
    progress_timeout_s: float = 1.0  # the longest wait for the next frame of a get
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES
    use_bulk: bool = True  # get records over the node's bulk port where it offers one; else over gRPC
    use_local: bool = True  # and over its Unix socket where the node is on this machine
    # One failure opens the breaker: probing is done in the background, so an open breaker costs
    # a request nothing, while every further live attempt at a stopped node costs a full timeout.
    failure_threshold: int = 1
    cool_down_s: float = 0.5  # between two probes of a node that does not answer

    def __post_init__(self) -> None:
        _require(":" in self.address, f"address must be host:port, not {self.address!r}")
        _require(self.max_record_bytes >= 1, "max_record_bytes must be positive")
        _require(self.failure_threshold >= 1, "failure_threshold must be at least 1")
        for name in (
            "lookup_timeout_s",
            "get_timeout_s",
            "put_timeout_s",
            "progress_timeout_s",
            "cool_down_s",
        ):
            _require(getattr(self, name) > 0, f"{name} must be positive")
