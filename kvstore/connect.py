"""From where a store is to its client."""

from __future__ import annotations

from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.config import ClientConfig
from kvferry.kvstore.ring import StoreRing
from kvferry.kvstore.ring_config import RingConfig
from kvferry.proto.peer_security import PeerSecurity


def connect(where: str | RingConfig, security: PeerSecurity | None = None) -> StoreClient | StoreRing:
    """The client of one node, given host:port, or of a ring of nodes. Call it on the event loop that uses it."""

    def client(address: str) -> StoreClient:
        return StoreClient(ClientConfig(address=address), security=security)

    return StoreRing(where, make_client=client) if isinstance(where, RingConfig) else client(where)
