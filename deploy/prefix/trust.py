"""Whose bundles are imported: the trust file and what the command line adds to it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from kvferry.kvstore.bundle_signature import load_trusted, parse_public_key


def default_trust_file() -> Path:
    root = os.environ.get("XDG_CONFIG_HOME")
    return (Path(root) if root else Path.home() / ".config") / "kvferry" / "trusted-signers"


def trusted_signers(trust_file: Path | None, trust_these: Sequence[str] = ()) -> dict[bytes, str]:
    """Public keys with their names. Without the default file nobody is trusted; a named file must exist.

    Raises InvalidRequest for a malformed line or key, or OSError.
    """
    path = trust_file or default_trust_file()
    trusted = load_trusted(path) if trust_file is not None or path.exists() else {}
    return trusted | {parse_public_key(text): "named on the command line" for text in trust_these}
