"""Numbers that only grow, also over a restart of the directory."""

from __future__ import annotations

import os
import time
from pathlib import Path

RESERVED = 1024
"""Epochs that the file is ahead, so that it is not written for each one."""


class EpochCounter:
    """`Epochs` that begin at the wall clock, in microseconds, or behind what the file says, whichever is greater.

    Without a file a clock that was set back while the directory was down could repeat a number. The file holds a number
    that no granted epoch has passed; it is replaced in one step before that would happen.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Raises OSError when the file cannot be read or written, ValueError when it holds something else."""
        self._path = path
        self._reserved = 0
        saved = 0
        if path is not None and path.exists():
            text = path.read_text().strip()
            if not text.isdecimal():
                raise ValueError(f"{path} is no state file of a directory: it must hold one number")
            saved = int(text)
        self._last = max(saved, time.time_ns() // 1000)
        self._reserve()

    def next(self) -> int:
        """See `Epochs`. Raises OSError when the file cannot be written."""
        self._last += 1
        self._reserve()
        return self._last

    def raise_to(self, epoch: int) -> None:
        """See `Epochs`. Raises OSError when the file cannot be written."""
        self._last = max(self._last, epoch)
        self._reserve()

    def _reserve(self) -> None:
        if self._path is None or self._last < self._reserved:
            return
        reserved = self._last + RESERVED
        draft = self._path.with_name(f"{self._path.name}.new")
        with draft.open("w") as file:
            file.write(f"{reserved}\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._path)
        self._reserved = reserved
