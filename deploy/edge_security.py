"""The gateway's port: what its clients must show. What the deployment's processes show each other: `PeerSecurity`."""

from __future__ import annotations

import datetime
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from kvferry.deploy.client_tokens import ClientTokens
from kvferry.deploy.principal import Principal, bind_principal
from kvferry.proto import gateway_pb2
from kvferry.proto.bearer import bearer_token
from kvferry.proto.peer_security import OpenPortRefused, PeerSecurity, add_port, is_loopback
from kvferry.proto.token_guard import OPEN_METHODS, Refusals, TokenGuard

_OPERATORS = f"/{gateway_pb2.DESCRIPTOR.services_by_name['Gateway'].full_name}/"
REASONS = ("missing", "unknown", "expired", "operator")
"""Why a call is refused; `operator`: the method is for the deployment's own processes."""


@dataclass(frozen=True, kw_only=True)
class EdgeTls:
    """PEM."""

    cert: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None = None
    """Clients need a certificate of it; None: they need none."""


@dataclass(frozen=True, kw_only=True)
class EdgeSecurity:
    tokens_file: Path | None = None
    """See client_tokens.py; None: clients are not asked for a token."""
    tls: EdgeTls | None = None
    """None: plain text."""
    insecure: bool = False
    """Somebody has said that an open port is meant."""

    @property
    def is_open(self) -> bool:
        """Whether nobody is asked who he is."""
        return self.tokens_file is None and (self.tls is None or self.tls.client_ca is None)

    def require_asking(self, address: str) -> None:
        """Raises OpenPortRefused where host:port would let everybody in who reaches it."""
        if self.is_open and not self.insecure and not is_loopback(address.rpartition(":")[0]):
            raise OpenPortRefused(
                f"{address} may be reached by others, and the gateway would serve everybody: set security.tokens_file "
                "(`kvferry token setup` makes one) or security.tls.require_client_cert, or bind 127.0.0.1, or set "
                "security.insecure to true in a network where you trust everybody"
            )

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Binds host:port and returns the port. Raises OpenPortRefused, and OSError when it is taken."""
        self.require_asking(address)
        credentials = None
        if self.tls is not None:
            credentials = grpc.ssl_server_credentials(
                [(self.tls.key, self.tls.cert)],
                root_certificates=self.tls.client_ca,
                require_client_auth=self.tls.client_ca is not None,
            )
        return add_port(server, address, credentials)


class EdgeGuard(grpc.aio.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """Lets clients with a token through, every method but `Health.Check`, and binds whose request it is.

    The service for operators is for callers with the cluster token, where there is one.
    """

    def __init__(self, tokens: ClientTokens | None, peers: PeerSecurity, *, default_tenant: str) -> None:
        """`default_tenant`: of all requests where there are no tokens."""
        self._tokens = tokens
        self._operators = next(iter(peers.guards()), None)
        self._everybody = Principal(name="", tenant=default_tenant)
        self.refusals = Refusals()
        self.num_refused = dict.fromkeys(REASONS, 0)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        method, metadata = handler_call_details.method, handler_call_details.invocation_metadata
        if method in OPEN_METHODS:
            return await continuation(handler_call_details)
        if method.startswith(_OPERATORS) and not self._admits_operator(self._operators, metadata):
            return self._refuse("operator", "This method is for operators, who send the cluster token.")
        if not method.startswith(_OPERATORS):
            found = self._principal(bearer_token(metadata))
            if isinstance(found, str):
                return self._refuse(found, _SENTENCES[found])
            bind_principal(found)
        return await continuation(handler_call_details)

    def _admits_operator(self, operators: TokenGuard | None, metadata: Any) -> bool:
        return self._tokens is None if operators is None else operators.admits(metadata)

    def _principal(self, token: str | None) -> Principal | str:
        """Or why there is none."""
        if self._tokens is None:
            return self._everybody
        if token is None:
            return "missing"
        entry = self._tokens.find(token)
        if entry is None:
            return "unknown"
        if entry.is_over(datetime.datetime.now(datetime.UTC)):
            return "expired"
        return Principal(name=entry.name, tenant=entry.tenant)

    def _refuse(self, reason: str, sentence: str) -> Any:
        self.num_refused[reason] += 1
        return self.refusals.handler(sentence)


_SENTENCES = {
    "missing": "This gateway asks for a token: send `authorization: Bearer TOKEN`, "
    "with kvferry's client by --token-file or KVFERRY_TOKEN.",
    "unknown": "This gateway does not know the token: it is wrong, or was taken back.",
    "expired": "The token is over: ask for a new one.",
}
