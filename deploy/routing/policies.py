"""The policies by name."""

from __future__ import annotations

from typing import Literal, get_args

from kvferry.deploy.routing.prefix import DEFAULT_INDEX_BYTES, PrefixRouter
from kvferry.deploy.routing.router import Router
from kvferry.deploy.routing.simple import LeastLoaded, RoundRobin

Policy = Literal["prefix", "least-loaded", "round-robin"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


def make_router(policy: Policy, *, index_bytes: int = DEFAULT_INDEX_BYTES) -> Router:
    """A new router. `index_bytes`: what `prefix` may use to remember where blocks are."""
    if policy == "prefix":
        return PrefixRouter(index_bytes=index_bytes)
    return LeastLoaded() if policy == "least-loaded" else RoundRobin()
