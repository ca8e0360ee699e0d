"""Settings of a decode worker."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    host: str = "127.0.0.1"
    port: int = 0
    """0: any free port."""
    pool_bytes: int = 512 * 1024 * 1024
    """Memory of the block pool."""
    max_num_seqs: int = 16
    """Sequences decoded at once; each has an fp16 tail of one block."""
    prefix_caching: bool = True
    """Keep the blocks of finished prompts in the pool while there is room; off, each request fetches all blocks."""
    max_waiting: int = 128
    """Requests that may wait for room; more are shed with RESOURCE_EXHAUSTED."""
    fetch_timeout_s: float = 30.0
    """Longest fetch of one run of blocks from the store; a stalled one is abandoned much earlier."""
    prefill_timeout_s: float = 600.0
    """Longest wait for a prefill worker, when the request has no deadline of its own."""
