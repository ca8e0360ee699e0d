"""Settings of a ring of nodes. Durations are seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_NODES = 64
MAX_REPLICATION = 8


@dataclass(frozen=True, kw_only=True)
class RingConfig:
    """Raises ValueError on impossible values."""

    nodes: tuple[str, ...]
    """host:port of each. The order does not matter, the spelling does: all workers must write a node alike."""
    min_nodes: int = 1
    """0: the list may be empty, and nodes come later; until then everything is a miss."""
    replication: int = 1
    """Nodes that get a copy of each record; with fewer nodes, all of them."""
    lookup_timeout_s: float = 0.2
    """A whole look-up, whatever the number of nodes; also how long a put waits for the other copies after the first."""
    get_timeout_s: float = 30.0
    """A whole get."""
    put_timeout_s: float = 5.0
    """A whole put."""

    def __post_init__(self) -> None:
        if self.min_nodes not in (0, 1):
            raise ValueError(f"min_nodes must be 0 or 1, not {self.min_nodes}")
        checked_nodes(self.nodes, self.min_nodes)
        if not 1 <= self.replication <= MAX_REPLICATION:
            raise ValueError(f"replication must be 1..{MAX_REPLICATION}, not {self.replication}")
        for name in ("lookup_timeout_s", "get_timeout_s", "put_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive")


def checked_nodes(nodes: Sequence[str], min_nodes: int = 1) -> tuple[str, ...]:
    """The same nodes. Raises ValueError, naming the one that is wrong."""
    if not min_nodes <= len(nodes) <= MAX_NODES:
        raise ValueError(f"a store has {min_nodes} to {MAX_NODES} nodes, not {len(nodes)}")
    for node in nodes:
        host, colon, port = node.rpartition(":")
        if not host or not colon or not port.isdecimal() or not 0 < int(port) <= 65535:
            raise ValueError(f"a node must be host:port, not {node!r}")
    twice = sorted({node for node in nodes if nodes.count(node) > 1})
    if twice:
        raise ValueError(f"node {twice[0]} is given twice")
    return tuple(nodes)
