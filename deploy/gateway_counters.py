"""What a gateway counts, since its start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class GatewayCounters:
    num_requests: int = 0
    num_failovers: int = 0
    """Times that a request went on with other workers."""
    num_draining_workers: int = 0
    """Times that a worker refused a request because it is about to end."""
    num_stale_chunks: int = 0
    """Tokens of an attempt that was over, dropped."""
    num_resumed: int = 0
    """Requests that a client went on with here."""
