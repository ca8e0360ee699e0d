"""Who a request is from, as its credential says: what works on the request asks here, never the request."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Principal:
    name: str
    """Of the token; empty where clients are not asked."""
    tenant: str
    """The cache namespace of its requests."""


_current: ContextVar[Principal | None] = ContextVar("kvferry_principal", default=None)


def bind_principal(principal: Principal) -> None:
    """From here on this task works for it."""
    _current.set(principal)


def current_principal() -> Principal:
    """Raises RuntimeError where nobody was bound: a request must not fall into somebody's tenant."""
    principal = _current.get()
    if principal is None:
        raise RuntimeError("a request has no principal")
    return principal
