"""The options of commands that talk to a gateway, or to the processes behind it, where these ask for credentials."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvferry.deploy.cli_config import read_settings
from kvferry.deploy.cli_failure import fail
from kvferry.deploy.client_access import ClientAccess
from kvferry.deploy.security import peer_security
from kvferry.proto.peer_security import PeerSecurity

TokenFileOption = Annotated[
    Path | None, typer.Option("--token-file", help="File of your token; else KVFERRY_TOKEN or KVFERRY_TOKEN_FILE.")
]
CaOption = Annotated[
    str | None,
    typer.Option("--ca", help='TLS: PEM of the authority of the gateway\'s certificate, or "system"; else KVFERRY_CA.'),
]
SecurityConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="File whose security section says what workers and store nodes ask for."),
]


def client_access(token_file: Path | None, ca: str | None) -> ClientAccess:
    """Ends the command when a file cannot be read or is none."""
    try:
        return ClientAccess.find(token_file=token_file, ca=ca)
    except (OSError, ValueError) as error:
        fail(str(error))


def peers_of(config: Path | None) -> PeerSecurity:
    """What the deployment's own processes show each other, by a file and the environment. Ends the command when that
    cannot be read."""
    try:
        return peer_security(read_settings(config).security)
    except (OSError, ValueError) as error:
        fail(str(error))
