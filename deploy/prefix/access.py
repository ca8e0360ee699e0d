"""Credentials of `kvferry prefix`: options of the group, before the command's name."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

from kvferry.deploy.cli_access import CaOption, SecurityConfigOption, TokenFileOption, client_access, peers_of
from kvferry.deploy.client_access import ClientAccess
from kvferry.proto.peer_security import PeerSecurity


@dataclass(frozen=True, kw_only=True)
class Access:
    peers: PeerSecurity = field(default_factory=PeerSecurity)
    """For workers and store nodes."""
    client: ClientAccess = field(default_factory=ClientAccess)
    """For the gateway."""


_access: ContextVar[Access | None] = ContextVar("kvferry_prefix_access", default=None)


def read_access(
    config: SecurityConfigOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
) -> None:
    """Computed prefixes as files, and from store node to store node."""
    _access.set(Access(peers=peers_of(config), client=client_access(token_file, ca)))


def access() -> Access:
    """Of the command that runs."""
    return _access.get() or Access()
