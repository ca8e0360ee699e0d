"""From where a store is to its client."""

from __future__ import annotations

from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.config import ClientConfig
from kvferry.kvstore.ring import StoreRing
from kvferry.kvstore.ring_config import RingConfig


def connect(where: str | RingConfig) -> StoreClient | StoreRing:
    """The client of one node, given host:port, or of a ring of nodes. Call it on the event loop that uses it."""
    return StoreRing(where) if isinstance(where, RingConfig) else StoreClient(ClientConfig(address=where))
