"""`kvferry token`: makes the tokens that a deployment and its clients need."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Annotated

import typer
import yaml

from kvferry.deploy.cli_failure import fail
from kvferry.deploy.client_tokens import read_client_tokens
from kvferry.deploy.security_settings import CLUSTER_FOLDER
from kvferry.deploy.token_files import make_missing_files, token_entry
from kvferry.proto.token_file import new_token

token = typer.Typer(help="Tokens of clients, and the one that a deployment's processes share.", no_args_is_help=True)


@token.command()
def new(
    name: Annotated[str, typer.Argument(help="Whose it is: letters, digits and ._- for the log.")],
    tenant: Annotated[str | None, typer.Option(help="Cache namespace of its requests; else NAME.")] = None,
    expires: Annotated[
        str | None, typer.Option(help="Last day, 2027-01-31 (UTC), or how many days from today: 90d.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print a new token, which is shown this once, and the entry of the file of tokens that lets it in."""
    secret = new_token()
    try:
        entry = token_entry(name, secret, tenant=tenant or name, expires=None if expires is None else _day(expires))
    except ValueError as error:
        fail(str(error))
    if as_json:
        print(json.dumps({"token": secret, "entry": entry}, default=str))
        return
    print(f"token, for {name} alone: {secret}")
    print("entry, for security.tokens_file of the gateways:")
    print("\n".join(f"  {line}" for line in yaml.safe_dump([entry], sort_keys=False).splitlines()))


@token.command()
def setup(
    folder: Annotated[Path, typer.Argument(help="Where.")] = CLUSTER_FOLDER,
) -> None:
    """Make what a cluster needs and does not have: its token, and a first client's token with the file that lets it in.

    Files that are there stay as they are.
    """
    try:
        made = make_missing_files(folder.expanduser())
    except (OSError, ValueError) as error:
        fail(str(error))
    for path in made:
        print(f"made {path}")
    if not made:
        print(f"{folder} has all of them")


@token.command()
def check(file: Annotated[Path, typer.Argument(help="A file of tokens.")]) -> None:
    """Say who is let in by a file of tokens. Ends non-zero when it is none."""
    try:
        entries = read_client_tokens(file)
    except (OSError, ValueError) as error:
        fail(str(error))
    now = datetime.datetime.now(datetime.UTC)
    for entry in entries:
        end = "" if entry.expires is None else f", {'over since' if entry.is_over(now) else 'until'} {entry.expires}"
        print(f"{entry.name}: tenant {entry.tenant}{end}")


def _day(text: str) -> datetime.date:
    """Raises ValueError."""
    if re.fullmatch(r"\d{1,5}d", text):
        return datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=int(text[:-1]))
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"--expires {text}: write a day, 2027-01-31, or a number of days, 90d") from None
