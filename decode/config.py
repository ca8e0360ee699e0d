"""Settings of a decode worker."""

from __future__ import annotations

from dataclasses import dataclass

from kvferry.kvstore.metrics_endpoint import MetricsPlace


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    host: str = "127.0.0.1"
    port: int = 0
    """0: any free port."""
    kv_memory: int | float = 512 * 1024 * 1024
    """Memory of the block pool: bytes, or as a float the share of what is free on the device once the model is
    loaded."""
    max_num_seqs: int = 16
    """Sequences decoded at once; each has an fp16 tail of one block."""
    prefix_caching: bool = True
    """Keep the blocks of finished prompts in the pool while there is room; off, each request fetches all blocks."""
    publish_answers: bool = True
    """After an answer, have prefill compute and publish the blocks that the answer completed, when it has nothing else
    to do: the conversation's next turn then finds them in the store."""
    max_waiting: int = 128
    """Requests that may wait for room; more are shed with RESOURCE_EXHAUSTED."""
    fetch_timeout_s: float = 5.0
    """Longest fetch of one run of blocks from the store, and never more than a quarter of the request's time; a silent
    store is given up much earlier by the store client. What did not come by then is taken from prefill."""
    prefill_timeout_s: float = 600.0
    """Longest wait for a prefill worker, when the request has no deadline of its own."""
    metrics: MetricsPlace | None = None
    """Where Prometheus asks; None: nowhere."""
