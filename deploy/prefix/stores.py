"""The store nodes that a `kvferry prefix` command talks to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.config import ClientConfig
from kvferry.kvstore.ring import StoreRing
from kvferry.kvstore.ring_config import RingConfig
from kvferry.proto.peer_security import PeerSecurity

_LOOKUP_S = 10.0
_GET_S = 300.0
_PUT_S = 60.0


@dataclass(frozen=True)
class Nodes:
    """One node, or all nodes of a deployment. Waits are long: a command has no request behind it."""

    addresses: Sequence[str]
    """host:port of each."""
    replication: int = 1
    security: PeerSecurity = field(default_factory=PeerSecurity)

    def __str__(self) -> str:
        return ", ".join(self.addresses)

    def open(self) -> StoreClient | StoreRing:
        """Call it on the event loop that uses it. Raises ValueError for what is no list of nodes."""
        if len(self.addresses) == 1 and self.replication == 1:
            return patient_client(self.addresses[0], self.security)
        config = RingConfig(
            nodes=tuple(self.addresses),
            replication=self.replication,
            lookup_timeout_s=_LOOKUP_S,
            get_timeout_s=_GET_S,
            put_timeout_s=_PUT_S,
        )
        return StoreRing(config, make_client=partial(patient_client, security=self.security))


def patient_client(address: str, security: PeerSecurity | None = None) -> StoreClient:
    """A client of one node."""
    config = ClientConfig(
        address=address,
        lookup_timeout_s=_LOOKUP_S,
        get_timeout_s=_GET_S,
        put_timeout_s=_PUT_S,
        progress_timeout_s=_LOOKUP_S,
    )
    return StoreClient(config, security=security)
