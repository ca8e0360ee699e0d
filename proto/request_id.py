"""A request's id on its way through the processes: in messages of the workers, in metadata of calls to the store.

It is bound to the task that works on the request, and to every task that this one starts; log lines name it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextvars import ContextVar

REQUEST_ID_KEY = "kvferry-request-id"
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""What an id may be; it goes into logs as it is."""

_current: ContextVar[str] = ContextVar("kvferry_request_id", default="")


def current_request_id() -> str:
    """Of the request that this task works on; empty without one."""
    return _current.get()


def bind_request_id(request_id: str) -> None:
    """From here on this task works on this request. What is no id counts as none: callers may send anything."""
    _current.set(request_id if REQUEST_ID.fullmatch(request_id) else "")


def bind_from_metadata(metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
    """The same, with the id in a call's metadata."""
    value = next((value for key, value in metadata or () if key == REQUEST_ID_KEY), "")
    bind_request_id(value if isinstance(value, str) else "")


def request_id_metadata() -> tuple[tuple[str, str], ...]:
    """What a call made for this task's request carries."""
    request_id = _current.get()
    return ((REQUEST_ID_KEY, request_id),) if request_id else ()
