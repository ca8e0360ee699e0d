"""How a command ends when it cannot do what was asked."""

from __future__ import annotations

import sys
from typing import NoReturn


def fail(message: str) -> NoReturn:
    print(f"kvferry: {message}", file=sys.stderr)
    raise SystemExit(1)
