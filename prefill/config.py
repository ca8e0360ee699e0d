"""Settings of a prefill worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvferry.kvstore.metrics_endpoint import MetricsPlace

FetchMode = Literal["measured", "always", "never"]


@dataclass(frozen=True, kw_only=True)
class PrefillConfig:
    host: str = "127.0.0.1"
    port: int = 0
    """0: any free port."""
    max_requests: int = 64
    """Requests in the worker at once, waiting ones included; more are shed with RESOURCE_EXHAUSTED."""
    max_prompt_tokens_in_flight: int = 262_144
    """Prompt tokens of all requests in the worker: bounds its memory for blocks."""
    max_tenant_share: float = 0.75
    """Of both bounds above for one tenant: another tenant finds room even while this one sends all it can."""
    max_warm_share: float = 0.5
    """Of both bounds above for requests that only warm the store."""
    default_timeout_s: float = 600.0
    """Time for a request that has no deadline."""
    handoff_timeout_s: float = 60.0
    """How long blocks are kept for a decode worker that has the handoff but has not closed the stream."""
    fetch: FetchMode = "measured"
    """When to fetch cached blocks: where that is faster than computing them, by measured speeds; always; never."""
    lookup_timeout_s: float = 0.2
    """Longest wait for the store's answer to a look-up: what a dead store may add to TTFT."""
    fetch_timeout_s: float = 5.0
    """Longest fetch of a cached prefix, and never more than a quarter of the request's time; a silent store is given
    up much earlier by the store client. What came by then is used."""
    put_timeout_s: float = 2.0
    """Longest put of one block."""
    publish_delay_s: float = 1.0
    """How long a finished block that decode does not wait for may wait for the end of its prompt's computing before it
    is put. A request that is cancelled loses the blocks of this time."""
    publish_grace_s: float = 0.2
    """How long after the first token decode waits for blocks that are being published; then it takes them from here."""
    publish_timeout_s: float = 10.0
    """Longest publishing after the first token; what is left then is not stored."""
    metrics: MetricsPlace | None = None
    """Where Prometheus asks; None: nowhere."""
