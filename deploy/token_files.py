"""Makes the files of a deployment's tokens, where there are none."""

from __future__ import annotations

import datetime
from pathlib import Path

import yaml

from kvferry.deploy.client_tokens import check_entry
from kvferry.deploy.security_settings import CLUSTER_TOKEN_FILE, TOKENS_FILE
from kvferry.proto.bearer import token_digest
from kvferry.proto.token_file import new_token, write_secret

CLIENT_TOKEN = "client_token"
FIRST_CLIENT = "first"
FIRST_TENANT = "default"


def token_entry(name: str, token: str, *, tenant: str, expires: datetime.date | None = None) -> dict[str, object]:
    """An entry of a file of client tokens. Raises ValueError for an impossible name or tenant."""
    entry: dict[str, object] = {"name": name, "sha256": token_digest(token).hex(), "tenant": tenant}
    if expires is not None:
        entry["expires"] = expires
    check_entry(entry)
    return entry


def make_missing_files(folder: Path) -> list[Path]:
    """In `folder`, readable by this user only: the cluster's token, a file of client tokens, and the one token that it
    lets in. Returns those that were made. Raises OSError."""
    made = []
    cluster, tokens, client = folder / CLUSTER_TOKEN_FILE.name, folder / TOKENS_FILE.name, folder / CLIENT_TOKEN
    if not cluster.exists():
        write_secret(cluster, new_token() + "\n")
        made.append(cluster)
    if not tokens.exists():
        secret = new_token()
        client.unlink(missing_ok=True)  # of a file that is gone: nothing lets it in
        write_secret(client, secret + "\n")
        content = {"tokens": [token_entry(FIRST_CLIENT, secret, tenant=FIRST_TENANT)]}
        write_secret(tokens, yaml.safe_dump(content, sort_keys=False))
        made += [client, tokens]
    return made
