"""Trailing metadata that workers and gateway both know."""

from __future__ import annotations

from collections.abc import Iterable

RETRY_AFTER_KEY = "retry-after-ms"
"""With RESOURCE_EXHAUSTED: when another try may find room, in decimal digits."""


Metadata = Iterable[tuple[str, str | bytes]] | None


def retry_after_ms(metadata: Metadata) -> str:
    """The hint in a call's trailing metadata; "" without one."""
    for key, value in metadata or ():
        if key == RETRY_AFTER_KEY and isinstance(value, str) and value.isdecimal():
            return value
    return ""
