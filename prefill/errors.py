"""Errors of prefill.

PrefillError
├── DeadlinePassed   the caller: its time was too short
└── QueueFull        the caller: later, see `retry_after_ms`
"""

from __future__ import annotations


class PrefillError(Exception):
    """Why a prompt was not prefilled."""


class DeadlinePassed(PrefillError):
    """The request's deadline has passed before its first token."""


class QueueFull(PrefillError):
    """The worker holds as many requests as it may, of all callers or of this one."""

    def __init__(self, message: str, *, retry_after_ms: int) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms
