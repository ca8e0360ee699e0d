"""Whom the gateway knows: a YAML file of token hashes, with the tenant of each. The tokens themselves are nowhere.

tokens:
  - name: alice
    sha256: 64 hex digits        # as `kvferry token new alice` prints it
    tenant: team-a
    expires: 2027-01-31          # optional; a day is meant to its end, in UTC
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from kvferry.kvstore.key import MAX_TENANT_BYTES
from kvferry.proto.bearer import is_one_of, token_digest

_logger = logging.getLogger(__name__)

POLL_S = 1.0
"""Between two looks at the file."""
MAX_TOKENS = 100_000
MAX_BYTES = 64 << 20
_PREFIX_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class ClientToken:
    """An entry of the file."""

    name: str
    digest: bytes
    tenant: str
    expires: datetime.datetime | None

    def is_over(self, now: datetime.datetime) -> bool:
        return self.expires is not None and now >= self.expires


def _moment(value: object) -> object:
    """A day is meant to its end; a time without a zone is one of UTC."""
    if isinstance(value, str):
        value = datetime.datetime.fromisoformat(value) if "T" in value else datetime.date.fromisoformat(value)
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        value = datetime.datetime.combine(value, datetime.time()) + datetime.timedelta(days=1)
    if isinstance(value, datetime.datetime) and value.tzinfo is None:
        value = value.replace(tzinfo=datetime.UTC)
    return value


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tenant: Annotated[str, Field(min_length=1)]
    expires: Annotated[datetime.datetime | None, BeforeValidator(_moment)] = None

    @field_validator("tenant")
    @classmethod
    def _fits_a_key(cls, tenant: str) -> str:
        if len(tenant.encode()) > MAX_TENANT_BYTES:
            raise ValueError(f"at most {MAX_TENANT_BYTES} bytes of UTF-8")
        return tenant


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    tokens: Annotated[list[_Entry], Field(max_length=MAX_TOKENS)]


def check_entry(entry: dict[str, object]) -> None:
    """Raises ValueError, which names the key, for what is no entry of the file."""
    try:
        _Entry.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def read_client_tokens(path: Path) -> list[ClientToken]:
    """Raises ValueError, which names the file and the key and repeats no value, and OSError."""
    size = path.expanduser().stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} is no file of tokens: it has {size:,} bytes, and {MAX_BYTES:,} are allowed")
    try:
        file = _File.model_validate(yaml.safe_load(path.expanduser().read_text()))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path} is no file of tokens: {where}: {first['msg']}; see docs/security.md") from None
    except (yaml.YAMLError, ValueError, RecursionError):  # their messages quote the file
        raise ValueError(f"{path} is no file of tokens: it is not YAML; see docs/security.md") from None
    for field in ("name", "sha256"):
        values = [getattr(entry, field) for entry in file.tokens]
        if len(set(values)) < len(values):
            raise ValueError(f"{path} is no file of tokens: two entries have the same {field}")
    return [
        ClientToken(name=e.name, digest=bytes.fromhex(e.sha256), tenant=e.tenant, expires=e.expires)
        for e in file.tokens
    ]


class ClientTokens:
    """The file's content, kept fresh by `follow`. Use it on one event loop."""

    def __init__(self, path: Path) -> None:
        """Reads the file. Raises as `read_client_tokens`."""
        self._path = path.expanduser()
        self._version = _version(self._path)
        self._by_prefix = _index(read_client_tokens(path))
        self.num_reloads = 0
        self.num_failed_reloads = 0
        """Times that a changed file was no file of tokens, or was gone: the entries before it went on."""

    def find(self, token: str) -> ClientToken | None:
        """The entry of this token, also of one that is over.

        Some bytes of the hash find the candidates, so that a look-up does not grow with the file; the hash is then
        compared in constant time. What time tells is about the hash of a guess, which nobody can steer.
        """
        candidates = self._by_prefix.get(token_digest(token)[:_PREFIX_BYTES], ())
        return next((entry for entry in candidates if is_one_of(token, (entry.digest,))), None)

    async def follow(self) -> None:
        """Reads the file again whenever it changes, until cancelled. A bad one changes nothing but a counter and the
        log."""
        while True:
            await asyncio.sleep(POLL_S)
            await self.refresh()

    async def refresh(self) -> None:
        """One look at the file; on another thread, for it may be long."""
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            entries = await asyncio.to_thread(read_client_tokens, self._path)
        except (OSError, ValueError) as error:
            self.num_failed_reloads += 1
            reason = f"it cannot be read ({type(error).__name__})" if isinstance(error, OSError) else str(error)
            _logger.error("the tokens stay as they are: %s", reason)
            return
        self._by_prefix = _index(entries)
        self.num_reloads += 1
        _logger.info("%d client tokens from a changed file", len(entries))


def _version(path: Path) -> tuple[int, int, int, int] | None:
    """Another one when the file was written or replaced; None while there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _index(entries: Iterable[ClientToken]) -> dict[bytes, list[ClientToken]]:
    by_prefix: dict[bytes, list[ClientToken]] = defaultdict(list)
    for entry in entries:
        by_prefix[entry.digest[:_PREFIX_BYTES]].append(entry)
    return dict(by_prefix)
