"""Ends an answer where a stop string begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopResult(NamedTuple):
    text: str  # text that is certain to come before any stop string
    stopped: bool  # a stop string is complete; nothing more will come


class StopStrings:
    """Watches one answer's text for the first complete stop string.

    Text that may be the beginning of a stop string is held back, never more than the longest stop string less one
    character. The match that completes first wins, and among those the longest; so the result does not depend on how
    the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty")
        self._stops = tuple(stops)
        self._max_held = max(map(len, stops), default=1) - 1
        self._held = ""

    def push(self, text: str) -> StopResult:
        buffer = self._held + text
        matches = [(start + len(stop), start) for stop in self._stops if (start := buffer.find(stop)) >= 0]
        if matches:
            _, start = min(matches)
            self._held = ""
            return StopResult(buffer[:start], True)
        num_held = self._num_to_hold(buffer)
        cut = len(buffer) - num_held
        self._held = buffer[cut:]
        return StopResult(buffer[:cut], False)

    def finish(self) -> str:
        """The text still held back, when the answer ended for another reason."""
        held, self._held = self._held, ""
        return held

    def _num_to_hold(self, buffer: str) -> int:
        for size in range(min(self._max_held, len(buffer)), 0, -1):
            tail = buffer[-size:]
            if any(len(stop) > size and stop.startswith(tail) for stop in self._stops):
                return size
        return 0
