"""How a `kvferry prefix` command ends when something is wrong: with one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvferry.deploy.cli_failure import fail
from kvferry.deploy.client import ClientError
from kvferry.kvstore.errors import KVStoreError


@contextmanager
def failing() -> Iterator[None]:
    try:
        yield
    except (KVStoreError, ClientError, OSError, ValueError) as error:
        fail(str(error))
