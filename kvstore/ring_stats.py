"""The statistics of several nodes as those of one."""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.kvstore.backend import BackendStats
from kvferry.kvstore.node_answers import NodeStats


def sum_of_stats(nodes: Sequence[NodeStats]) -> NodeStats:
    """Sums over the nodes, at least one; tiers by name, available where they are on every node that has them. A Redis
    that several nodes share counts once for each."""
    tiers: dict[str, list[BackendStats]] = {}
    for node in nodes:
        for tier in node.tiers:
            tiers.setdefault(tier.name, []).append(tier)
    numbers = [name for name in NodeStats._fields if name not in ("backend", "tiers")]
    return NodeStats(
        **{name: sum(getattr(node, name) for node in nodes) for name in numbers},
        backend=", ".join(dict.fromkeys(node.backend for node in nodes)),
        tiers=tuple(_sum_of_tier(of_nodes) for of_nodes in tiers.values()),
    )


def _sum_of_tier(of_nodes: Sequence[BackendStats]) -> BackendStats:
    names = [name for name in BackendStats._fields if name not in ("name", "available", "tiers")]
    return BackendStats(
        **{name: sum(getattr(tier, name) for tier in of_nodes) for name in names},
        name=of_nodes[0].name,
        available=all(tier.available for tier in of_nodes),
    )
