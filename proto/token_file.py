"""The file of the token that the processes of a deployment share: one a line, the first is sent, all are accepted."""

from __future__ import annotations

import logging
import os
import re
import secrets
import stat
from pathlib import Path

_logger = logging.getLogger(__name__)

MIN_CHARACTERS = 32
MAX_TOKENS = 8
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")
"""What may follow `Bearer` in a header."""


def new_token() -> str:
    """256 random bits, 43 characters."""
    return secrets.token_urlsafe(32)


def read_tokens(path: Path) -> tuple[str, ...]:
    """Raises ValueError, which holds no token, and OSError."""
    path = path.expanduser()
    lines = [line.strip() for line in path.read_text().splitlines()]
    tokens = tuple(line for line in lines if line and not line.startswith("#"))
    if not 1 <= len(tokens) <= MAX_TOKENS:
        raise ValueError(f"{path} holds {len(tokens)} tokens, one a line: 1 to {MAX_TOKENS} are allowed")
    for number, token in enumerate(tokens, 1):
        if len(token) < MIN_CHARACTERS or not _TOKEN.fullmatch(token):
            raise ValueError(
                f"token {number} of {path} is none: {MIN_CHARACTERS} or more random letters, digits and ._~+/=- "
                "(`kvferry token setup` makes one)"
            )
    mode = path.stat().st_mode
    if mode & (stat.S_IRGRP | stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH):
        _logger.warning("%s can be read by other users of this machine (mode %o): chmod 600", path, stat.S_IMODE(mode))
    return tokens


def write_secret(path: Path, text: str) -> None:
    """A new file that only this user reads. Raises FileExistsError where there is one."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
