"""`kvferry generate --prefetch`: no answer, only the prompt's blocks."""

from __future__ import annotations

import json
from dataclasses import asdict

from kvferry.deploy.cli_failure import fail
from kvferry.deploy.client import Client, ClientError, PromptOptions
from kvferry.deploy.client_access import ClientAccess


def prefetch_prompt(address: str, text: str, *, access: ClientAccess, raw: bool, as_json: bool, timeout: float) -> None:
    """Has the prompt's complete blocks computed and stored, and prints what was done."""
    options: PromptOptions = {"timeout": timeout}
    if not raw:
        options["messages"] = [{"role": "user", "content": text}]
    try:
        with Client(address, access=access) as client:
            done = client.warm(text if raw else None, **options)
    except ClientError as error:
        fail(str(error))
    if as_json:
        print(json.dumps(asdict(done)))
    else:
        print(
            f"{done.prompt_tokens} prompt tokens, {done.block_tokens} in complete blocks: "
            f"{done.cached_tokens} were in the store, {done.stored_tokens} were stored now"
        )
