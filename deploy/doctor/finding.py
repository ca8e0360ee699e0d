"""What the doctor finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One fact. A warning makes kvferry slower than it could be, or something unavailable; with a problem these
    settings do not start here, or lose requests. Both say in `reason` what to do."""

    topic: str
    value: str
    reason: str = ""
    status: Status = "ok"

    def __post_init__(self) -> None:
        if self.status != "ok" and not self.reason:
            raise ValueError(f"{self.topic}: a {self.status} says what to do")


def warning(topic: str, value: str, reason: str) -> Finding:
    """Something is slower than it could be, or unavailable."""
    return Finding(topic, value, reason, "warning")


def problem(topic: str, value: str, reason: str) -> Finding:
    """These settings do not work here."""
    return Finding(topic, value, reason, "problem")


def gib(num_bytes: float) -> str:
    """For people: "1.5 GiB", "20 MiB"."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.1f} GiB"
    return f"{num_bytes / 2**20:.0f} MiB"
