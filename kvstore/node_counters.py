"""What a node counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class NodeCounters:
    """What this node did since it started."""

    lookups: int = 0
    hits: int = 0
    misses: int = 0
    puts: int = 0
    rejected: int = 0
    corrupt: int = 0
    bulk_gets: int = 0  # gets over the bulk port
    bulk_puts: int = 0  # requests of puts over it
