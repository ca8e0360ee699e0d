"""From the settings of a deployment to what one prefill or decode worker is told."""

from __future__ import annotations

from kvferry.decode.config import DecodeConfig
from kvferry.deploy.settings import Settings
from kvferry.prefill.config import PrefillConfig


def prefill_config(settings: Settings, *, host: str, port: int) -> PrefillConfig:
    """Of a prefill worker that listens there; 0: any free port."""
    role = settings.prefill
    return PrefillConfig(
        host=host,
        port=port,
        metrics=settings.metrics.place(port),
        max_requests=role.max_requests,
        fetch=role.fetch,
    )


def own_prefill_config(settings: Settings) -> PrefillConfig | None:
    """What a decode worker with both roles prefills by; None where there are prefill workers."""
    if settings.prefill.count:
        return None
    role = settings.prefill
    return PrefillConfig(max_requests=role.max_requests, fetch=role.fetch)


def decode_config(settings: Settings, *, host: str, port: int) -> DecodeConfig:
    """Of a decode worker that listens there; 0: any free port."""
    role = settings.decode
    return DecodeConfig(
        host=host,
        port=port,
        metrics=settings.metrics.place(port),
        kv_memory=role.kv_memory,
        max_num_seqs=role.max_num_seqs,
        prefix_caching=role.prefix_caching,
        publish_answers=role.publish_answers,
    )


def nth_port(first: int, index: int) -> int:
    """The port of the worker with this index, when the first one's is `first`; 0 stays 0: any free port."""
    return first and first + index
