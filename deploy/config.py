"""What a gateway is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvferry.deploy.edge_security import EdgeSecurity
from kvferry.deploy.routing.policies import Policy
from kvferry.deploy.routing.prefix import DEFAULT_INDEX_BYTES
from kvferry.kvstore.metrics_endpoint import MetricsPlace
from kvferry.proto.peer_security import PeerSecurity


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    max_model_len: int  # tokens, prompt and answer together
    vocab_size: int  # token ids are below this

    def __post_init__(self) -> None:
        _require(self.max_model_len > 1, "max_model_len must be at least 2")
        _require(self.vocab_size > 0, "vocab_size must be positive")


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    max_prompt_bytes: int = 4 * 2**20  # UTF-8; a token id counts 4
    max_new_tokens: int = 4096  # the largest max_tokens a request may ask for
    max_concurrent: int = 64  # requests with a worker
    max_queued: int = 256  # requests waiting for their turn; more are refused
    default_timeout_s: float = 600.0  # for requests without a deadline
    write_timeout_s: float = 30.0  # a client that reads nothing for so long is dropped

    def __post_init__(self) -> None:
        _require(self.max_prompt_bytes > 0, "max_prompt_bytes must be positive")
        _require(self.max_new_tokens > 0, "max_new_tokens must be positive")
        _require(self.max_concurrent > 0, "max_concurrent must be positive")
        _require(self.max_queued >= 0, "max_queued must not be negative")
        _require(self.default_timeout_s > 0, "default_timeout_s must be positive")
        _require(self.write_timeout_s > 0, "write_timeout_s must be positive")


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """Worker addresses are "host:port", as the decode workers can reach them too.

    Without prefill workers, decode workers that have the role "prefill" prefill by themselves.
    """

    model_name: str
    decode_workers: tuple[str, ...]
    prefill_workers: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 7600  # 0: any free port
    tenant: str = "default"  # cache namespace of requests whose clients are not asked for a token
    security: PeerSecurity = field(default_factory=PeerSecurity)  # what workers ask for
    edge: EdgeSecurity = field(default_factory=EdgeSecurity)  # what clients are asked for
    eos_token_ids: tuple[int, ...] = ()
    tokenizer_digest: bytes = b""  # of the gateway's tokenizer; workers with another one are not used
    limits: RequestLimits = field(default_factory=RequestLimits)
    router: Policy = "prefix"
    router_memory: int = DEFAULT_INDEX_BYTES  # bytes to remember where blocks are
    poll_interval_s: float = 0.8  # how often workers are asked what they are
    poll_timeout_s: float = 1.0  # two unanswered polls: the worker is silent, its requests go elsewhere
    metrics: MetricsPlace | None = None  # where Prometheus asks; None: nowhere

    def __post_init__(self) -> None:
        _require(bool(self.model_name), "model_name is empty")
        _require(0 <= self.port < 65536, f"port {self.port} is not in 0..65535")
        _require(self.poll_interval_s > 0, "poll_interval_s must be positive")
        _require(self.poll_timeout_s > 0, "poll_timeout_s must be positive")
        for address in (*self.decode_workers, *self.prefill_workers):
            check_address(address)


def check_address(address: str) -> None:
    """Raises ValueError unless `address` is "host:port"."""
    host, _, port = address.rpartition(":")
    _require(
        bool(host) and port.isdecimal() and 0 < int(port) < 65536,
        f"worker address {address!r} is not host:port",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
