"""Which requests a prefill worker takes, and when a refused one may come again."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from kvferry.prefill.config import PrefillConfig
from kvferry.prefill.errors import QueueFull

MIN_RETRY_MS = 100
MAX_RETRY_MS = 30_000


@dataclass(frozen=True, kw_only=True)
class Held:
    """What one request in the worker holds."""

    tenant: str
    warm: bool
    num_tokens: int
    """Of its prompt: its blocks take memory in proportion."""


def check_room(running: Iterable[Held], new: Held, config: PrefillConfig, seconds_left: float) -> None:
    """Raises QueueFull when `new` does not fit beside the `running` requests.

    `seconds_left`: how long the worker will compute what it has; the hint when to come again is the share of it that
    makes room for `new`.
    """
    everyone = list(running)
    bounds = [("the prefill worker is full", everyone, 1.0)]
    same_tenant = [held for held in everyone if held.tenant == new.tenant]
    bounds.append(("the prefill worker has too many requests of this tenant", same_tenant, config.max_tenant_share))
    if new.warm:
        warm = [held for held in everyone if held.warm]
        bounds.append(("the prefill worker has too many requests that warm the store", warm, config.max_warm_share))
    for problem, held, share in bounds:
        num_tokens = sum(one.num_tokens for one in held)
        if not held or (
            len(held) < math.ceil(share * config.max_requests)
            and num_tokens + new.num_tokens <= share * config.max_prompt_tokens_in_flight
        ):
            continue
        wanted = max(new.num_tokens / max(num_tokens, 1), 1 / len(held))
        retry_after_ms = int(min(max(1000 * seconds_left * min(wanted, 1.0), MIN_RETRY_MS), MAX_RETRY_MS))
        raise QueueFull(f"{problem} ({len(held)} requests); try again later", retry_after_ms=retry_after_ms)
