"""Credentials of `kvferry prefix`: options of the group, before the command's name."""

from __future__ import annotations

from dataclasses import dataclass, field

import click
import typer

from kvferry.deploy.cli_access import CaOption, SecurityConfigOption, TokenFileOption, client_access, peers_of
from kvferry.deploy.client_access import ClientAccess
from kvferry.proto.peer_security import PeerSecurity


@dataclass(frozen=True, kw_only=True)
class Access:
    peers: PeerSecurity = field(default_factory=PeerSecurity)
    """For workers and store nodes."""
    client: ClientAccess = field(default_factory=ClientAccess)
    """For the gateway."""


def read_access(
    context: typer.Context,
    config: SecurityConfigOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
) -> None:
    """Computed prefixes as files, and from store node to store node."""
    context.obj = Access(peers=peers_of(config), client=client_access(token_file, ca))


def access() -> Access:
    """Of the command that runs."""
    context = click.get_current_context(silent=True)
    return context.obj if context is not None and isinstance(context.obj, Access) else Access()
